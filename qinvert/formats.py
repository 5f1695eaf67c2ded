"""Integer formats of a quantized tensor, as data.

A format describes the integers; the scale that turns them into real numbers
belongs to each tensor (`qinvert.plan.quantization.Quantization`).  All formats but
`UINT8` and `UINT16` are symmetric: their zero point is 0, because this is the only 8-bit
form that every NPU compiler we tried multiplies natively.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qinvert.errors import PlanError, lookup

#: One step of the high plane is this many steps of the low one.  Each pair of int8
#: planes then means a different integer.
PLANE_RATIO: Final = 256
#: Bits of the widest operand that every target multiplies.
NARROW_BITS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class IntFormat:
    """Values ``q`` with ``minimum <= q <= maximum``, meaning ``(q - zero_point) * scale``.

    Invariants: ``minimum <= zero_point <= maximum``, and all values fit the
    container.
    """

    #: Name in plans and on the command line.
    name: str
    #: Bits of one container, 8 or 16.
    container_bits: int
    #: Smallest integer that is stored; quantize saturates here.
    minimum: int
    #: Largest integer that is stored; quantize saturates here.
    maximum: int
    #: Integer that means 0.0.
    zero_point: int = 0
    #: Containers per value; with 2 the integer is ``PLANE_RATIO * high + low``.
    planes: int = 1
    #: Whether a right operand of more than 8 bits enters a product as it is, and not as two int8
    #: planes: for targets that multiply 16 by 16 bits.
    whole: bool = False
    #: Whether values are real numbers that nothing rounds: a float in the container, on the scale 1.
    is_float: bool = False

    def __post_init__(self) -> None:
        if not self.minimum <= self.zero_point <= self.maximum:
            raise PlanError(
                f"format {self.name}: zero point {self.zero_point} lies outside "
                f"[{self.minimum}, {self.maximum}]; choose one inside"
            )
        if not self.is_float and self.maximum - self.minimum >= 2 ** (self.container_bits * self.planes):
            raise PlanError(
                f"format {self.name}: [{self.minimum}, {self.maximum}] does not fit "
                f"{self.container_bits} bits; use a wider container"
            )

    @property
    def largest(self) -> int:
        """Largest magnitude that exists on both sides of zero; a range maps onto it."""
        return min(self.maximum - self.zero_point, self.zero_point - self.minimum)

    @property
    def magnitude(self) -> int:
        """Largest ``|q - zero_point|`` that can occur, saturation included."""
        return max(self.maximum - self.zero_point, self.zero_point - self.minimum)

    @property
    def bytes(self) -> int:
        """Bytes of one value, all of its planes together."""
        return self.planes * self.container_bits // 8

    @property
    def is_wide(self) -> bool:
        """Whether one container has more than 8 bits."""
        return self.container_bits > NARROW_BITS

    @property
    def is_split(self) -> bool:
        """Whether a right operand of this format must be rounded onto two int8 planes."""
        return self.is_wide and not self.whole and not self.is_float

    @property
    def element(self) -> str:
        """ONNX and NumPy name of the container's type."""
        kind = "float" if self.is_float else "int" if self.minimum < 0 else "uint"
        return f"{kind}{self.container_bits}"

    def __str__(self) -> str:
        return self.name


#: 4-bit values in an int8 container: no runtime multiplies int4 activations.
INT4 = IntFormat(name="int4", container_bits=8, minimum=-7, maximum=7)
#: OpenVINO, QNN, RKNN, Vela and TensorRT multiply it natively.
INT8 = IntFormat(name="int8", container_bits=8, minimum=-128, maximum=127)
#: The grid of `INT8` shifted by 128: the same real values, but faster on x86 CPUs.
UINT8 = IntFormat(name="uint8", container_bits=8, minimum=0, maximum=255, zero_point=128)
#: Right operands are split: products int16 x int8 are native on every target of 16 bits.
INT16 = IntFormat(name="int16", container_bits=16, minimum=-32768, maximum=32767)
#: The grid of `INT16` on targets that multiply 16 by 16 bits, with wider accumulators (Hexagon).
INT16_WHOLE = IntFormat(name="int16-whole", container_bits=16, minimum=-32768, maximum=32767, whole=True)
#: The grid of `INT16` shifted by 32768: the same real values, for the ends of graphs.
UINT16 = IntFormat(name="uint16", container_bits=16, minimum=0, maximum=65535, zero_point=32768)
#: Two int8 planes, ``256 * high + low``: about 15 bits from int8 products only.
INT8X2 = IntFormat(
    name="int8x2",
    container_bits=8,
    minimum=PLANE_RATIO * INT8.minimum + INT8.minimum,
    maximum=PLANE_RATIO * INT8.maximum + INT8.maximum,
    planes=2,
)

#: Largest float32, as an integer.
_LARGEST_FLOAT: Final = (2**24 - 1) * 2**104
#: Real numbers as they are, for a state that goes from chunk to chunk: elementwise operators read and write
#: it in IEEE float32, and products read what is rounded from it.
FLOAT32 = IntFormat(
    name="float32", container_bits=32, minimum=-_LARGEST_FLOAT, maximum=_LARGEST_FLOAT, is_float=True
)

#: Every integer format by its name.
FORMATS: dict[str, IntFormat] = {f.name: f for f in (INT4, INT8, UINT8, INT16, INT16_WHOLE, UINT16, INT8X2)}


def find_format(name: str) -> IntFormat:
    """Return the format of that name.

    Raises
    ------
    PlanError
        If there is no such format; the message lists the legal names.
    """
    return lookup({**FORMATS, FLOAT32.name: FLOAT32}, name, "format", PlanError)
