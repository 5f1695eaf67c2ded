"""Whole steps on the embedded model, the state carried over eight chunks: what the formats are worth."""

import pytest
import torch

import qinvert
from qinvert import ChunkOptions, recall
from qinvert.calibration.patching import run_model
from qinvert.errors import InputError, PlanError
from qinvert.formats import INT8, INT16
from qinvert.plan.plan import Plan

pytest.importorskip("transformers")

LAYERS = ["model.layers.0.linear_attn", "model.layers.1.linear_attn"]
WIDE = {"target": "npu-qdq-int16", "chunk": ChunkOptions(value_bits=16, state_bits=16)}
SHORT = recall.sequences(1, seed=3)[:, :130]


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


def planned(model, count, **options):
    return qinvert.calibrate(model, recall.sequences(count), scope="chunk", **options)


@pytest.fixture(scope="module")
def wide(model):
    return planned(model, 2, **WIDE)


def evaluated(model, plan):
    return qinvert.evaluate(model, plan, recall.sequences(2, seed=5), score=recall.accuracy)


def test_keys_of_8_bits_and_values_of_16_lose_nothing(model, wide):
    found = evaluated(model, wide)
    assert found.score == found.exact_score == 1.0
    assert found.kl <= 0.02
    for layer in wide.layers.values():
        assert layer.tensors["k"].format == layer.tensors["T"].format == INT8
        assert layer.tensors["v"].format == layer.tensors["state"].format == INT16
        assert set(layer.provenance["widened"]) == {"v", "v_new", "o", "state"}


def test_8_bits_everywhere_recall_all(model):
    plan = planned(model, 4, bits=8, target="npu-qdq-int8")
    assert {q.format for layer in plan.layers.values() for q in layer.tensors.values()} == {INT8}
    found = evaluated(model, plan)
    assert found.score == 1.0
    assert found.kl <= 0.5


def test_grids_of_every_head_leave_less(model):
    plan = planned(model, 3, bits=8, granularity="head")
    assert list(plan.layers) == [f"{layer}/head_{head}" for layer in LAYERS for head in (0, 1)]
    found = evaluated(model, plan)
    assert found.score == 1.0
    assert found.kl <= 0.5
    report = qinvert.simulate(plan, model, SHORT)
    assert list(report.steps) == list(plan.layers)


def test_without_equal_channels_8_bits_fail(model):
    plan = planned(model, 2, bits=8, ranges="max", chunk=ChunkOptions(equalize=False))
    assert all(layer.channels is None for layer in plan.layers.values())
    found = evaluated(model, plan)
    assert found.score < 0.8
    assert found.kl > 2


def test_what_a_plan_says_of_itself(model, wide):
    assert wide.provenance["scope"] == "chunk"
    for layer in wide.layers.values():
        facts = layer.provenance
        assert facts["scope"] == "chunk"
        assert facts["meets_goal"] is True
        assert (facts["heads"], facts["tokens"], facts["longest"]) == (2, 1024, 512)
        assert list(facts["state_growth"]) == ["1", "2", "4", "8"]
        assert facts["expected_sqnr_db"] == min(facts["expected_sqnr_o_db"], facts["expected_sqnr_state_db"])
    again = Plan.from_bytes(wide.to_bytes())
    assert again == wide
    assert again.to_bytes() == wide.to_bytes()


def test_threads_change_nothing(model):
    before, plans = torch.get_num_threads(), set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.add(qinvert.calibrate(model, SHORT[:, :66], scope="chunk", **WIDE).to_bytes())
    finally:
        torch.set_num_threads(before)
    assert len(plans) == 1


def test_simulation_counts_errors_head_by_head(model, wide):
    report = qinvert.simulate(wide, model, recall.sequences(2, seed=5))
    assert list(report.steps) == LAYERS
    assert report.layers == {}
    for step in report.steps.values():
        assert step.tokens == 1024
        assert len(step.head_sqnr_o_db) == len(step.head_sqnr_state_db) == len(step.head_sqnr_t_db) == 2
        assert min(step.head_sqnr_o_db) <= step.sqnr_o_db <= max(step.head_sqnr_o_db)
        assert min(step.head_sqnr_t_db) <= step.sqnr_t_db <= max(step.head_sqnr_t_db)
        # What chunks hand on adds up.
        # The first layer has hardly any noise to carry.
        assert step.step_sqnr_o_db >= step.sqnr_o_db - 0.1
        assert step.step_sqnr_state_db > 20
        assert step.sqnr_db == min(step.sqnr_o_db, step.sqnr_state_db) > 20
    assert report.worst_sqnr_db == min(step.sqnr_db for step in report.steps.values())
    document = report.to_dict()
    assert set(document["steps"]) == set(LAYERS)
    assert "free-running" in str(report)


def test_saturations_are_counted_by_the_tensor(model, wide):
    """A state whose grid is too small ends there, again and again."""
    from dataclasses import replace

    from qinvert.plan.quantization import Quantization

    def small(layer):
        grid = layer.tensors["state"]
        cut = Quantization(format=grid.format, scale=grid.scale / 64)
        names = [name for name, q in layer.tensors.items() if q == grid and name.startswith("state")]
        return replace(layer, tensors={**layer.tensors, **dict.fromkeys(names, cut)})

    plan = replace(wide, layers={name: small(layer) for name, layer in wide.layers.items()})
    report = qinvert.simulate(plan, model, SHORT)
    for step in report.steps.values():
        assert step.saturations["state/new"] > 100
        assert step.sqnr_state_db < 20
    assert all(
        step.saturations.get("state/new", 0) == 0
        for step in qinvert.simulate(wide, model, SHORT).steps.values()
    )


def test_one_call_in_the_model_is_step_of_the_plan(model, wide):
    """`patched` and `LayerPlan.step` are the same integers."""
    from qinvert.calibration.patching import patched_by_layer, solve_chunks

    seen = {}

    def see(layer, chunks):
        seen[layer] = chunks
        return solve_chunks(layer, chunks)

    with patched_by_layer(model, see):
        run_model(model, {"input_ids": SHORT})
    chunks = seen[LAYERS[0]]
    from qinvert.calibration.chunk_steps.results import plan_results

    result = plan_results(wide, LAYERS[0], chunks)
    flat = {name: getattr(chunks, name).flatten(2, 3) for name in ("q", "k", "v", "g", "beta")}
    o, state = wide.layers[LAYERS[0]].step(**flat, state=chunks.state)
    assert torch.equal(o, result.out.flatten(2, 3))
    assert torch.equal(state, result.state)


def test_plans_of_other_models_are_refused(model, wide):
    one = Plan(layers={LAYERS[0]: wide.layers[LAYERS[0]]}, target=wide.target)
    with (
        pytest.raises(PlanError, match=r"the plan lacks layer 'model.layers.1.linear_attn'"),
        qinvert.patched(model, one),
    ):
        pass
    with pytest.raises(PlanError, match="unknown layer"):
        qinvert.simulate(one, model, SHORT)
    more = Plan(layers={**wide.layers, "other": wide.layers[LAYERS[0]]}, target=wide.target)
    with pytest.raises(PlanError, match="the model has no layer 'other'"):
        qinvert.simulate(more, model, SHORT)
    with pytest.raises(InputError, match="a plan of chunk steps is simulated on a model"):
        qinvert.simulate(wide, torch.zeros(2, 64, 64))
    with pytest.raises(PlanError, match=r"[Hh]exagon"):
        qinvert.simulate(wide, model, SHORT, rounding="hexagon")


def test_a_state_takes_a_margin_for_longer_contexts(model):
    tokens = recall.sequences(1, seed=3)
    plans = [
        qinvert.calibrate(
            model, tokens, scope="chunk", bits=8, chunk=ChunkOptions(state_margin=margin, equalize=False)
        )
        for margin in (1.0, 3.0)
    ]
    for name in LAYERS:
        small, large = (plan.layers[name] for plan in plans)
        assert large.ranges["state"] == pytest.approx(3 * small.ranges["state"])
        assert large.tensors["state"].limit > 2.8 * small.tensors["state"].limit
