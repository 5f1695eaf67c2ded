"""MatMulInteger u8 x s8: `int-ops` in the form that x86 CPUs multiply fastest."""

from __future__ import annotations

from dataclasses import replace

from qinvert.formats import UINT8
from qinvert.profiles._profile import Profile
from qinvert.profiles.int_ops import ON_OPENVINO
from qinvert.profiles.int_ops import PROFILE as INT_OPS

PROFILE: Profile = replace(
    INT_OPS,
    name="int-ops-x86",
    summary="int-ops as MatMulInteger u8 x s8: left operands are shifted by 128 inside the graph",
    operators=INT_OPS.operators | {"BitwiseXor"},
    caveats=(
        "exact on CPUs with VNNI; without it onnxruntime saturates sums of two products at 16 bits and most "
        f"values may be wrong: verify on the machine, or use int-ops; {ON_OPENVINO}"
    ),
    left_operand=UINT8,
)
