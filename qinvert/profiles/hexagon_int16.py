"""QDQ int16 with products of 16 by 16 bits, which Hexagon multiplies natively."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT8, INT16_WHOLE, UINT16
from qinvert.numerics.accumulators import WIDE_LIMIT
from qinvert.profiles._profile import Profile
from qinvert.profiles.hexagon_uint8 import PROFILE as UINT8_PROFILE

PROFILE: Profile = replace(
    UINT8_PROFILE,
    float_state=False,
    name="hexagon-int16",
    summary="hexagon-uint8, and int16 inside uint16 ends: products int16 x int16",
    opset=21,
    formats=(INT8, INT16_WHOLE),
    ends={INT16_WHOLE.name: UINT16},
    proved=("onnxruntime",),
    caveats=(
        "onnxruntime multiplies in float32; how Hexagon rounds products of 16 by 16 bits is not known: in "
        "its emulator T has 54 to 57 dB by left eliminations and 61 to 65 dB by right ones, where the "
        "integers of the plan have 73"
    ),
    accumulator_limit=WIDE_LIMIT - 1,
)
