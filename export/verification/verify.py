"""`qinvert.verify`: does a runtime compute what the plan says?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeAlias

import onnx
import torch

from qinvert.errors import ExportError, lookup
from qinvert.export.exporting import serialize
from qinvert.export.functions import single_layer
from qinvert.export.interface import GraphInput, Interface
from qinvert.export.metadata import layer_in
from qinvert.export.reading import read_model
from qinvert.export.runtimes import RUNTIMES, Execution, Runtime, execute
from qinvert.export.step_graph import is_step
from qinvert.export.step_heads import layer_plans
from qinvert.export.step_interface import StepInterface
from qinvert.export.step_reading import read_step_interface
from qinvert.export.verification.comparison import Verification, compare, judge
from qinvert.export.verification.references import Reference, graph_inputs, reference
from qinvert.export.verification.runs import (
    Inputs,
    as_taken,
    built_lower,
    feeds,
    filled,
    given_lower,
    joined,
    onto_grids,
    stored,
)
from qinvert.export.verification.tolerance import tolerance_for
from qinvert.export.verification.verify_step import verify_step
from qinvert.files import read_bytes
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import Profile, find_profile
from qinvert.program.ports import BETA
from qinvert.progress import track
from qinvert.systems import Systems

#: What each setting of a runtime should return.
Wanted: TypeAlias = Callable[[str], Reference]


def verify(
    path: str | PathLike[str],
    plan: Plan,
    L: Any,  # noqa: N803 - the field's name of this matrix
    *,
    runtimes: Sequence[str] = ("onnxruntime",),
    layer: str | None = None,
    beta: Any = None,
    keep: str | PathLike[str] | None = None,
) -> list[Verification]:
    """Run an exported graph and compare every value with the simulator.

    Integer profiles, and QDQ profiles under power-of-two scales, must agree
    bit for bit, except where the graph builds L in float32.  A QDQ graph
    with float scales may differ where a runtime leaves a product in float32
    and a value lies so close to a rounding boundary that the order of the
    sum decides, and in what the program makes of that step: for every value
    that differs, intervals prove that it can.  The count is in the result;
    more than one value in 16 is refused, because the inputs then amplify so
    many ties that the comparison tells nothing.  A processor with a rounding of its own may differ by
    `Runtime.own_steps` anywhere, and by more in one value of a thousand.
    `qinvert.export.verification.tolerance` says who allows what, and why.
    One that takes `Runtime.inputs` of float16 is given, and compared on,
    inputs of that precision.

    Parameters
    ----------
    path : path
        Path of the .onnx file.
    plan : Plan
        The plan that the file was exported from.
    L : tensor or array, shape ``(..., C, C)``
        Inputs; repeated to fill the last batch, all of which is compared.
        For a graph from keys a mapping of ``k (..., C, D)``, ``beta (..., C)``
        and ``g (..., C)``: the L that a runtime builds of them must be right
        in float32, and the simulator is given this L.  For a graph of a chunk step a
        mapping of its inputs ``q, k, v, beta, g, state`` (and ``valid``, if not all tokens
        count), with any number of sequences and tokens: those beyond one call run in
        further calls, and the runtime's own state goes from each to the next.
    runtimes : sequence of str
        Names of `qinvert.export.runtimes.RUNTIMES`.
    layer : str, optional
        Layer of the plan; read from the file if left out.  From a model with
        a function per layer that function is run, alone and inlined.
    beta : tensor or array, shape ``(..., C)``, optional
        In [0, 2]; a factored plan needs it, others ignore it.
    keep : path, optional
        Folder that gets the files that the runtimes' compilers made; `Verification.kept`
        names them and says how to load them.

    Returns
    -------
    list of Verification
        One per runtime and setting.

    Raises
    ------
    VerificationError
        If a difference is not allowed; the message has the first differing element.
    ExportError
        If the file is not a graph of this package, or a runtime is unknown
        or refuses the graph, or none of them makes files to keep.
    InputError
        If ``L`` or ``beta`` is not legal.
    """
    file = _File.read(path, plan, layer)
    if not runtimes:
        raise ExportError("no runtime was named; pass for example runtimes=('onnxruntime',)")
    if keep is not None:
        _check_keeping(runtimes)
    if is_step(file.plan):
        profile = file.profile(plan)
        step = read_step_interface(file.model, file.plan, profile)
        return verify_step(file.model, file.content, file.plans, step, profile, L, runtimes, file.hint(plan))
    graph = _Graph(file=file, interface=Interface.of(file.model, file.plan))
    inputs = graph_inputs(file.plan, graph.interface, L, beta)
    check = _Check(
        graph=graph,
        profile=file.profile(plan),
        inputs=filled(inputs, graph.batch),
        hint=file.hint(plan),
        keep=keep,
    )
    return [result for name in track(runtimes, "runtimes", len(runtimes)) for result in check.run(name)]


def _check_keeping(names: Sequence[str]) -> None:
    able = [name for name, runtime in RUNTIMES.items() if runtime.loading]
    if not set(able) & set(names):
        raise ExportError(
            f"{', '.join(names)} makes no file to keep; add one of these runtimes: {', '.join(able)}"
        )


def read_interface(path: str | PathLike[str], plan: Plan, layer: str) -> Interface | StepInterface:
    """Return what the exported graph of a layer takes and returns.

    Raises
    ------
    ExportError
        If the file is not a graph of this package.
    """
    file = _File.read(path, plan, layer)
    if is_step(file.plan):
        return read_step_interface(file.model, file.plan, file.profile(plan))
    return Interface.of(file.model, file.plan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _File:
    """The graph of one layer, as it was read."""

    model: onnx.ModelProto
    #: The model as a runtime takes it.
    content: bytes
    #: Provenance that the export wrote into the file.
    metadata: Mapping[str, str]
    #: Plan of the layer, or those of its heads that share a graph.
    plans: tuple[LayerPlan, ...]

    @property
    def plan(self) -> LayerPlan:
        """Plan of the layer, or of its first head."""
        return self.plans[0]

    @staticmethod
    def read(path: str | PathLike[str], plan: Plan, layer: str | None) -> _File:
        """Read a file and its layer of the plan."""
        content = read_bytes(path)
        whole = read_model(content, path)
        model = single_layer(whole, layer)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        plans = layer_plans(plan, layer if layer is not None else layer_in(metadata))
        content = content if model is whole else serialize(model)
        return _File(model=model, content=content, metadata=metadata, plans=plans)

    def profile(self, plan: Plan) -> Profile:
        """Return the profile that the graph was exported for."""
        return find_profile(self.metadata.get("qinvert.profile", plan.target))

    def hint(self, plan: Plan) -> str:
        """Say what a reader of a refusal should know."""
        if self.metadata.get("qinvert.plan_sha256") != plan.sha256:
            return "the file was exported from another plan: export it again"
        entries = (f"{key.removeprefix('qinvert.')} {value}" for key, value in sorted(self.metadata.items()))
        return f"the graph says of itself: {', '.join(entries)}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Graph:
    """The graph of an inverse, and what it takes and returns."""

    file: _File
    interface: Interface

    @property
    def batch(self) -> int:
        """Matrices per call; `Interface.of` does not take a graph that leaves them open."""
        assert self.interface.batch is not None
        return self.interface.batch

    @property
    def from_keys(self) -> bool:
        """Whether the graph builds L."""
        return self.interface.input is GraphInput.KEYS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Check:
    """A graph and all matrices that every runtime is compared on."""

    graph: _Graph
    profile: Profile
    #: Matrices that fill every batch.
    inputs: Inputs
    #: The end of the message of a refusal.
    hint: str
    #: Folder for what compilers make, if anything is kept.
    keep: str | PathLike[str] | None = None
    #: What was simulated, by the type of the inputs and by whose rounding: once for all runtimes.
    simulated: dict[tuple[str, Rounding], Reference] = field(default_factory=dict)

    def run(self, name: str) -> Iterator[Verification]:
        """Run the graph in every setting of a runtime, and judge what it returns."""
        runtime = lookup(RUNTIMES, name, "runtime", ExportError)
        plan, interface = self.graph.file.plan, self.graph.interface
        given = onto_grids(as_taken(self.inputs, runtime), plan, interface)
        wanted = self._built(runtime, given) if self.graph.from_keys else self._given(runtime, given)
        taken = stored(given, plan, interface, self.profile)
        keep = self.keep if runtime.loading else None
        for execution in execute(name, self.graph.file.content, feeds(taken, self.graph.batch), keep=keep):
            yield self._judged(runtime, execution, wanted(execution.setting))

    def _given(self, runtime: Runtime, given: Inputs) -> Wanted:
        """What a graph should return for the L that it is given, whatever the setting."""
        key = (runtime.inputs, runtime.rounding)
        if key not in self.simulated:
            lower = given_lower(self.graph.interface, given)
            self.simulated[key] = self._reference(runtime, given, lower)
        return lambda _: self.simulated[key]

    def _built(self, runtime: Runtime, given: Inputs) -> Wanted:
        """What a graph should return for the L that each setting builds from keys."""
        built = built_lower(self.graph.file.model, runtime, given, self.graph.batch)
        return lambda setting: self._reference(runtime, given, built[setting])

    def _reference(self, runtime: Runtime, given: Inputs, lower: torch.Tensor) -> Reference:
        plan, interface = self.graph.file.plan, self.graph.interface
        beta = given[BETA].squeeze(-1) if plan.program.inverse_ports.factored else None
        storage = self.profile.end_of(plan.output.format)
        return reference(plan, interface, storage, Systems(lower=lower, beta=beta), self._rounding(runtime))

    def _rounding(self, runtime: Runtime) -> Rounding:
        """Whose integers are expected: a processor's own are known of 16 bits that are stored as planned."""
        formats = [grid.format for grid in self.graph.file.plan.tensors.values() if grid.format.is_wide]
        as_planned = all(self.profile.storage_of(fmt) == fmt for fmt in formats)
        return runtime.rounding if as_planned else Rounding.ONNX

    def _judged(self, runtime: Runtime, execution: Execution, wanted: Reference) -> Verification:
        tolerance = tolerance_for(
            runtime, self.profile, self.graph.file.plan, wanted.rounding, from_keys=self.graph.from_keys
        )
        actual = joined(execution, self.graph.batch, wanted.expected)
        result = compare(runtime.name, execution, actual, wanted, tolerance)
        judge(result, actual, wanted, tolerance, self.hint)
        return result
