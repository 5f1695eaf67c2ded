from __future__ import annotations

import pytest

from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8
from qinvert.numerics.scales import float32
from qinvert.plan.quantization import Quantization


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.1, float("nan"), float("inf"), 1e-31, 1e16, "1", None])
def test_a_quantization_needs_a_float32_scale_in_range(scale):
    with pytest.raises(PlanError, match="is not a float32 in"):
        Quantization(format=INT8, scale=scale)


def test_a_quantization_knows_its_limit_and_prints_itself():
    assert Quantization(format=INT8, scale=0.25).limit == 127 * 0.25
    assert Quantization(format=INT4, scale=0.25).limit == 7 * 0.25
    assert str(Quantization(format=INT8, scale=float32(1 / 127))) == "int8 s=0.007874"
