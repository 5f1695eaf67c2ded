import pytest
import torch
from torch.overrides import TorchFunctionMode

import qinvert
from qinvert import recall
from qinvert.calibration.patching import run_model
from qinvert.errors import InputError

pytest.importorskip("transformers")

TOKENS = recall.sequences(2, seed=3)
EVERYTHING = ("beta", "gram", "right_hand_sides")


@pytest.fixture(scope="module")
def model():
    return recall.load_model()


class Solves(TorchFunctionMode):
    """Records what an unpatched model hands to torch's triangular solver."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.solve_triangular:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def test_systems_are_those_that_the_model_solves(model):
    with Solves() as solves:
        run_model(model, {"input_ids": TOKENS})
    found = list(qinvert.capture_details(model, TOKENS, details=EVERYTHING))
    assert len(solves.calls) == 2 * len(found)
    for item, values, keys in zip(found, solves.calls[::2], solves.calls[1::2], strict=True):
        assert torch.equal(item.lower, torch.tril(values[0], -1))
        assert torch.equal(item.right_hand_sides[0], values[1])
        assert torch.equal(item.right_hand_sides[1], keys[1])


def test_l_is_beta_times_gram_times_a_decay(model):
    for item in qinvert.capture_details(model, TOKENS, details=EVERYTHING):
        assert torch.allclose(item.gram.diagonal(dim1=-2, dim2=-1), torch.ones(()), atol=1e-4)
        without_decay = torch.tril(item.beta.unsqueeze(-1) * item.gram, -1)
        assert (item.lower * without_decay >= 0).all()
        assert (item.lower.abs() <= without_decay.abs() + 1e-7).all()
        assert (item.lower.abs() < 0.9 * without_decay.abs()).any()


def test_only_what_was_asked_for_is_kept(model):
    for details in ((), ("beta",), ("gram",), ("right_hand_sides",)):
        item = next(iter(qinvert.capture_details(model, TOKENS, details=details)))
        assert tuple(name for name in EVERYTHING if getattr(item, name) is not None) == details


@pytest.mark.parametrize(("share", "kept"), [(0.5, 4), (0.25, 2), (0.01, 1), (0.99, 8), (1, 8)])
def test_a_share_keeps_chunks_of_all_heads_and_layers(model, share, kept):
    whole = list(qinvert.capture_details(model, [TOKENS, TOKENS], details=EVERYTHING))
    some = list(qinvert.capture_details(model, [TOKENS, TOKENS], details=EVERYTHING, share=share, seed=5))
    positions = []
    for every, part in zip(whole, some, strict=True):
        assert part.lower.shape == (2, 2, kept, 64, 64)
        (found,) = {
            tuple(n for n in range(8) if any(torch.equal(every.lower[b, h, n], x) for x in part.lower[b, h]))
            for b in range(2)
            for h in range(2)
        }
        positions.append(found)
        index = list(found)
        assert torch.equal(part.beta, every.beta[:, :, index])
        assert torch.equal(part.gram, every.gram[:, :, index])
        for x, y in zip(part.right_hand_sides, every.right_hand_sides, strict=True):
            assert torch.equal(x, y[:, :, index])
    assert positions[0] == positions[1]
    assert positions[2] == positions[3]
    if kept == 4:
        assert positions[0] != positions[2]


def test_the_seed_decides_which_chunks(model):
    def chosen(seed):
        return [lower for _, lower in qinvert.capture(model, TOKENS, share=0.5, seed=seed)]

    assert all(map(torch.equal, chosen(1), chosen(1)))
    assert not all(map(torch.equal, chosen(1), chosen(2)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0}, r"share 0 is not in \(0, 1\]"),
        ({"share": 1.5}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": True}, "share"),
        ({"share": "all"}, "share"),
        ({"seed": -1}, "seed"),
        ({"details": ("keys",)}, "detail 'keys' is unknown; use beta, gram or right_hand_sides"),
    ],
)
def test_illegal_options_are_refused(model, options, match):
    with pytest.raises(InputError, match=match):
        next(iter(qinvert.capture_details(model, TOKENS, **options)))
