"""The type that every profile module fills in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qinvert.formats import INT8, IntFormat
from qinvert.numerics.accumulators import FLOAT32_EXACT
from qinvert.plan.quantization import Requantize


class Lowering(StrEnum):
    """How products and sums appear in the graph."""

    #: QuantizeLinear and DequantizeLinear around float operators: compilers fuse them.
    QDQ = "qdq"
    #: MatMulInteger and int8 tensors: the literal integer program.
    INTEGER = "integer"
    #: As INTEGER, with QLinearMatMul where the plan requantizes by one factor.
    QLINEAR = "qlinear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rules of one export target."""

    #: Name on the command line and in plans.
    name: str
    #: One line for the table of profiles.
    summary: str
    #: How steps are lowered.
    lowering: Lowering
    #: ONNX operator set of the graph.
    opset: int
    #: Formats that tensors may have.
    formats: tuple[IntFormat, ...]
    #: Requantize form that back ends compute for this lowering.
    requantize: Requantize
    #: Operators that may appear in the graph.
    operators: frozenset[str]
    #: Runtimes on which graphs of this profile were compared with the simulator.
    proved: tuple[str, ...]
    #: What to know before using it.
    caveats: str
    #: How tensors of the int8 grid are stored: `INT8`, or `UINT8`, the same real values shifted by 128.
    storage: IntFormat = INT8
    #: How MatMulInteger takes its left operand, if not as stored.
    left_operand: IntFormat | None = None
    #: Whether every scale must be a power of two.
    power_of_two_scales: bool = False
    #: Operators that may, too, build L from keys, in float and before anything is quantized.
    prologue: frozenset[str] = frozenset({"Exp", "MatMul", "Mul", "Transpose"})
    #: Largest magnitude of an accumulator: what float32 holds exactly, for back ends
    #: that multiply in it.
    accumulator_limit: int = FLOAT32_EXACT

    @property
    def exact(self) -> bool:
        """Whether graphs equal the simulator bit for bit, whatever the scales."""
        return self.lowering is not Lowering.QDQ

    def storage_of(self, fmt: IntFormat) -> IntFormat:
        """Format whose container and zero point graphs have for values of a format."""
        return self.storage if fmt.container_bits == INT8.container_bits else fmt

    @property
    def stored(self) -> dict[str, int]:
        """ONNX element types of quantized tensors, each with its zero point."""
        wide = [fmt for fmt in self.formats if fmt.container_bits > INT8.container_bits]
        narrow = [self.storage] if len(wide) < len(self.formats) else []
        return {fmt.element: fmt.zero_point for fmt in (*narrow, *wide)}
