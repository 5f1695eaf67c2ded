from __future__ import annotations

from dataclasses import replace

import pytest
from step_plans import small_plan

from qinvert.errors import PlanError
from qinvert.formats import FLOAT32, INT4, INT8
from qinvert.methods import elimination
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import Add


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.1, float("nan"), float("inf"), 1e-31, 1e16, "1", None])
def test_a_quantization_needs_a_float32_scale_in_range(scale):
    with pytest.raises(PlanError, match="is not a float32 in"):
        Quantization(format=INT8, scale=scale)


def test_a_quantization_knows_its_limit_and_prints_itself():
    assert Quantization(format=INT8, scale=0.25).limit == 127 * 0.25
    assert Quantization(format=INT4, scale=0.25).limit == 7 * 0.25
    assert str(Quantization(format=INT8, scale=float32(1 / 127))) == "int8 s=0.007874"


REAL = Quantization(format=FLOAT32, scale=1.0)


def test_float32_has_no_other_scale_than_1():
    with pytest.raises(PlanError, match=r"scale 0.5 of float32, which is not rounded; use the scale 1"):
        Quantization(format=FLOAT32, scale=0.5)


@pytest.mark.parametrize("name", ["k", "v_new", "g", "state/read"])
def test_products_and_exponentials_take_no_float32(name):
    plan = small_plan(float_state=True).layer()
    with pytest.raises(PlanError, match=r"takes integers, but .* is float32; round it onto a grid") as error:
        replace(plan, tensors={**plan.tensors, name: REAL})
    assert "\n" not in str(error.value)


def test_inverses_take_no_float32():
    program = residuals_as_sums(elimination(8))
    grids = dict.fromkeys(program.tensors, Quantization(format=INT8, scale=1.0))
    name = next(step.output for step in program.steps if isinstance(step, Add))
    with pytest.raises(PlanError, match="is float32, but an inverse is computed in integers"):
        LayerPlan(program=program, tensors={**grids, name: REAL}, requantize=Requantize.DIVIDE)
