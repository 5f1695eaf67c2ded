"""QDQ int16 with products of 16 by 16 bits, which Hexagon multiplies natively."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import INT8, INT16_WHOLE, UINT16
from qinvert.numerics.accumulators import WIDE_LIMIT
from qinvert.profiles._profile import Profile
from qinvert.profiles.hexagon_uint8 import PROFILE as UINT8_PROFILE

PROFILE: Profile = replace(
    UINT8_PROFILE,
    name="hexagon-int16",
    summary="int16 inside uint16 ends; one MatMul int16 x int16 per product",
    opset=21,
    formats=(INT16_WHOLE,),
    storage=INT8,
    ends={INT16_WHOLE.name: UINT16},
    proved=("onnxruntime", "qnn"),
    caveats="onnxruntime multiplies in float32; how Hexagon rounds products of 16 by 16 bits is not known",
    accumulator_limit=WIDE_LIMIT - 1,
)
