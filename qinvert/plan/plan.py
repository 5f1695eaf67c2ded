"""A program with an integer format and a scale for every tensor.

`LayerPlan` is everything that the simulator and the exporter need to know
about one layer, and `Plan` is what `qinvert.calibrate` returns: one
`LayerPlan` per layer.  Both are checked on construction, so a plan that
exists can be executed and exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch

from qinvert.errors import PlanError
from qinvert.matrices import M, check_matrices, like
from qinvert.numerics import rounding, scales
from qinvert.numerics.accumulators import check_accumulator, operand_magnitudes, partial_products
from qinvert.plan.quantization import Quantization as Quantization
from qinvert.plan.quantization import Requantize as Requantize
from qinvert.plan.quantization import check_moves, check_names, check_single_planes, requantize_named
from qinvert.program.program import Program
from qinvert.program.steps import INPUT, MatMul, Scale

if TYPE_CHECKING:
    from qinvert.proof.proof import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer's integer program.

    Invariants: every tensor of the program has a quantization and no other
    name has one; tensors that slices, masks and concats connect share it;
    every accumulator fits int32; with `Requantize.MULTIPLIER`, residual terms
    are exact integers of the accumulator (see `residual_factor`).

    Raises
    ------
    PlanError
        At construction, naming the tensor and the remedy.
    """

    program: Program
    tensors: Mapping[str, Quantization]
    requantize: Requantize
    #: Largest magnitude of each tensor seen in calibration.
    ranges: Mapping[str, float] = field(default_factory=dict)
    #: Where the numbers come from: sample counts, expected sqnr, reasons.
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requantize", requantize_named(self.requantize))
        check_names(self.program, self.tensors)
        # In the program's order: equal plans must give equal files.
        ordered = {name: self.tensors[name] for name in self.program.tensors}
        object.__setattr__(self, "tensors", MappingProxyType(ordered))
        check_moves(self.program, self.tensors)
        if self.requantize is Requantize.MULTIPLIER:
            check_single_planes(self.tensors)
        for step in self.program.steps:
            if isinstance(step, MatMul):
                check_accumulator(self.accumulator_bound(step))
            if isinstance(step, (MatMul, Scale)) and self.requantize is Requantize.MULTIPLIER:
                self.multiplier(step)

    @property
    def chunk(self) -> int:
        """Size C of the matrices."""
        return self.program.chunk

    @property
    def input(self) -> Quantization:
        """Grid of M = -L, of K where the program is factored."""
        return self.tensors[INPUT]

    @property
    def output(self) -> Quantization:
        """Grid of the program's result."""
        return self.tensors[self.program.output]

    @property
    def formats(self) -> str:
        """Names of the formats in use, joined by ``+``."""
        return "+".join(dict.fromkeys(q.format.name for q in self.tensors.values()))

    def residual_factor(self, step: MatMul, term: str) -> int:
        """Accumulator steps that one step of the residual ``term`` is worth.

        ``left @ right + right = (left + I) @ right``: on left's grid the
        identity is the integer ``k`` with ``float32(1 / k) = scale(left)``, so
        the term enters the accumulator as ``k * q``, exactly.

        Raises
        ------
        PlanError
            If the term is neither operand, or the other operand's scale is
            no float32 reciprocal of an integer.
        """
        partner = step.left if term == step.right else step.right
        if term not in (step.left, step.right):
            raise PlanError(
                f"step {step.output!r}: residual {term!r} is no operand of the product; "
                "plan it with requantize='divide'"
            )
        grid = self.tensors[partner]
        if not grid.one:
            raise PlanError(
                f"step {step.output!r}: 1.0 is no integer on the grid of {partner!r} (scale {grid.scale!r}); "
                "use a scale 1/k or requantize='divide'"
            )
        return grid.one

    def identity_blocks(self, step: MatMul, term: str) -> list[int]:
        """Integers of one operand's format that add up to `residual_factor`."""
        partner = step.left if term == step.right else step.right
        largest = self.tensors[partner].largest_one
        full, rest = divmod(self.residual_factor(step, term), largest)
        return [largest] * full + [rest] * (rest > 0)

    def residual_planes(
        self, step: MatMul, term: str, values: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """What the residual ``term`` of integers ``values`` adds to each accumulator.

        ``k q`` in one accumulator; of two, with the right operand split into
        planes, ``k q_i`` for the right operand itself and ``k_i q`` for the
        left one.  Exact where ``dtype`` holds the accumulators.
        """
        right = self.tensors[step.right]
        if term == step.right:
            planes = rounding.operand_planes(values, right.scale, right.format)
            return [plane.to(dtype) * self.residual_factor(step, term) for plane, _ in planes]
        return [values.to(dtype) * factor for factor in self.identity_planes(step, term)]

    def identity_planes(self, step: MatMul, term: str) -> list[int]:
        """`residual_factor` by planes of the right operand, where the left operand is the ``term``."""
        right = self.tensors[step.right]
        blocks = torch.tensor(self.identity_blocks(step, term), dtype=torch.float32)
        planes = rounding.operand_planes(blocks, right.scale, right.format)
        return [int(plane.sum()) for plane, _ in planes]

    def multiplier(self, step: MatMul | Scale) -> float:
        """Factor from the step's accumulator to the integers of its output."""
        left, right = (step.left, step.right) if isinstance(step, MatMul) else step.inputs
        names = (left, right, step.output)
        return scales.multiplier(*(self.tensors[name].scale for name in names))

    def accumulator_bound(self, step: MatMul) -> int:
        """Largest magnitude of the step's accumulators, ``K * max|qa| * max|qb|`` plus residuals.

        From formats and shapes alone; `proof` follows the steps and finds less.
        """
        left = operand_magnitudes(self.tensors[step.left].format, right=False)
        right = operand_magnitudes(self.tensors[step.right].format, right=True)
        groups = partial_products(len(left), len(right))
        depth = self.program.shapes[step.left].columns
        bound = max(sum(depth * left[i] * right[j] for i, j in pairs) for pairs in groups)
        if self.requantize is Requantize.MULTIPLIER:
            for term in (*step.add, *step.subtract):
                extreme = torch.tensor([float(self.tensors[term].format.minimum)])
                planes = self.residual_planes(step, term, extreme, torch.float64)
                bound += max(int(plane.abs()) for plane in planes)
        return bound

    def inverse(self, L: M, beta: Any = None, *, rounding: str = "onnx") -> M:  # noqa: N803 - the field's
        """``T = (I + L)^-1`` by the integer program, simulated bit-exactly.

        Parameters
        ----------
        L : tensor or array, shape ``(..., C, C)``
            Strictly lower triangular; any float dtype, quantized from float32.
        beta : tensor or array, shape ``(..., C)``, optional
            In [0, 2]; a factored program needs it, others ignore it.
        rounding : {"onnx", "hexagon"}
            Whose integers: those that ONNX says, or those that Qualcomm's
            Hexagon makes of an int8 graph, see `qinvert.numerics.hexagon`.

        Returns
        -------
        tensor or array
            float32, dequantized, of the kind that was given; on L's device.

        Raises
        ------
        InputError
            See `qinvert.matrices.check_matrices` and `check_beta`.
        PlanError
            If that rounding is unknown, or not known of such a plan.
        """
        from qinvert.execution.inputs import needed_beta
        from qinvert.numerics.law import Rounding
        from qinvert.simulation import simulate_inverse

        chosen = Rounding.named(rounding)
        lower = check_matrices(L, self.chunk)
        beta = needed_beta(self.program, lower, beta)
        return cast("M", like(simulate_inverse(self, lower, beta=beta, rounding=chosen), L))

    def cost(self) -> int:
        """Work of one matrix in int8 multiply-accumulates; see `qinvert.plan.cost.plan_cost`."""
        from qinvert.plan.cost import plan_cost

        return plan_cost(self)

    def proof(self, limit: float | None = None, max_beta: float = 1.0) -> Proof:
        """What holds for every input, derived from the plan; see `qinvert.proof.prove`."""
        from qinvert.proof.proof import prove

        return prove(self, limit, max_beta)

    def __str__(self) -> str:
        return f"{self.program.title} {self.formats}, requantize by {self.requantize}"


@dataclass(frozen=True, slots=True, kw_only=True)
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
                raise PlanError(f"layer name {name!r} is no Unicode text (lone surrogate); rename the layer")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def layer(self, name: str | None = None) -> LayerPlan:
        """Return the layer of that name; None is the only layer.

        Raises
        ------
        PlanError
            If there is no such layer, or several and no name.
        """
        if name is None and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        if not isinstance(name, str) or name not in self.layers:
            given = "no layer named" if name is None else f"unknown layer {name!r}"
            raise PlanError(f"{given}; the plan has {_names(self.layers)}")
        return self.layers[name]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        from qinvert.plan.serialization import save

        save(self, path)

    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        PlanError
            If the file is missing, damaged, inconsistent, or of a newer schema.
        """
        from qinvert.plan.serialization import load

        return load(path)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {layer}" for name, layer in self.layers.items())


def _names(layers: Mapping[str, LayerPlan], limit: int = 8) -> str:
    names = list(layers)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
