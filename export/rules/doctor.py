"""`qinvert.doctor`: which nodes of an ONNX model a chip's compiler will not take, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

import onnx

from qinvert.documents import to_document
from qinvert.errors import ExportError
from qinvert.export.light_models import large_constants, stub, without_large_constants
from qinvert.export.reading import check_model, check_texts, inlined, parse_model
from qinvert.export.rules.compiler_faults import CAUSES, Effect, Examined, Fault, bodies
from qinvert.export.rules.graph_index import Structure
from qinvert.files import read_bytes
from qinvert.hardware import HARDWARE, Compiler, Hardware, find_hardware
from qinvert.profiles import PROFILES, Profile

#: Names of nodes that a group shows.
SHOWN: Final = 3
#: Effects in the order of their weight.
ORDER: Final = (Effect.REFUSED, Effect.WRONG, Effect.FLOAT, Effect.ELSEWHERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultGroup:
    """Faults of one cause that have one remedy."""

    #: Cause, such as ``operator missing``.
    cause: str
    effect: Effect
    #: Nodes by their operator, the most frequent first; other things that are counted by their names.
    kinds: Mapping[str, int]
    #: The first names of nodes, or of tensors where no node is to blame.
    nodes: tuple[str, ...]
    #: What to do about it, in one sentence.
    remedy: str

    @property
    def count(self) -> int:
        """Nodes of all kinds."""
        return sum(self.kinds.values())

    @property
    def title(self) -> str:
        """Effect, cause, what there is, and the first names."""
        names = ", ".join(self.nodes) + (", ..." if self.count > len(self.nodes) else "")
        return f"{self.effect}, {self.cause}: {self.what} ({names})"

    def __str__(self) -> str:
        return f"{self.title}: {self.remedy}"

    @property
    def what(self) -> str:
        """``6 Trilu``, or ``14 Mul, 14 Transpose, 12 Reshape, 8 others``."""
        shown = [f"{count:,} {kind}" for kind, count in list(self.kinds.items())[:SHOWN]]
        rest = self.count - sum(list(self.kinds.values())[:SHOWN])
        return ", ".join([*shown, *([f"{rest:,} others"] if rest else [])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a chip's compiler makes of a model, as far as the graph says it."""

    #: Chip, see `qinvert.hardware`.
    hardware: str
    #: Compiler and version with which its limits were found.
    compiler: str
    #: Nodes that are compiled, those of loops and branches included; what is constant is not.
    nodes: int
    #: Groups of faults, the worst first and of these the largest.
    groups: tuple[FaultGroup, ...]

    @property
    def accepted(self) -> bool:
        """Whether no node is refused or compiled to wrong values."""
        return not (self.count(Effect.REFUSED) or self.count(Effect.WRONG))

    def count(self, effect: Effect) -> int:
        """Faults of that effect."""
        return sum(group.count for group in self.groups if group.effect is effect)

    @property
    def verdict(self) -> str:
        """One sentence."""
        said = [
            f"{self.count(effect):,} {words}"
            for effect, words in (
                (Effect.REFUSED, "that it does not take"),
                (Effect.WRONG, "with wrong values"),
                (Effect.FLOAT, "products on floats"),
                (Effect.ELSEWHERE, "that other converters refuse"),
            )
            if self.count(effect)
        ]
        found = ", ".join(said) if said else "all on the chip"
        return f"{self.hardware} ({self.compiler}): {self.nodes:,} nodes: {found}"

    def __str__(self) -> str:
        return "\n".join([self.verdict, *(f"  {group}" for group in self.groups)])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        document: dict[str, Any] = to_document(self)
        counted = [{**to_document(group), "count": group.count} for group in self.groups]
        return {**document, "groups": counted, "accepted": self.accepted, "verdict": self.verdict}


def doctor(model: onnx.ModelProto | str | PathLike[str], *, hardware: str | None = None) -> Diagnosis:
    """Say which nodes of an ONNX model a chip's compiler will not take, grouped by cause.

    It reads the graph and compiles nothing: limits are those that a compiler
    showed on small graphs, and sizes, memory and combinations of operators
    may still stop it.  `qinvert.verify` and `qinvert.estimate` compile.

    Parameters
    ----------
    model : onnx.ModelProto or path
        Any ONNX model.  Local functions are inlined first.  Weights in other
        files are not read, so that its size does not matter.
    hardware : str, optional
        Chip, see `qinvert.hardware`; by default that of the export profile that the
        model's metadata names.

    Returns
    -------
    Diagnosis
        ``accepted``, ``verdict`` and groups of faults, with counts, the first names and a remedy each.

    Raises
    ------
    ExportError
        If it is not an ONNX model, no chip is named, or nothing is known of the chip's compiler.
    PlanError
        If there is no such chip.
    """
    path = "the model" if isinstance(model, onnx.ModelProto) else model
    if not isinstance(model, onnx.ModelProto):
        model = parse_model(read_bytes(model), model)
    check_texts(model, path)
    profile = _profile_of(model)
    chip = _chip(hardware, profile)
    compiler = chip.compiler
    assert compiler is not None
    cases = list(_examined(model, path, compiler, profile or PROFILES[chip.targets[0]]))
    return Diagnosis(
        hardware=chip.name,
        compiler=compiler.name,
        nodes=sum(sum(1 for _ in case.live()) for case in cases),
        groups=tuple(sorted(_groups(cases), key=lambda group: (ORDER.index(group.effect), -group.count))),
    )


def with_compilers() -> tuple[str, ...]:
    """Names of the chips whose compilers are known."""
    return tuple(name for name, chip in HARDWARE.items() if chip.compiler is not None)


def chip_with_compiler(name: str) -> Hardware:
    """Return the chip of that name.

    Raises
    ------
    ExportError
        If nothing is known of its compiler.
    PlanError
        If there is no such chip.
    """
    chip = find_hardware(name)
    if chip.compiler is None:
        legal = ", ".join(with_compilers())
        raise ExportError(f"nothing is known of a compiler for {name}; use one of {legal}")
    return chip


def _chip(name: str | None, profile: Profile | None) -> Hardware:
    name = name if name is not None else profile.hardware if profile is not None else ""
    if not name:
        legal = ", ".join(with_compilers())
        raise ExportError(f"the model does not name a chip; pass hardware=, one of {legal}")
    return chip_with_compiler(name)


def _profile_of(model: onnx.ModelProto) -> Profile | None:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return PROFILES.get(metadata.get("qinvert.profile", ""))


def _examined(
    model: onnx.ModelProto, path: object, compiler: Compiler, profile: Profile
) -> Iterator[Examined]:
    """Yield the graph of a model, and those of its loops and branches."""
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(opsets, default=0)
    shaped = with_shapes(model, path)
    yield Examined(Structure(shaped), compiler, profile, opset, model.ir_version)
    for body in bodies(shaped):
        inner = Structure(onnx.ModelProto(graph=body))
        yield Examined(inner, compiler, profile, opset, model.ir_version, main=False)


def with_shapes(model: onnx.ModelProto, path: object) -> onnx.ModelProto:
    """Return an inlined copy with the shapes that onnx infers, and stubs of large constants.

    Raises
    ------
    ExportError
        If onnx finds the model illegal.
    """
    stubs = [stub(tensor) for tensor in large_constants(model.graph)]
    given = {value.name for value in model.graph.input}
    light = without_large_constants(model, with_outputs=True)
    check_model(light, str(path))
    light = inlined(light)
    # Declared shapes are better than none.
    with suppress(Exception):
        light = onnx.shape_inference.infer_shapes(light, data_prop=True)
    constants = {tensor.name for tensor in stubs} - given
    kept = [value for value in light.graph.input if value.name not in constants]
    del light.graph.input[:]
    light.graph.input.extend(kept)
    light.graph.initializer.extend(stubs)
    return light


def _groups(cases: list[Examined]) -> Iterator[FaultGroup]:
    found: dict[tuple[str, Effect, str], list[Fault]] = {}
    for name, check in CAUSES.items():
        for fault in (fault for case in cases for fault in check(case)):
            found.setdefault((name, fault.effect, fault.remedy), []).append(fault)
    for (name, effect, remedy), faults in found.items():
        yield FaultGroup(
            cause=name,
            effect=effect,
            kinds=dict(Counter(fault.kind for fault in faults).most_common()),
            nodes=tuple(fault.node for fault in faults[:SHOWN]),
            remedy=remedy,
        )
