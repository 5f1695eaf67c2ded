"""How numbers become integers: the grid of a tensor, and which grids a program's tensors may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qinvert.checks import check_member
from qinvert.errors import PlanError
from qinvert.formats import INT8, PLANE_RATIO, IntFormat
from qinvert.numerics import scales
from qinvert.program.step_list import StepList
from qinvert.program.steps import MOVES, Add, Concat, Multiply, Rescale, Slice, Subtract, Transpose

#: Steps that may read and write real numbers.
ON_FLOATS: Final = (Add, Concat, Multiply, Rescale, Slice, Subtract, Transpose)


class Requantize(StrEnum):
    """How an accumulator becomes an integer again: two chains of float32 roundings."""

    #: Residual terms join as float32, and the sum is divided by the output's scale: MatMulInteger,
    #: Cast, Mul, Add, QuantizeLinear.
    DIVIDE = "divide"
    #: Residual terms join as integers, and the sum is multiplied by one float32 factor:
    #: QLinearMatMul and fused QDQ MatMul.  Two partial products (int16) are rounded one by one,
    #: and then added.
    MULTIPLIER = "multiplier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Real value = ``(q - format.zero_point) * scale``.

    Invariant: ``scale`` is a float32 of at least `qinvert.numerics.scales.MIN_SCALE`.
    """

    #: Which integers are stored.
    format: IntFormat
    #: Real value of one step.
    scale: float

    def __post_init__(self) -> None:
        scales.check_scale(self.scale)
        if self.format.is_float and self.scale != 1:
            raise PlanError(f"scale {self.scale!r} of {self.format}, which is not rounded; use the scale 1")
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def limit(self) -> float:
        """Largest magnitude that the grid has with both signs."""
        return self.format.largest * self.scale

    @property
    def one(self) -> int:
        """Integer ``k`` with ``float32(1 / k) = scale``, which means 1.0; 0 if there is none.

        It may lie beyond the ends of the format.
        """
        integer = round(1 / self.scale)
        return integer if integer and scales.float32(1 / integer) == self.scale else 0

    @property
    def largest_one(self) -> int:
        """Largest integer that an operand can hold on its diagonal, whichever side it is on."""
        # An int16 right operand is split into int8 planes, which end earlier than int16.
        fmt = self.format
        return PLANE_RATIO * INT8.maximum if fmt.is_split else fmt.largest

    def __str__(self) -> str:
        return f"{self.format} s={self.scale:.4g}"


#: Grid of 0/1 constants: the integer 1 means 1.0.
CONSTANT_GRID: Final = Quantization(format=INT8, scale=1.0)


def constant_grid(partner: Quantization) -> Quantization:
    """Return the grid of a 0/1 constant in a sum with ``partner``.

    It is the partner's own where 1.0 is one of its integers, bit for bit: sums of
    one grid are exact in every kernel, and of one width.
    """
    fits = (
        partner.format.planes == 1
        and not partner.format.is_float
        and 0 < partner.one <= partner.format.maximum
    )
    return partner if fits and scales.product_scale(partner.one, partner.scale) == 1 else CONSTANT_GRID


def requantize_named(name: str) -> Requantize:
    """Return the member of that name.

    Raises
    ------
    PlanError
        If there is no such member; the message lists the legal names.
    """
    return check_member(Requantize, "requantize", name, PlanError)


def check_names(program: StepList, tensors: Mapping[str, Quantization]) -> None:
    """Refuse tensors that are not those of the program, or that are not on a symmetric grid.

    Raises
    ------
    PlanError
        With the tensor and the remedy.
    """
    missing = [name for name in program.tensors if name not in tensors]
    surplus = [name for name in tensors if name not in program.tensors]
    if missing or surplus:
        wrong = f"lacks {missing[0]!r}" if missing else f"has {surplus[0]!r}, which no step writes"
        raise PlanError(f"plan does not match its program {program.title}: it {wrong}; calibrate again")
    for name, quantization in tensors.items():
        if quantization.format.zero_point:
            raise PlanError(
                f"tensor {name!r}: format {quantization.format} has a zero point, but plans are symmetric; "
                "use int4, int8, int8x2 or int16 (profiles shift the grid on export)"
            )


def check_single_planes(tensors: Mapping[str, Quantization]) -> None:
    """Refuse formats of two planes, which one factor cannot requantize.

    Raises
    ------
    PlanError
        With the tensor and the remedy.
    """
    for name, quantization in tensors.items():
        fmt = quantization.format
        if fmt.planes > 1:
            raise PlanError(
                f"tensor {name!r}: one factor per product cannot requantize {fmt}; "
                "use int8 or int16, or requantize='divide'"
            )


def check_moves(program: StepList, tensors: Mapping[str, Quantization]) -> None:
    """Refuse steps that would move integers from one grid to another.

    Raises
    ------
    PlanError
        With the step, the tensor, and both grids.
    """
    for step in program.steps:
        if isinstance(step, MOVES):
            for name in step.inputs:
                if name in tensors and tensors[name] != tensors[step.output]:
                    raise PlanError(
                        f"step {step.output!r} moves {name!r} ({tensors[name]}) without rounding, but has "
                        f"{tensors[step.output]}; give both one quantization"
                    )


def check_floats(program: StepList, tensors: Mapping[str, Quantization]) -> None:
    """Refuse float32 where integers are multiplied: only elementwise steps and moves take it.

    Raises
    ------
    PlanError
        With the step, the tensor, and the remedy.
    """
    floats = {name for name, grid in tensors.items() if grid.format.is_float}
    if floats and program.is_inverse:
        raise PlanError(
            f"tensor {min(floats)!r} is float32, but an inverse is computed in integers; float32 is for the "
            "state of chunk steps"
        )
    for step in program.steps if floats else ():
        found = floats.intersection((*step.inputs, step.output))
        if found and not (isinstance(step, ON_FLOATS) and tensors.keys() >= {*step.inputs}):
            raise PlanError(
                f"step {step.output!r} ({type(step).__name__}) takes integers, but {min(found)!r} is "
                "float32; round it onto a grid of its own first; error_feedback=True does so"
            )
