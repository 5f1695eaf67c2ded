from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

import qinvert
from qinvert.errors import ExportError, PlanError
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import RUNTIMES
from qinvert.formats import INT8X2
from qinvert.plan.quantization import Requantize
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

#: Values that may differ, by (profile, scales): none where the graph is exact.
PROMISES = {
    ("int-ops-x86", "float"): 0.0,
    ("qlinear", "float"): 0.0,
    ("qlinear-uint8", "float"): 0.0,
    ("npu-qdq-uint8", "pow2"): 0.0,
    ("npu-qdq-uint8", "float"): 1e-4,
    ("ryzen-xint8", "auto"): 0.0,
}
LOWER = stress_matrices("correlated_keys", 8, 16)
CORRECTED = qinvert.block_merge(16, base=4, corrections=1)


@pytest.mark.parametrize(("profile", "scales"), PROMISES)
@pytest.mark.parametrize(
    ("method", "chunk", "count"),
    [("auto", 16, 352), ("auto", 32, 88), ("auto", 64, 22), ("auto", 128, 6), ("corrected", 32, 88)],
)
def test_onnxruntime_equals_the_simulator(profile, scales, method, chunk, count, everything, agree):
    # More than 1e6 values each, optimized and not.
    lower, share = everything(chunk, count), PROMISES[profile, scales]
    program = qinvert.block_merge(chunk, base=4, corrections=1) if method == "corrected" else method
    plan = qinvert.calibrate(lower[::16], method=program, target=profile, scales=scales)
    agree(plan, lower, share, f"{profile} {scales} {method} C={chunk}")


def types(model):
    model = onnx.shape_inference.infer_shapes(model)
    known = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    known |= {t.name: t.data_type for t in model.graph.initializer}
    return {name: onnx.helper.tensor_dtype_to_np_dtype(t).name for name, t in known.items()}


def initializers(model):
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def nodes(model, operator):
    return [node for node in model.graph.node if node.op_type == operator]


@pytest.mark.parametrize("bits", [4, 8, "8x2"])
def test_x86_products_take_uint8_from_the_left_and_int8_from_the_right(bits):
    plan = qinvert.calibrate(LOWER, method=CORRECTED, bits=bits, target="int-ops-x86", min_sqnr_db=0)
    model = build(plan)
    kinds, constants = types(model), initializers(model)
    products = nodes(model, "MatMulInteger")
    assert len(products) == len(nodes(build(plan, profile="int-ops"), "MatMulInteger")) > 0
    for node in products:
        assert [kinds[name] for name in node.input] == ["uint8", "int8", "uint8", "int8"]
        assert [int(constants[name]) for name in node.input[2:]] == [128, 0]


@pytest.mark.parametrize("bits", [4, 8, "8x2"])
@pytest.mark.parametrize("size", [1, 20])
def test_x86_graphs_equal_int_ops_even_where_everything_saturates(bits, size, tmp_path):
    plan = qinvert.calibrate(LOWER, method=CORRECTED, bits=bits, target="int-ops-x86", min_sqnr_db=0)
    qinvert.export(plan, tmp_path / "t.onnx")
    for result in qinvert.verify(tmp_path / "t.onnx", plan, size * LOWER):
        assert result.exact
        assert result.mismatches == 0


def test_qlinear_multiplies_int8_to_int8_and_nothing_else():
    plan = qinvert.calibrate(LOWER, method=CORRECTED, target="qlinear")
    assert plan.layer().requantize is Requantize.MULTIPLIER
    model = build(plan)
    kinds, constants = types(model), initializers(model)
    products = {node.output[0]: node for node in nodes(model, "QLinearMatMul")}
    steps = [step for step in plan.layer().program.steps if type(step).__name__ == "MatMul"]
    assert sorted(products) == sorted(step.output for step in steps)
    assert nodes(model, "MatMulInteger") == nodes(model, "MatMul") == []
    for step in steps:
        node = products[step.output]
        scales = [plan.layer().tensors[name].scale for name in (step.left, step.right, step.output)]
        assert [float(constants[node.input[i]]) for i in (1, 4, 6)] == scales
        assert {kinds[node.input[i]] for i in (0, 3)} == {kinds[step.output]} == {"int8"}


@pytest.mark.parametrize(
    "method",
    [qinvert.block_merge(16, layout="masked"), qinvert.elimination(16), qinvert.elimination(16, tile=4)],
)
def test_unsigned_graphs_store_uint8_and_mask_it_without_arithmetic(method):
    plan = qinvert.calibrate(LOWER, method=method, target="qlinear-uint8", min_sqnr_db=0)
    model, signed = build(plan), build(plan, profile="qlinear")
    kinds, constants = types(model), initializers(model)
    assert {kinds[n] for node in nodes(model, "QLinearMatMul") for n in node.output} == {"uint8"}
    # T is the one float that an identity may be added to, where 1.0 is not exact on its grid.
    assert [node.output[0] for node in nodes(model, "Add")] in ([], ["T"])
    assert nodes(model, "BitwiseAnd") == []
    masks, bits = nodes(model, "Where"), nodes(signed, "BitwiseAnd")
    assert len(masks) == len(bits)
    for mask, bit in zip(masks, bits, strict=True):
        assert np.array_equal(constants[mask.input[0]], initializers(signed)[bit.input[1]] != 0)
        assert int(constants[mask.input[2]]) == 128
    for node in nodes(model, "Max"):
        bound = constants[node.input[1]]
        assert set(np.unique(bound)) == {0, bound.max()}
        assert bound.max() > 128


def test_unsigned_graphs_multiply_and_add_what_qlinear_does(everything, tmp_path):
    lower = everything(16, 40)
    for method in ("newton_schulz", "banded_residual", qinvert.elimination(16, corrections=1)):
        plan = qinvert.calibrate(lower[::5], method=method, target="qlinear-uint8", min_sqnr_db=0)
        for output in ("T", "integers"):
            qinvert.export(plan, tmp_path / "t.onnx", batch=40, output=output)
            results = qinvert.verify(tmp_path / "t.onnx", plan, 2 * lower)
            assert all(r.exact and r.mismatches == 0 for r in results)


def test_qlinear_keeps_the_divide_form_as_it_is(everything, tmp_path):
    lower = everything(16, 40)
    plan = qinvert.calibrate(lower[::5], method="newton_schulz", target="qlinear")
    assert plan.layer().requantize is Requantize.DIVIDE
    model = qinvert.export(plan, tmp_path / "t.onnx", batch=40)
    assert nodes(model, "QLinearMatMul") == []
    assert all(r.exact and r.mismatches == 0 for r in qinvert.verify(tmp_path / "t.onnx", plan, lower))


@pytest.mark.parametrize("method", ["auto", "newton_schulz", "banded_residual"])
def test_uint8_graphs_are_int8_graphs_shifted_by_128(method):
    plan = qinvert.calibrate(LOWER, method=method, target="npu-qdq-int8")
    shifted, plain = build(plan, profile="npu-qdq-uint8"), build(plan)
    assert Counter(n.op_type for n in shifted.graph.node) == Counter(n.op_type for n in plain.graph.node)
    kinds = types(shifted)
    stored = [n.output[0] for n in nodes(shifted, "QuantizeLinear")]
    stored += [n.input[0] for n in nodes(shifted, "DequantizeLinear")]
    assert {kinds[name] for name in stored} == {"uint8"}
    uint8 = {k.removesuffix("/uint8"): v for k, v in initializers(shifted).items() if v.dtype == np.uint8}
    int8 = {k.removesuffix("/int8"): v for k, v in initializers(plain).items() if v.dtype == np.int8}
    assert len(uint8) == len(int8) > 1
    for name, values in int8.items():
        assert np.array_equal(uint8[name].astype(int) - 128, values.astype(int)), name


def test_uint8_and_int8_graphs_return_the_same_values():
    plan = qinvert.calibrate(LOWER, scales="pow2")
    results = []
    for profile in ("npu-qdq-int8", "npu-qdq-uint8"):
        content = serialize(build(plan, profile=profile))
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"L": 3 * LOWER[None].numpy()})[0])
    assert np.array_equal(*results)
    assert np.array_equal(results[0][0], plan.layer().inverse(3 * LOWER).numpy())


def test_xint8_plans_powers_of_two_by_itself():
    plan = qinvert.calibrate(LOWER, target="ryzen-xint8")
    assert {np.frexp(q.scale)[0] for q in plan.layer().tensors.values()} == {0.5}
    assert plan.provenance["scales"] == "pow2"
    assert qinvert.calibrate(LOWER).provenance["scales"] == "float"
    model = build(plan)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    used = {node.input[1] for op in ("QuantizeLinear", "DequantizeLinear") for node in nodes(model, op)}
    constants = initializers(model)
    assert {float(np.frexp(constants[name])[0]) for name in used} == {0.5}


def test_xint8_refuses_other_scales_and_says_what_to_do(tmp_path):
    with pytest.raises(PlanError, match=r"'ryzen-xint8' takes power-of-two scales only.*scales='pow2'"):
        qinvert.calibrate(LOWER, target="ryzen-xint8", scales="float")
    plan = qinvert.calibrate(LOWER)
    with pytest.raises(ExportError, match=r"power-of-two scales only; tensor 'M' has .*scales='pow2'"):
        qinvert.export(plan, tmp_path / "t.onnx", profile="ryzen-xint8")
    factors = qinvert.calibrate(LOWER, method="newton_schulz", target="ryzen-xint8")
    with pytest.raises(
        ExportError, match=r"step 'iteration_2/dM' has the factor .*another profile or method"
    ):
        qinvert.export(factors, tmp_path / "t.onnx")
    assert list(tmp_path.iterdir()) == []


def test_profiles_say_that_two_planes_differ_on_openvino():
    # Some values in 100,000 lie one step off where scales are no powers of two; `verify` refuses them.
    both = [p for p in PROFILES.values() if INT8X2 in p.formats and "openvino" in p.proved]
    assert [p.name for p in both] == ["int-ops", "int-ops-x86"]
    assert all("int8x2 is proved there for scales='pow2' only" in p.caveats for p in both)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_profile_says_what_it_is(profile):
    assert profile.summary
    assert profile.caveats
    assert "onnxruntime" in profile.proved
    assert set(profile.proved) <= set(RUNTIMES)
    assert set(profile.stored) <= {"int8", "uint8", "int16", "uint16"}
    assert "Pad" not in profile.operators


def test_what_profiles_call_proved_was_measured(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "runtimes.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:3] == "| `"
    ]
    for name, profile in PROFILES.items():
        for runtime in profile.proved:
            own = [row for row in rows if row[0] == f"`{name}`" and row[2].split(" ")[0] == runtime]
            assert own, f"{name} on {runtime} is not in docs/runtimes.md: make measure"
            for row in own:
                assert row[3].startswith("compiled")
                assert "differs" not in row[5]
