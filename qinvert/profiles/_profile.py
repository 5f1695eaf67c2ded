"""The type that every profile module fills in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qinvert.formats import IntFormat
from qinvert.plan import Requantize


class Lowering(StrEnum):
    """How products and sums appear in the graph."""

    #: QuantizeLinear and DequantizeLinear around float operators: compilers fuse them.
    QDQ = "qdq"
    #: MatMulInteger and int8 tensors: the literal integer program.
    INTEGER = "integer"


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
