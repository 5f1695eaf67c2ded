"""Padding gives matrices that are all zero: they say nothing of ranges and must take no place."""

import numpy as np
import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.choices import Granularity
from qinvert.calibration.observation.checkpoint import load
from qinvert.calibration.observation.one_pass import observe
from qinvert.errors import InputError
from qinvert.stress import stress_matrices

CHUNKS = 32
REAL = stress_matrices("negative_eigenvalues", 40, 16).reshape(8, 5, 16, 16)


def padded(real, side):
    """Return one real chunk in `CHUNKS` for every head and sequence, at an end or anywhere."""
    result = torch.zeros(*real.shape[:-2], CHUNKS, *real.shape[-2:])
    if side == "anywhere":
        at = torch.randint(CHUNKS, real.shape[:-2], generator=torch.Generator().manual_seed(0))
        return result.scatter_(2, at[..., None, None, None].expand(*at.shape, 1, 16, 16), real.unsqueeze(2))
    result[..., -1 if side == "left" else 0, :, :] = real
    return result


def seen(source, seed, **options):
    (observer,) = observe(
        source,
        None,
        lambda chunk: [qinvert.block_merge(chunk)],
        granularity=Granularity.TENSOR,
        seed=seed,
        **options,
    ).values()
    return observer.state()


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("seed", range(8))
def test_padding_takes_no_place_among_sampled_matrices(side, seed):
    with_padding, without = seen(padded(REAL, side), seed), seen(REAL, seed)
    assert with_padding.matrices == without.matrices == 40
    assert torch.equal(with_padding.keys, without.keys)
    assert torch.equal(with_padding.sample[0], without.sample[0])
    assert list(with_padding.ranges) == list(without.ranges)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("split", [1, 3, 8])
def test_plans_of_padded_matrices_are_those_of_real_ones(side, split, tmp_path):
    batches = padded(REAL, side).split(split)
    plan = qinvert.calibrate([torch.zeros(1, 16, 16), *batches], checkpoint=tmp_path / "c")
    assert plan.to_bytes() == qinvert.calibrate(REAL).to_bytes()
    again = qinvert.calibrate([torch.zeros(1, 16, 16), *batches], checkpoint=tmp_path / "c")
    assert again.to_bytes() == plan.to_bytes()


def test_a_layer_of_zeros_alone_still_has_a_plan(tmp_path):
    source = {"empty": torch.zeros(4, 16, 16), "real": REAL}
    plan = qinvert.calibrate(source, checkpoint=tmp_path / "c")
    assert load(tmp_path / "c").layers["empty"].state.sample == []
    assert qinvert.calibrate(source, checkpoint=tmp_path / "c").to_bytes() == plan.to_bytes()
    assert torch.equal(plan.layers["empty"].inverse(torch.zeros(16, 16)), torch.eye(16))
    beta = torch.rand(4, 16)
    factored = qinvert.calibrate({"empty": (torch.zeros(4, 16, 16), beta)}, factored=True)
    assert list(factored.layers) == ["empty"]


@pytest.mark.parametrize(("side", "seed"), [("left", 0), ("right", 1), ("left", 2)])
def test_a_model_is_planned_for_its_real_tokens(side, seed):
    pytest.importorskip("transformers")
    model = recall.load_model()
    tokens = recall.sequences(8, seed)[:, :64]
    ids, mask = torch.zeros(2, 8, 2048, dtype=torch.int64)
    where = slice(-64, None) if side == "left" else slice(64)
    ids[:, where], mask[:, where] = tokens, 1
    plan = qinvert.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    worst = qinvert.simulate(plan, model, tokens).worst_sqnr_db
    expected = qinvert.simulate(qinvert.calibrate(model, tokens), model, tokens).worst_sqnr_db
    assert worst > expected - 1


def test_whole_steps_are_planned_for_real_tokens():
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(4)[:, :128]
    ids, mask = torch.zeros(2, 4, 2048, dtype=torch.int64)
    ids[:, -128:], mask[:, -128:] = tokens, 1
    padding = {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)}
    expected = qinvert.calibrate(model, tokens, scope="chunk")
    for data in ([{"input_ids": ids, "attention_mask": mask}], [padding, tokens]):
        plan = qinvert.calibrate(model, data, scope="chunk")
        for name, layer in plan.layers.items():
            assert layer.tensors == expected.layers[name].tensors
    with pytest.raises(InputError, match="hold no token"):
        qinvert.calibrate(model, [padding], scope="chunk")


def test_goals_for_outputs_are_measured_on_real_tokens():
    pytest.importorskip("transformers")
    model, tokens = recall.load_model(), recall.sequences(4)[:, :128]
    padding = {"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)}
    options = {"min_output_sqnr_db": 20, "method": "block_merge", "bits": 8}
    expected = qinvert.calibrate(model, tokens, **options)
    assert qinvert.calibrate(model, [padding, tokens], **options).to_bytes() == expected.to_bytes()
    with pytest.raises(InputError, match="longest sequence has 0 tokens"):
        qinvert.calibrate(model, [padding], **options)


def written(tmp_path, arrays, suffix):
    path = tmp_path / f"matrices.{suffix}"
    if suffix == "npz":
        np.savez(path, **{name: x.numpy() for name, x in arrays.items()})
    else:
        pytest.importorskip("safetensors.torch").save_file(arrays, path)
    return path


class Reader:
    """Gives one item after the other, then None."""

    def __init__(self, items):
        self.items = iter(items)

    def get_next(self):
        return next(self.items, None)


SOURCES = {
    "a tensor": lambda x, _: x["layer"],
    "an array": lambda x, _: x["layer"].numpy(),
    "layers by name": lambda x, _: x,
    "a list of parts": lambda x, _: list(x["layer"].split(3)),
    "a generator of pairs": lambda x, _: (("layer", part) for part in x["layer"].split(3)),
    "a reader": lambda x, _: Reader([{"layer": part} for part in x["layer"].split(3)]),
    "a npz file": lambda x, tmp_path: written(tmp_path, x, "npz"),
    "a safetensors file": lambda x, tmp_path: written(tmp_path, x, "safetensors"),
    "with beta": lambda x, _: (x["layer"], torch.ones(x["layer"].shape[:-1])),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SOURCES)
def test_no_source_plans_for_padding(kind, side, tmp_path):
    options = {"method": "block_merge", "bits": 8, "factored": kind == "with beta"}
    source = SOURCES[kind]({"layer": padded(REAL, side)}, tmp_path)
    expected = (REAL, torch.ones(REAL.shape[:-1])) if options["factored"] else REAL
    assert (
        qinvert.calibrate(source, **options).to_bytes() == qinvert.calibrate(expected, **options).to_bytes()
    )
