"""The selection of sparse attention for all queries at once against the loops of the model's own code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, build, of_layers

import qinvert
from qinvert.calibration.patching import run_model
from qinvert.export.whole_models.check import difference
from qinvert.export.whole_models.sparse_attention import selected_tokens, traceable_indexers
from qinvert.export.whole_models.topk_ties import LowestIndexFirst

pytest.importorskip(
    "transformers.models.qwen4_exp", reason="pip install 'qinvert[model]' 'transformers>=5.16'"
)
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.randint(0, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    """Selects 4 blocks of 16 tokens."""
    return build("qwen4_exp", **of_layers("linear_attention", "full_attention"))


def logits(model, tokens, mask):
    with LowestIndexFirst():
        return run_model(model, {"input_ids": tokens, "attention_mask": mask})[mask.bool()]


@pytest.mark.parametrize(
    ("length", "padded"),
    [
        (1, ()),
        (15, ()),
        (16, ()),
        (65, ()),
        (130, ()),
        (130, range(37)),
        (130, range(90, 130)),
        (130, range(50, 61)),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_changes_not_even_a_rounding(model, length, padded, attention):
    model.set_attn_implementation(attention)
    tokens, mask = TOKENS[:, :length], torch.ones(2, length, dtype=torch.int64)
    mask[0, list(padded)] = 0
    before = logits(model, tokens, mask)
    with traceable_indexers(model):
        inside = logits(model, tokens, mask)
        indexer = model.model.layers[1].self_attn.indexer
        indexer.block_topk = 3
        fewer = logits(model, tokens, mask)
        indexer.block_topk = 4
    assert torch.equal(inside, before)
    # Four blocks are whole from that length on.
    assert torch.equal(fewer, before) == (length < 64)
    assert "forward" not in vars(indexer)


def test_the_exported_model_is_right(model, tmp_path):
    # Dynamic lengths: 20 s.
    plan = qinvert.calibrate(model, TOKENS, bits=8)
    qinvert.export_model(model, plan, TOKENS[:1, :130], tmp_path / "m.onnx", dynamic=False)
    assert difference(tmp_path / "m.onnx", model, plan, 130) < 2e-6


@given(st.data(), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3))
def test_the_selection_is_that_of_its_definition(data, length, size, count):
    real = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    values = data.draw(st.lists(st.integers(0, 3), min_size=length * length, max_size=length * length))
    table = torch.tensor(values).float().reshape(length, length)
    visible = torch.tensor(real) & torch.ones(length, length, dtype=torch.bool).tril()
    with LowestIndexFirst():
        # The score of a block for a query is that of its first token.
        found = selected_tokens(visible[None], size, count, lambda tokens: table[:, tokens[0, :, 0]][None])
    for query in range(length):
        seen = [token for token in range(query + 1) if real[token]]
        whole = len(seen) // size * size
        blocks = [seen[start : start + size] for start in range(0, whole, size)]
        best = sorted(blocks, key=lambda block: (-table[query, block[0]].item(), block))[:count]
        assert found[0, query].nonzero().flatten().tolist() == sorted(sum(best, seen[whole:]))
