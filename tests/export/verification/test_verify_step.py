"""Step graphs on onnxruntime: every value is the simulator's, call after call."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from chunk_layers import small_layer
from onnx import numpy_helper
from step_plans import small_plan

import qinvert
from qinvert.calibration.choices import RangeRule
from qinvert.calibration.chunk_steps.candidate import plan_layer
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.chunk_step.channel_map import channel_factors, rotation
from qinvert.errors import ExportError, InputError, QInvertError, VerificationError
from qinvert.execution.value_channels import enter, leave
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import RUNTIMES, execute_sequences
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.step_graph import step_interface
from qinvert.export.step_reading import read_step_interface
from qinvert.export.verification.step_inputs import step_data
from qinvert.export.verification.step_samples import step_samples
from qinvert.export.verification.verify_step import step_tolerance
from qinvert.formats import INT4, INT8X2, INT16, INT16_WHOLE
from qinvert.plan.plan import Plan
from qinvert.plan.value_channels import ValueChannels
from qinvert.profiles import PROFILES, find_profile

CPU = RUNTIMES["onnxruntime"]
SIZES = {"batch": 2, "heads": 3, "chunks": 2}
INTEGERS = {"input_type": "integers", "output": "integers"}
EQUALIZED = ValueChannels(exponents=tuple(tuple((i + j) % 4 - 2 for j in range(12)) for i in range(3)))


def planned(profile, channels=None, **options):
    plan = small_plan(profile, **options)
    return Plan(layers={"layer": replace(plan.layer(), channels=channels)}, target=profile)


def samples(plan, calls=3, **options):
    interface = step_interface(plan.layer(), options)
    return step_samples(plan.layer(), interface, calls)


@pytest.fixture
def verified(tmp_path):
    """Return a function that exports a plan and verifies the graph on samples, or on what it is given."""

    def check(plan, given=None, **options):
        options = {**SIZES, **options}
        qinvert.export(plan, tmp_path / "step.onnx", **options)
        return qinvert.verify(tmp_path / "step.onnx", plan, given or samples(plan, **options))

    return check


EXACT = [
    *(
        ("int-ops", {"form": form, "decay": decay})
        for form in ("folded", "wy", "state")
        for decay in ("scalar", "channel")
    ),
    ("int-ops", {"values_first": False, "halves": True}),
    ("int-ops", {"halves": True, "form": "state"}),
    ("int-ops", {"wide": INT8X2, "logs": INT8X2}),
    ("int-ops", {"wide": INT8X2, "logs": INT8X2, "error_feedback": True}),
    ("int-ops", {"wide": INT8X2, "form": "state", "error_feedback": True, "values_first": False}),
    ("qlinear", {"form": "wy", "error_feedback": True}),
    ("int-ops-x86", {}),
    *(("qlinear", {"form": form}) for form in ("folded", "wy", "state")),
    ("qlinear", {"decay": "channel", "values_first": False}),
    ("qlinear-uint8", {"halves": True}),
    ("npu-qdq-int8", {"pow2": True}),
    ("npu-qdq-int8", {"pow2": True, "decay": "channel", "form": "wy", "values_first": False}),
    ("npu-qdq-uint8", {"pow2": True, "form": "state"}),
    ("hexagon-uint8", {"pow2": True, "halves": True}),
    ("int-ops", {"float_state": True}),
    ("int-ops", {"float_state": True, "wide": INT8X2, "logs": INT8X2, "values_first": False}),
    ("qlinear", {"float_state": True, "form": "wy"}),
    ("qlinear-uint8", {"float_state": True, "decay": "channel"}),
    ("npu-qdq-int8", {"float_state": True, "pow2": True, "form": "state"}),
    ("npu-qdq-uint8", {"float_state": True, "pow2": True, "halves": True}),
    ("ryzen-xint8", {"pow2": True, "decay": "channel"}),
    ("ryzen-xint8", {"pow2": True, "form": "state", "values_first": False}),
]


@pytest.mark.parametrize(("profile", "options"), EXACT, ids=str)
def test_onnxruntime_computes_the_simulators_integers(verified, profile, options):
    for result in verified(planned(profile, **options), states="every"):
        assert result.exact
        assert result.mismatches == 0
        assert result.values > 0


@pytest.mark.parametrize("profile", ["int-ops", "int-ops-x86"])
@pytest.mark.parametrize("names", [("D", "T"), ("q", "rhs", "v_new", "state")], ids="-".join)
def test_tensors_of_4_bits_beside_8_are_the_simulators(verified, profile, names):
    layer = small_layer()
    rules = replace(layer.rules, wide=None, equal_widths=False, requantize=PROFILES[profile].requantize)
    four = replace(layer, rules=rules, widths=width_groups(layer.program, names))
    plan = plan_layer(four, (), None, RangeRule.MSE)
    held = {name for name, grid in plan.tensors.items() if grid.format == INT4}
    assert {*names} <= held < {*plan.tensors}
    for result in verified(Plan(layers={"layer": plan}, target=profile), states="every"):
        assert result.exact
        assert result.mismatches == 0
        assert result.values > 0


@pytest.mark.parametrize("options", [{"channels": EQUALIZED}, {"channels": None}], ids=["equalized", "plain"])
@pytest.mark.parametrize("layout", ["tokens_first", "values_first"])
@pytest.mark.parametrize("ends", [{}, INTEGERS], ids=["float", "integers"])
def test_ends_layouts_and_channels_change_no_integer(verified, ends, layout, options):
    results = verified(planned("int-ops", **options), layout=layout, **ends)
    assert [result.mismatches for result in results] == [0] * 4
    assert all(result.exact for result in results)


NEAR = [
    ("npu-qdq-int8", {}),
    ("npu-qdq-uint8", {"form": "wy"}),
    ("hexagon-uint8", {"decay": "channel"}),
    ("npu-qdq-int16", {"wide": INT16, "logs": INT16}),
    ("npu-qdq-int16", {"wide": INT16, "logs": INT16, "values_first": False}),
    ("npu-qdq-int16", {"wide": INT16, "logs": INT16, "error_feedback": True}),
    ("npu-qdq-int16", {"wide": INT16, "logs": INT16, "float_state": True}),
    ("hexagon-uint16", {"wide": INT16_WHOLE, "logs": INT16_WHOLE, "error_feedback": True}),
    ("hexagon-int16", {"wide": INT16_WHOLE, "logs": INT16_WHOLE, "decay": "channel"}),
    ("hexagon-uint16", {"wide": INT16_WHOLE, "logs": INT16_WHOLE}),
    ("hexagon-uint16", {"wide": INT16_WHOLE, "logs": INT16_WHOLE, "form": "state", "halves": True}),
]


@pytest.mark.parametrize(("profile", "options"), NEAR, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_float_products_stay_near(verified, profile, options):
    for result in verified(planned(profile, **options)):
        assert not result.exact
        assert result.mismatches <= 0.05 * result.values
        assert result.max_steps <= 8
        assert result.sqnr_db > 10


@pytest.mark.parametrize("profile", ["int-ops", "npu-qdq-int8"])
def test_norms_and_rotations_are_those_of_the_runtime(tmp_path, profile):
    # 16 channels, as Hadamard matrices have a power of two.
    from step_plans import step_plan

    from qinvert import elimination, gated_delta_step

    program = gated_delta_step(elimination(8), 4, 16)
    channels = ValueChannels(exponents=((0, 1) * 8, (-1, 0) * 8), rotated=True)
    layer = step_plan(program, find_profile(profile).requantize, channels=channels)
    plan = Plan(layers={"layer": layer}, target=profile)
    for layout in ("tokens_first", "values_first"):
        options = {"heads": 2, "chunks": 2, "normalize": True, "layout": layout}
        qinvert.export(plan, tmp_path / "step.onnx", **options)
        for result in qinvert.verify(tmp_path / "step.onnx", plan, samples(plan, **options)):
            assert not result.exact
            assert result.mismatches <= 0.01 * result.values


@pytest.mark.parametrize("profile", ["int-ops", "npu-qdq-int8"])
def test_a_state_in_float32_leaves_as_it_is_in_every_layout_and_chain(verified, profile):
    plan = planned(profile, EQUALIZED, float_state=True, pow2=True)
    for layout, chains in (("tokens_first", 6), ("channels_first", 1)):
        results = verified(plan, layout=layout, chains=chains, **INTEGERS)
        assert [result.mismatches for result in results] == [0] * 4
        assert all(result.exact for result in results)


def test_fused_sums_of_a_state_in_float32_are_not_promised():
    plan, profile = planned("int-ops", float_state=True).layer(), PROFILES["int-ops"]
    fusing = RUNTIMES["openvino"]
    assert fusing.reorders
    exact = {
        runtime.name: step_tolerance(runtime, profile, plan, exact_ends=True, rotated=False, wide=False).exact
        for runtime in (CPU, fusing)
    }
    assert exact == {"onnxruntime": True, "openvino": False}


def test_more_tokens_than_one_call_are_carried_by_the_runtime(verified):
    plan = planned("int-ops")
    given = samples(plan, calls=8, **SIZES)
    *_, (o, state) = (verified(plan, given)[i : i + 2] for i in (0, 2))
    # Two sequences of three heads, eight calls of 32 tokens.
    assert (o.values, state.values) == (2 * 3 * 8 * 32 * 12, 8 * 2 * 3 * 8 * 12)
    assert o.mismatches == state.mismatches == 0


def run(plan, given, **options):
    """The outputs of one call, by name."""
    session = open_session(serialize(build(plan, **options)), threads=1)
    taken = {value.name for value in session.get_inputs()}
    feed = {name: value for name, value in given.items() if name in taken}
    return dict(zip((v.name for v in session.get_outputs()), session.run(None, feed), strict=True))


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_tokens_that_are_not_valid_change_nothing(decay):
    plan, rng = planned("int-ops", decay=decay), np.random.default_rng(0)
    given = samples(plan, calls=1, **SIZES)
    given["valid"] = (rng.random(given["valid"].shape) < 0.5).astype(np.float32)
    other = dict(given)
    gone = given["valid"] == 0
    for name in ("q", "k", "v", "beta", "g"):
        other[name] = given[name].copy()
        other[name][np.broadcast_to(gone[:, None], given[name].shape[:3])] *= -0.5 if name != "beta" else 0.5
    other["g"] = -np.abs(other["g"])
    first, second = (run(plan, x, **SIZES) for x in (given, other))
    assert np.array_equal(first["state_out"], second["state_out"])
    kept = np.broadcast_to(~gone[:, None], first["o"].shape[:3])
    assert np.array_equal(first["o"][kept], second["o"][kept])
    assert not np.array_equal(first["o"], run(plan, {**given, "valid": 1 - given["valid"]}, **SIZES)["o"])


def test_a_call_without_valid_tokens_returns_the_state_it_was_given():
    plan = planned("int-ops")
    given = samples(plan, calls=1, **SIZES)
    tensors = plan.layer().tensors
    kept = run(plan, {**given, "valid": np.zeros_like(given["valid"])}, **SIZES)["state_out"]
    # exp(0) = 1 is the largest integer of its grid, so that the state is multiplied by 1.
    near = tensors["state"].scale + tensors["state/kept"].scale
    limit = min(tensors[name].limit for name in ("state", "state/kept"))
    assert np.abs(kept - given["state"].clip(-limit, limit)).max() <= near


def test_every_state_is_what_a_shorter_window_returns():
    plan = planned("int-ops")
    given = samples(plan, calls=1, **SIZES)
    whole = run(plan, given, **SIZES, states="every")
    half = {
        name: x if name == "state" else x[..., :16] if x.ndim < 4 else x[:, :, :16]
        for name, x in given.items()
    }
    short = run(plan, half, **{**SIZES, "chunks": 1})
    assert np.array_equal(whole["state_1"], short["state_out"])
    assert np.array_equal(whole["o"][:, :, :16], short["o"])


def test_chains_change_no_integer():
    plan = planned("int-ops")
    given = samples(plan, calls=1, **SIZES)
    whole, cut = (run(plan, given, **SIZES, chains=chains) for chains in (1, 3))
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_a_last_window_that_is_not_full_is_padded(verified):
    plan = planned("int-ops")
    given = samples(plan, calls=2, **SIZES)
    cut = {name: x if name == "state" else x[:, :, :50] for name, x in given.items() if name != "valid"}
    results = verified(plan, {**cut, "valid": given["valid"][:, :50]})
    assert [result.mismatches for result in results] == [0] * 4


def test_three_sequences_fill_two_batches(verified):
    plan = planned("int-ops")
    given = samples(plan, **SIZES)
    wider = {name: np.concatenate([x, x[:1]]) for name, x in given.items()}
    o = verified(plan, wider)[0]
    assert o.values == 2 * verified(plan, given)[0].values


def spoil(path, name):
    """Change one constant of a graph."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), name))
    onnx.save(model, path)


@pytest.mark.parametrize("tensor", ["o", "state", "v", "k"])
def test_a_wrong_scale_is_found(tmp_path, tensor):
    plan = planned("npu-qdq-int8")
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    spoil(tmp_path / "step.onnx", f"scale/{plan.layer().tensors[tensor].scale!r}")
    with pytest.raises(VerificationError, match="differs from the simulator") as error:
        qinvert.verify(tmp_path / "step.onnx", plan, samples(plan, **SIZES))
    assert "\n" not in str(error.value)


def test_a_wrong_norm_is_found(tmp_path):
    plan = planned("int-ops")
    options = {**SIZES, "normalize": True}
    qinvert.export(plan, tmp_path / "step.onnx", **options)
    spoil(tmp_path / "step.onnx", "query_scale")
    with pytest.raises(VerificationError, match="computes q with an error"):
        qinvert.verify(tmp_path / "step.onnx", plan, samples(plan, **options))


def test_another_plan_is_named(tmp_path):
    plan = planned("npu-qdq-int8")
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    layer = plan.layer()
    scaled = {n: replace(g, scale=2 * g.scale) if n == "o" else g for n, g in layer.tensors.items()}
    other = Plan(layers={"layer": replace(layer, tensors=scaled)}, target=plan.target)
    with pytest.raises(VerificationError, match="another plan"):
        qinvert.verify(tmp_path / "step.onnx", other, samples(plan, **SIZES))


BAD = {
    "matrices": (lambda _: np.zeros((2, 16, 16)), "mapping of q, k, v"),
    "a missing input": (lambda given: {n: x for n, x in given.items() if n != "g"}, "mapping of q, k, v"),
    "an unknown input": (lambda given: {**given, "w": given["q"]}, "mapping of q, k, v"),
    "wrong heads": (lambda given: {**given, "q": given["q"][:, :2]}, "q has the shape"),
    "other tokens": (lambda given: {**given, "v": given["v"][:, :, :7]}, "v has the shape"),
    "positive decays": (lambda given: {**given, "g": -given["g"]}, "positive"),
    "a large beta": (lambda given: {**given, "beta": 5 + given["beta"]}, "beta is not in"),
    "NaN": (lambda given: {**given, "k": np.nan * given["k"]}, "NaN"),
    "half a token": (lambda given: {**given, "valid": 0.5 * given["valid"]}, "valid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_in_one_line(case):
    change, match = BAD[case]
    plan = planned("int-ops")
    interface = step_interface(plan.layer(), SIZES)
    with pytest.raises(InputError, match=match) as error:
        step_data(plan.layer(), interface, change(samples(plan, **SIZES)))
    assert "\n" not in str(error.value)


def test_other_runtimes_and_nothing_to_keep_are_refused(tmp_path):
    plan = planned("npu-qdq-int8")
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    given = samples(plan, **SIZES)
    with pytest.raises(ExportError, match="cannot hand the state"):
        list(execute_sequences("iree", b"", [], {}))
    with pytest.raises(ExportError, match="no runtime"):
        qinvert.verify(tmp_path / "step.onnx", plan, given, runtimes=())


@pytest.mark.parametrize(
    ("key", "value"),
    [("heads", "4"), ("heads", "x"), ("chunks", "1"), ("layout", "y"), ("states", "every"), ("batch", None)],
)
def test_metadata_that_do_not_fit_the_graph_are_refused(key, value):
    plan = planned("int-ops")
    model = build(plan, **SIZES)
    entry = next(e for e in model.metadata_props if e.key == f"qinvert.{key}")
    if value is None:
        model.metadata_props.remove(entry)
    else:
        entry.value = value
    with pytest.raises(QInvertError, match="export it again") as error:
        read_step_interface(model, plan.layer(), find_profile("int-ops"))
    assert "\n" not in str(error.value)


def test_the_interface_is_read_back():
    plan = planned("hexagon-uint16", wide=INT16_WHOLE, logs=INT16_WHOLE)
    for options in (
        {},
        INTEGERS,
        {"normalize": True, "states": "every", "layout": "values_first", "chains": 2},
    ):
        interface = step_interface(plan.layer(), {**SIZES, "chains": 6, **options})
        model = build(plan, **SIZES, **options)
        assert read_step_interface(model, plan.layer(), find_profile("hexagon-uint16")) == interface


def test_channels_leave_as_they_entered():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((2, 3, 5, 8)).astype(np.float32))
    exponents = tuple(tuple(int(e) for e in row) for row in rng.integers(-5, 6, (3, 8)))
    plain, turned = (ValueChannels(exponents=exponents, rotated=r) for r in (False, True))
    assert torch.equal(leave(plain, enter(plain, values)), values)
    assert float((leave(turned, enter(turned, values)) - values).abs().max()) < 1e-4
    assert np.allclose(rotation(8) @ rotation(8), np.eye(8))
    assert np.array_equal(channel_factors(plain, leaving=True), 1 / channel_factors(plain, leaving=False))


def test_exactness_is_promised_where_integers_are_computed():
    for name in ("int-ops", "qlinear"):
        plan, profile = planned(name).layer(), PROFILES[name]
        assert step_tolerance(CPU, profile, plan, exact_ends=True, rotated=False, wide=False).exact
        assert not step_tolerance(CPU, profile, plan, exact_ends=False, rotated=False, wide=False).exact
    plan = planned("npu-qdq-int8").layer()
    assert not step_tolerance(
        CPU, PROFILES["npu-qdq-int8"], plan, exact_ends=True, rotated=False, wide=False
    ).exact


def test_masks_of_log_decays_of_channels_lie_along_the_tokens_of_every_layout(verified):
    plan, rng = planned("int-ops", decay="channel"), np.random.default_rng(0)
    for layout in ("tokens_first", "values_first", "channels_first"):
        for ends in ({}, INTEGERS):
            options = {**SIZES, "chunks": 1, "layout": layout, **ends}
            given = samples(plan, calls=2, **options)
            given["valid"] = (rng.random(given["valid"].shape) < 0.5).astype(np.float32)
            assert [result.mismatches for result in verified(plan, given, **options)] == [0] * 4


@pytest.mark.parametrize("ends", [{"input_type": "integers"}, {"output": "integers"}])
def test_a_state_that_changes_its_type_is_verified_in_one_call(verified, ends):
    plan = planned("int-ops")
    given = samples(plan, **ends, **SIZES)
    assert given["q"].shape[2] == 2 * 16
    assert [result.mismatches for result in verified(plan, given, **ends)] == [0] * 4
    with pytest.raises(InputError, match="from call to call; pass at most 32 tokens"):
        verified(plan, samples(plan, **SIZES), **ends)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [None, ValueChannels(exponents=((-60,) * 12,))], ids=["plain", "scaled"])
def test_inputs_at_the_end_of_float32_are_verified(verified, channels):
    # The rule itself leaves float64 there; the integers saturate.
    plan = planned("int-ops", channels)
    ends = {n: np.sign(x) * 3e38 for n, x in samples(plan, **SIZES).items() if n in ("q", "k", "v", "state")}
    given = {**samples(plan, **SIZES), **ends}
    assert [result.mismatches for result in verified(plan, given)] == [0] * 4
