"""QDQ uint8 and uint16 inside, for chunk steps whose values have 16 bits on Hexagon."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import UINT16
from qinvert.profiles._profile import Profile
from qinvert.profiles.hexagon_int16 import PROFILE as INT16_PROFILE

PROFILE: Profile = replace(
    INT16_PROFILE,
    name="hexagon-uint16",
    summary="hexagon-uint8, and uint16 inside: products of 16 by 8 bits in chunk steps",
    ends={},
    proved=("onnxruntime", "qnn"),
    caveats=(
        "as hexagon-int16; Qualcomm's compiler did not finalize chunk steps with signed int16 products, and "
        "took those of uint16 with the zero point 32768; layout='channels_first' takes the fewest cycles"
    ),
    wide_storage=UINT16,
)
