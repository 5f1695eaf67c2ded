"""What `qinvert.calibrate` returns: the integer program of every layer, and where it comes from.

Plans are checked on construction, so a plan that exists can be executed and
exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qinvert.errors import PlanError, QInvertError
from qinvert.files import read_bytes, write_atomically
from qinvert.html_table import html_table
from qinvert.plan.cost import plan_cost
from qinvert.plan.quantized_program import QuantizedProgram, construction
from qinvert.plan.serialization import from_bytes, to_bytes
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.program import Program

if TYPE_CHECKING:
    import torch

    from qinvert.proof.proof import Proof

M = TypeVar("M")

#: Largest plan file in bytes: 1,500 layers and heads take 15 MB.  Reading one takes 20 times as much.
MAX_PLAN: Final = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan(QuantizedProgram):
    """One layer's integer program, and where its numbers come from."""

    program: Program
    #: Largest magnitude of each tensor seen in calibration.
    ranges: Mapping[str, float] = field(default_factory=dict)
    #: Sample counts, expected sqnr, reasons.
    provenance: Mapping[str, Any] = field(default_factory=dict)
    #: What a chunk step does to value channels; None if values pass as they are.
    channels: ValueChannels | None = None

    def inverse(self, L: M, beta: Any = None, *, rounding: str = "onnx") -> M:  # noqa: N803 - the field's
        """``T = (I + L)^-1`` by the integer program, simulated bit-exactly.

        Parameters
        ----------
        L : tensor or array, shape ``(..., C, C)``
            Strictly lower triangular; any float dtype, quantized from float32.
        beta : tensor or array, shape ``(..., C)``, optional
            In [0, 2]; a factored program needs it, others ignore it.
        rounding : {"onnx", "hexagon", "tflite"}
            Whose rounding to simulate: that of ONNX, or for int8 graphs that of
            Qualcomm's Hexagon or of TFLite and Arm's Ethos-U, see
            `qinvert.numerics.hexagon` and `qinvert.numerics.tflite`.

        Returns
        -------
        tensor or array
            float32, dequantized, on L's device: a tensor for a tensor, an array
            for an array.

        Raises
        ------
        InputError
            See `qinvert.matrices.check_matrices` and `check_beta`.
        PlanError
            If that rounding is unknown, or not known for such a plan.
        ProgramError
            If the program does not compute an inverse.
        """
        from qinvert.simulation import inverse

        return inverse(self, L, beta, rounding)

    def step(
        self,
        q: M,
        k: M,
        v: M,
        g: M,
        beta: M,
        state: M | None = None,
        *,
        valid: M | None = None,
        normalize: bool = False,
        rounding: str = "onnx",
    ) -> tuple[M, M]:
        """``(o, state)`` of the whole chunk step by the integer program, simulated bit-exactly.

        Parameters
        ----------
        q, k : tensor or array, shape ``(B, H, T, Dk)``
            Scaled queries, and keys of norm 1; with ``normalize`` both as the layer has them.
        v : tensor or array, shape ``(B, H, T, Dv)``
        g : tensor or array, shape ``(B, H, T)`` or ``(B, H, T, Dk)``
            Log decay, at most 0.
        beta : tensor or array, shape ``(B, H, T)``
            Between 0 and the largest beta that the plan was made for.
        state : tensor or array, optional, shape ``(B, H, Dk, Dv)``
            What the call before returned; zeros by default.  Its integers go on as they are, but for
            two planes (int8x2), which one more rounding moves by a step in one value of a thousand.
        valid : tensor or array, optional, shape ``(B, T)``
            1 for tokens, 0 for padding, which changes no state.
        normalize : bool
            Divide q and k by their norms, and q by ``sqrt(Dk)``, in float32 first.
        rounding : {"onnx", "hexagon", "tflite"}
            As in `inverse`.

        Returns
        -------
        tuple
            o ``(B, H, T, Dv)`` and the state, float32, dequantized.  T may be any length; the last
            chunk is padded with tokens that change nothing.

        Raises
        ------
        InputError
            If shapes do not fit, or g or beta are not legal.
        PlanError
            If the grids of the state differ, or that rounding is not known for the plan.
        ProgramError
            If the plan holds an inverse only.
        """
        from qinvert.execution.step_inputs import step

        inputs = (q, k, v, g, beta, state)
        return step(self, self.channels, *inputs, valid=valid, normalize=normalize, rounding=rounding)

    def execute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every output of any program, simulated bit-exactly; see `qinvert.execution.simulator.execute`."""
        from qinvert.execution.simulator import execute

        return execute(self, inputs)

    def cost(self) -> int:
        """Work for one matrix in int8 multiply-accumulates; see `qinvert.plan.cost.plan_cost`."""
        return plan_cost(self)

    def proof(self, limit: float | Mapping[str, float] | None = None, max_beta: float = 1.0) -> Proof:
        """What holds for every input, derived from the plan; see `qinvert.proof.prove`.

        Parameters
        ----------
        limit : float or mapping, optional
            Guaranteed largest magnitude of the inputs, in real units: one number,
            such as the largest ``|M|``, or numbers by the names of inputs.
        max_beta : float
            Guaranteed largest beta.
        """
        from qinvert.proof.proof import prove

        return prove(self, limit, max_beta)

    def __str__(self) -> str:
        return f"{self.program.title} {self.formats}, requantize by {self.requantize}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """The layers of a model, each with its integer program."""

    layers: Mapping[str, LayerPlan]
    #: Export profile that the plan was made for.
    target: str
    #: Where the numbers come from: source, method, bits, seed.
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError("a plan needs at least one layer; calibrate on data that has matrices")
        for name in self.layers:
            if name.encode(errors="replace").decode() != name:
                raise PlanError(f"layer name {name!r} is not Unicode text (lone surrogate); rename the layer")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return construction(self)

    def layer(self, name: str | None = None) -> LayerPlan:
        """Return the layer of that name; None stands for the only layer.

        Raises
        ------
        PlanError
            If there is no such layer, or if there are several and no name is given.
        """
        if name is None and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        if not isinstance(name, str) or name not in self.layers:
            given = "no layer is named" if name is None else f"unknown layer {name!r}"
            raise PlanError(f"{given}; the plan has {_names(self.layers)}")
        return self.layers[name]

    def to_bytes(self) -> bytes:
        """Return the content of the plan's file; equal plans give equal bytes."""
        return to_bytes(self.layers, self.target, self.provenance)

    @staticmethod
    def from_bytes(content: bytes) -> Plan:
        """Read a plan from the content of its file.

        Raises
        ------
        PlanError
            If it is not a plan, has a newer schema, or is inconsistent.
        """
        document = from_bytes(content)
        layers = {}
        for name, fields in document.layers.items():
            try:
                layers[name] = LayerPlan(**fields)
            except PlanError as error:
                raise PlanError(f"layer {name!r}: {error}") from None
        return Plan(layers=layers, target=document.target, provenance=document.provenance)

    @property
    def sha256(self) -> str:
        """Hash of the plan's file content, which identifies the plan in exported graphs."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(path, self.to_bytes())

    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        PlanError
            If the file is missing, damaged or inconsistent, or has a newer schema.
        """
        try:
            return Plan.from_bytes(read_bytes(path, MAX_PLAN))
        except QInvertError as error:
            raise PlanError(f"{path}: {error}") from None

    def __str__(self) -> str:
        return "\n".join(f"{name}: {layer}" for name, layer in self.layers.items())

    def __repr__(self) -> str:
        missed = sum(layer.provenance.get("meets_goal") is False for layer in self.layers.values())
        goal = f", {missed} miss their goal" if missed else ""
        return f"<Plan for {self.target}: {len(self.layers)} entries{goal}>"

    def _repr_html_(self) -> str:
        rows = [
            [name, layer.program.title, layer.formats, _goal(layer)] for name, layer in self.layers.items()
        ]
        return html_table(f"Plan for {self.target}", ["layer", "program", "format", "goal"], rows)


def _goal(layer: LayerPlan) -> str:
    met = layer.provenance.get("meets_goal")
    return "not known" if met is None else "met" if met else f"missed: {layer.provenance.get('fix', '')}"


def _names(layers: Mapping[str, LayerPlan], limit: int = 8) -> str:
    names = list(layers)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
