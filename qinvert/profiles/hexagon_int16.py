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
        "onnxruntime multiplies in float32; Hexagon cuts 16 bits off every sum, which is several steps of "
        "the result: simulate --rounding hexagon says what is left. verify compares bit for bit on qnn where "
        "integers go in and out, and residual terms are sums on one grid"
    ),
    accumulator_limit=WIDE_LIMIT - 1,
)
