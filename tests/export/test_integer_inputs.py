"""Graphs that take the integers of M: what a host hands over, for every profile."""

from functools import cache

import numpy as np
import onnx
import pytest
import torch

import qinvert
from qinvert.errors import ExportError, VerificationError
from qinvert.execution.simulator import simulate_integers
from qinvert.export import lint
from qinvert.export.exporting import build, serialize
from qinvert.export.functions import build_layers
from qinvert.export.reading import inlined
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.plan.plan import Plan
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

BITS = {"npu-qdq-int4": 4, "npu-qdq-int16": 16, "hexagon-int16": 16}
INTEGERS = {"input": "M", "input_type": "integers"}
LOWER = stress_matrices("correlated_keys", 8, 16)


@cache
def planned(profile, bits=None, method="block_merge"):
    # Powers of two: every profile is exact under them, but for the sums of 16 bits.
    return qinvert.calibrate(
        LOWER, method=method, target=profile, bits=bits or BITS.get(profile, 8), scales="pow2", min_sqnr_db=0
    )


def metadata(model):
    return {entry.key: entry.value for entry in model.metadata_props}


def integers_of(plan, profile, lower=LOWER):
    """-L on the plan's grid, rounded by NumPy, as the profile stores it at the ends."""
    grid = plan.layer().input
    end = PROFILES[profile].end_of(grid.format)
    nearest = np.rint(-lower.double().numpy() / grid.scale).clip(grid.format.minimum, grid.format.maximum)
    return (nearest + end.zero_point)[None].astype(end.element)


def run(model, feed):
    return open_session(serialize(model), threads=1).run(None, feed)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_integers_of_m_give_what_m_gives(profile):
    plan = planned(profile)
    for output in ("T", "integers"):
        floats = build(plan, batch=8, input="M", output=output)
        model = build(plan, batch=8, output=output, **INTEGERS)
        assert lint(model) == []
        (value,) = model.graph.input
        given = integers_of(plan, profile)
        assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == given.dtype
        (found,), (expected,) = run(model, {"M": given}), run(floats, {"M": -LOWER[None].numpy()})
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-uint8", "int-ops", "hexagon-uint8"])
def test_integers_go_in_and_out_as_the_simulator_has_them(profile):
    plan = planned(profile)
    model = build(plan, batch=8, output="integers", **INTEGERS)
    (found,) = run(model, {"M": integers_of(plan, profile)})
    zero = int(metadata(model)["qinvert.output_zero_point"])
    assert np.array_equal(
        found[0].astype(int) - zero, simulate_integers(plan.layer(), Systems(lower=LOWER)).numpy()
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_the_metadata_say_what_the_integers_mean(profile):
    plan = planned(profile)
    entries = metadata(build(plan, batch=8, **INTEGERS))
    assert entries["qinvert.input_type"] == "integers"
    scale, zero = float(entries["qinvert.input_scale"]), int(entries["qinvert.input_zero_point"])
    assert scale == plan.layer().input.scale
    real = scale * (integers_of(plan, profile).astype(np.float64) - zero)
    assert np.abs(real + LOWER.double().numpy()).max() <= scale / 2 + 1e-7
    floats = metadata(build(plan, batch=8, input="M"))
    assert not {key for key in floats if key.startswith("qinvert.input_")}


@pytest.mark.parametrize(
    "profile", ["npu-qdq-int8", "npu-qdq-int4", "hexagon-int16", "hexagon-uint8", "int-ops"]
)
def test_verify_gives_the_graph_matrices_on_the_grid(profile, tmp_path):
    plan = planned(profile)
    qinvert.export(plan, tmp_path / "s.onnx", output="integers", batch=4, **INTEGERS)
    for result in qinvert.verify(tmp_path / "s.onnx", plan, LOWER):
        assert result.mismatches == 0 or not result.exact
        assert result.values == LOWER.numel()
        # The error is that of the matrix which was given: half a step of M is part of it.
        grid = plan.layer().input
        on_grid = (LOWER.double() / grid.scale).round() * grid.scale
        near = qinvert.simulate(plan, on_grid.float()).layers["layer"].sqnr_db
        assert result.sqnr_db == pytest.approx(near, abs=0.1)


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "int-ops"])
def test_a_wrong_scale_makes_verify_fail(profile, tmp_path):
    plan = planned(profile)
    model = qinvert.export(plan, tmp_path / "s.onnx", batch=8, **INTEGERS)
    wrong = next(
        tensor
        for tensor in model.graph.initializer
        if tensor.name.startswith("scale/")
        and not tensor.dims
        and any(tensor.name in node.input for node in model.graph.node if node.op_type != "QuantizeLinear")
    )
    value = onnx.numpy_helper.to_array(wrong) * np.float32(2)
    wrong.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.float32), wrong.name))
    onnx.save(model, tmp_path / "s.onnx")
    with pytest.raises(VerificationError, match=r"in \d+ of 2048 values"):
        qinvert.verify(tmp_path / "s.onnx", plan, LOWER)


def test_functions_of_layers_take_integers():
    plan = planned("npu-qdq-int8")
    model = build_layers(Plan(layers={"a": plan.layer()}, target=plan.target), batch=8, **INTEGERS)
    assert lint(inlined(model)) == []
    given = integers_of(plan, "npu-qdq-int8")
    (found,), (expected,) = run(model, {"a/M": given}), run(build(plan, **INTEGERS), {"M": given})
    assert np.array_equal(found, expected)


def test_two_planes_are_not_one_tensor():
    with pytest.raises(
        ExportError, match=r"input_type='integers' needs one tensor, but the plan's M is int8x2"
    ):
        build(planned("int-ops", "8x2"), **INTEGERS)


def test_factored_plans_divide_m_and_take_floats():
    lower, beta = LOWER, torch.ones(8, 16)
    plan = qinvert.calibrate((lower, beta), method="block_merge", factored=True, min_sqnr_db=0)
    with pytest.raises(
        ExportError, match=r"'integers' does not fit block_merge.*divides M by beta in float32"
    ):
        build(plan, **INTEGERS)


@pytest.mark.parametrize("given", ["L", "keys"])
def test_only_m_is_a_tensor_of_the_program(given):
    options = {"key_size": 16} if given == "keys" else {}
    with pytest.raises(ExportError, match=f"input_type 'integers' needs input='M', not '{given}'"):
        build(planned("npu-qdq-int8"), input=given, input_type="integers", **options)


def test_another_type_is_unknown():
    with pytest.raises(ExportError, match="input_type 'int8' is unknown; use float32 or integers"):
        build(planned("npu-qdq-int8"), input="M", input_type="int8")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_program_that_returns_its_input_copies_the_integers(profile, tmp_path):
    lower = stress_matrices("small_random", 4, 16)
    first = qinvert.neumann(16, order=1)
    plan = qinvert.calibrate(lower, method=first, bits=BITS.get(profile, 8), target=profile, min_sqnr_db=0)
    file = tmp_path / "t.onnx"
    qinvert.export(plan, file, batch=4, input="M", input_type="integers", output="integers")
    results = qinvert.verify(file, plan, lower)
    assert results
    assert all(result.mismatches == 0 for result in results)
