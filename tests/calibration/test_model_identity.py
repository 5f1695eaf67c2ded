import copy
import json

import pytest
import tiny_models
import torch

import qinvert
from qinvert.calibration.model_digest import weights_digest
from qinvert.calibration.model_identity import check_identity, model_identity
from qinvert.errors import PlanError
from qinvert.plan.plan import Plan
from qinvert.stress import stress_matrices

pytest.importorskip("transformers")
TOKENS = torch.randint(0, tiny_models.VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("qwen3_5")


@pytest.fixture(scope="module")
def plan(model):
    return qinvert.calibrate(model, TOKENS, method="newton_schulz")


def changed(model, name="lm_head.weight"):
    other = copy.deepcopy(model)
    other.get_parameter(name).data[1, 3] += 1e-3
    return other


def test_a_plan_names_its_model_layers_data_and_versions(model, plan):
    known = plan.provenance["model"]
    assert known["type"] == model.config.model_type
    assert known["weights_sha256"] == weights_digest(model)
    assert known["layers"]["model.layers.0.linear_attn"]["head_k_dim"] == tiny_models.HEAD
    assert known["layers"].keys() == plan.layers.keys()
    assert plan.provenance["data"]["tokens"] == 140
    assert plan.provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads(plan.to_bytes())["provenance"]["model"] == known


@pytest.mark.parametrize(
    "use",
    [
        lambda plan, model, **more: qinvert.simulate(plan, model, TOKENS, **more),
        lambda plan, model, **more: qinvert.evaluate(model, plan, TOKENS, **more),
        lambda plan, model, **more: qinvert.compare(model, {"a": plan}, TOKENS, **more),
        lambda plan, model, **more: qinvert.patched(model, plan, **more).__enter__(),
    ],
    ids=["simulate", "evaluate", "compare", "patched"],
)
def test_another_model_is_refused_unless_forced(model, plan, use):
    use(plan, copy.deepcopy(model))
    with pytest.raises(PlanError, match=r"hash of the weights is \w{16} there.*force=True"):
        use(plan, changed(model))
    use(plan, changed(model), force=True)


def test_a_whole_model_is_not_exported_for_another_plan(model, plan, tmp_path):
    with pytest.raises(PlanError, match="another model"):
        qinvert.export_model(changed(model), plan, TOKENS, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_another_family_and_another_configuration_are_named(model, plan):
    with pytest.raises(PlanError, match="the type is qwen3_5_text there and qwen3_next here"):
        check_identity(plan, tiny_models.build("qwen3_next"))
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(PlanError, match="the hash of the configuration"):
        check_identity(plan, other)


def test_how_a_model_is_loaded_changes_nothing(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    again = copy.deepcopy(half).to(torch.float32)
    assert weights_digest(half) == weights_digest(again) == weights_digest(model)
    assert weights_digest(changed(model)) != weights_digest(model)
    again.config.use_cache = not again.config.use_cache
    again.config._attn_implementation = "eager"
    assert model_identity(half, {}) == model_identity(again, {})


def test_a_cast_to_float16_is_not_compared_by_its_weights(model, plan):
    check_identity(plan, copy.deepcopy(model).to(torch.bfloat16))
    check_identity(plan, copy.deepcopy(model).to(torch.float16))


def test_float16_weights_are_their_float32_values():
    layer = torch.nn.Linear(40, 30).half()
    assert weights_digest(layer) == weights_digest(copy.deepcopy(layer).float())


def test_offloaded_weights_are_not_compared(plan):
    with torch.device("meta"):
        elsewhere = tiny_models.build("qwen3_5")
    assert weights_digest(elsewhere) is None
    check_identity(plan, elsewhere)


def test_plans_that_name_no_model_fit_any(model, plan):
    bare = Plan(layers=plan.layers, target=plan.target)
    check_identity(bare, model)
    check_identity(plan.layers["model.layers.0.linear_attn"], changed(model))
    assert "model" not in qinvert.calibrate(stress_matrices("ones", 4, 16)).provenance


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_hash(model):
    assert weights_digest(copy.deepcopy(model).cuda()) == weights_digest(model)
