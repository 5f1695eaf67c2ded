"""The type that every profile module fills in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qinvert.checks import check_integer
from qinvert.errors import ExportError
from qinvert.formats import INT8, IntFormat
from qinvert.numerics.accumulators import FLOAT32_EXACT, INT32_LIMIT, WIDE_LIMIT
from qinvert.plan.quantization import Requantize

#: Largest operator set that is accepted; ONNX numbers its sets one by one and is far below.
MAX_OPSET: Final = 99
#: Names are words on the command line and in file names.
NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rules of one export target.

    Raises
    ------
    ExportError
        At construction, naming the field and what fits.
    """

    #: Name on the command line and in plans.
    name: str
    #: One line for the table of profiles.
    summary: str
    #: How steps are lowered: the name of a module of `qinvert.export.lowering`, such as ``qdq``.
    lowering: str
    #: Whether every tensor between operators must be quantized: compilers of QDQ graphs
    #: leave an operator in float where one is not.
    quantized_everywhere: bool
    #: Whether graphs equal the simulator bit for bit, for all scales.  Integer operators
    #: do; float operators leave the order of their sums open.
    exact: bool
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
    #: What a user must know before using it.
    caveats: str
    #: How tensors of the int8 grid are stored: `INT8`, or `UINT8`, the same real values shifted by 128.
    storage: IntFormat = INT8
    #: How tensors of more than 8 bits are stored, if not as their format says: `UINT16`.
    wide_storage: IntFormat | None = None
    #: Formats in which graphs take and return integers, by the name of the format inside: signed
    #: integers at the ends cost a conversion on some chips.  Others are stored as inside.
    ends: Mapping[str, IntFormat] = field(default_factory=dict, hash=False)
    #: Whether a mask is written out for every matrix of the batch: some chips multiply by a
    #: constant of full size in a tenth of the time that a repeated one takes.
    full_masks: bool = False
    #: Whether elementwise operators between quantized tensors may stay in IEEE float32: for a state that is
    #: carried so.
    float_state: bool = False
    #: Chip whose costs plans for this profile are compared by, see `qinvert.hardware`; empty where
    #: they are those of `qinvert.plan.cost`.
    hardware: str = ""
    #: Options that a session needs for the speed that is stated: ``name=value`` each.
    session_options: tuple[str, ...] = ()
    #: Format in which MatMulInteger takes its left operand; None for the stored one.
    left_operand: IntFormat | None = None
    #: Whether every scale must be a power of two.
    power_of_two_scales: bool = False
    #: Operators that are also allowed where L is built from keys, in float and before anything is quantized.
    prologue: frozenset[str] = frozenset({"Exp", "MatMul", "Mul", "Transpose"})
    #: Largest magnitude of an accumulator.  The default is what float32 holds exactly, for back
    #: ends that multiply in float32.
    accumulator_limit: int = FLOAT32_EXACT

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ExportError(f"profile name {self.name!r} is not lower-case words joined by '-'; rename it")
        if not self.lowering.isidentifier():
            raise ExportError(
                f"profile {self.name!r} has the lowering {self.lowering!r}, which does not name a module; "
                "use one such as 'qdq'"
            )
        if not self.formats or not self.operators:
            raise ExportError(f"profile {self.name!r} needs at least one format and one operator")
        widest = (WIDE_LIMIT if self.multiplies_wide else INT32_LIMIT) - 1
        for name, most in (("opset", MAX_OPSET), ("accumulator_limit", widest)):
            check_integer(name, getattr(self, name), 1, most, ExportError, f"; see profile {self.name!r}")

    def storage_of(self, fmt: IntFormat) -> IntFormat:
        """Return the format whose container and zero point graphs use for values of ``fmt``."""
        if fmt.is_float:
            return fmt
        if fmt.container_bits == INT8.container_bits:
            return self.storage
        return fmt if self.wide_storage is None else self.wide_storage

    def end_of(self, fmt: IntFormat) -> IntFormat:
        """Return the format whose container and zero point integers at the ends of graphs have."""
        return self.ends.get(fmt.name, self.storage_of(fmt))

    @property
    def multiplies_wide(self) -> bool:
        """Whether products of two operands of more than 8 bits are native."""
        return any(fmt.whole for fmt in self.formats)

    @property
    def stored(self) -> dict[str, int]:
        """ONNX element types of quantized tensors, each with its zero point."""
        wide = [self.storage_of(fmt) for fmt in self.formats if fmt.is_wide]
        narrow = [self.storage] if len(wide) < len(self.formats) else []
        return {fmt.element: fmt.zero_point for fmt in (*narrow, *wide, *self.ends.values())}
