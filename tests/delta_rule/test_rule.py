from __future__ import annotations

import math

import pytest
import torch

import qinvert
from qinvert.delta_rule.rule import chunk_gated_delta_rule, exact
from qinvert.errors import InputError
from qinvert.matrices import SolvedInverse, check_matrices


def inputs(length=12, key_heads=2, heads=2, batch=2, key_size=6, value_size=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, length, *shape, generator=generator)

    query, key = (torch.nn.functional.normalize(draw(key_heads, key_size), dim=-1) for _ in range(2))
    arguments = {
        "query": query,
        "key": key,
        "value": draw(heads, value_size),
        "g": -torch.nn.functional.softplus(draw(heads)),
        "beta": torch.sigmoid(draw(heads)),
    }
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


def per_channel(arguments, strength=1.0):
    generator = torch.Generator().manual_seed(4)
    shape = (*arguments["g"].shape, arguments["key"].shape[-1])
    g = -strength * torch.rand(shape, generator=generator).pow(4)
    return arguments | {"g": g.to(arguments["g"].dtype)}


def token_by_token(query, key, value, g, beta, state=None):
    """``S <- exp(g) S (I - beta k k^T) + beta v k^T``, ``o = S q / sqrt(D)``, in float64."""
    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    batch, length, heads, value_size = value.shape
    group, key_size = heads // key.shape[2], key.shape[-1]
    out = torch.zeros(batch, length, heads, value_size, dtype=torch.float64)
    states = torch.zeros(batch, heads, key_size, value_size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            s = torch.zeros(value_size, key_size).double() if state is None else state[b, h].double().T
            for t in range(length):
                k, v, q = key[b, t, h // group], value[b, t, h], query[b, t, h // group]
                s = s * torch.exp(g[b, t, h])
                s = s - beta[b, t, h] * torch.outer(s @ k, k)
                s = s + beta[b, t, h] * torch.outer(v, k)
                out[b, t, h] = s @ q / math.sqrt(key_size)
            states[b, h] = s.T
    return out, states


def close(result, expected, atol=2e-6):
    return torch.allclose(result.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 4, 7, 12, 16, 33])
def test_chunks_compute_the_recurrence_whatever_the_padding(length, chunk_size):
    arguments = inputs(length)
    out, state = chunk_gated_delta_rule(**arguments, chunk_size=chunk_size, output_final_state=True)
    expected, expected_state = token_by_token(**arguments)
    assert out.shape == arguments["value"].shape
    assert close(out, expected)
    assert close(state, expected_state)


@pytest.mark.parametrize("chunk_size", [1, 4, 12, 64])
@pytest.mark.parametrize("strength", [0.1, 5.0, 1000.0])
def test_a_decay_per_channel_computes_the_recurrence(chunk_size, strength):
    arguments = per_channel(inputs(33), strength)
    start = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(3))
    options = {"chunk_size": chunk_size, "initial_state": start, "output_final_state": True}
    out, state = chunk_gated_delta_rule(**arguments, **options)
    expected, expected_state = token_by_token(**arguments, state=start)
    # Differences of cumulated decays are exact to their float32 grid only.
    room = 2e-6 * max(1, strength)
    assert close(out, expected, room)
    assert close(state, expected_state, room)


def test_the_same_decay_in_all_channels_is_one_decay_a_head():
    arguments = inputs(40)
    channels = arguments | {"g": arguments["g"].unsqueeze(-1).expand(-1, -1, -1, 6)}
    options = {"chunk_size": 16, "output_final_state": True}
    for found, expected in zip(
        chunk_gated_delta_rule(**channels, **options),
        chunk_gated_delta_rule(**arguments, **options),
        strict=True,
    ):
        assert close(found, expected.double())


def test_an_inverse_that_is_solved_equals_one_that_is_formed():
    arguments = inputs(40)
    solved, _ = chunk_gated_delta_rule(**arguments, inverse=SolvedInverse)
    formed, _ = chunk_gated_delta_rule(**arguments, inverse=exact)
    assert torch.equal(solved, chunk_gated_delta_rule(**arguments)[0])
    assert close(solved, formed.double())


def test_the_default_chunk_is_64():
    sizes = []

    def inverse(lower):
        sizes.append(tuple(lower.shape))
        return exact(lower)

    arguments = inputs(100)
    out, _ = chunk_gated_delta_rule(**arguments, inverse=inverse)
    assert sizes == [(2, 2, 2, 64, 64)]
    assert close(out, token_by_token(**arguments)[0])


@pytest.mark.parametrize("chunk_size", [4, 8])
def test_a_sequence_can_be_cut_and_continued_with_its_state(chunk_size):
    arguments = inputs(13)
    first = {name: tensor[:, :6] for name, tensor in arguments.items()}
    rest = {name: tensor[:, 6:] for name, tensor in arguments.items()}
    options = {"chunk_size": chunk_size, "output_final_state": True}
    out_first, state = chunk_gated_delta_rule(**first, **options)
    out_rest, final = chunk_gated_delta_rule(**rest, **options, initial_state=state)
    whole, whole_state = chunk_gated_delta_rule(**arguments, **options)
    assert close(torch.cat([out_first, out_rest], 1), whole.double())
    assert close(final, whole_state.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_initial_state_of_any_type_starts_the_recurrence(dtype):
    arguments = inputs(9)
    start = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = start.clone()
    out, state = chunk_gated_delta_rule(
        **arguments, chunk_size=4, initial_state=start, output_final_state=True
    )
    expected, expected_state = token_by_token(**arguments, state=start)
    assert close(out, expected)
    assert close(state, expected_state)
    assert state.dtype == torch.float32
    assert torch.equal(start, before)


@pytest.mark.parametrize(("key_heads", "heads"), [(1, 1), (1, 4), (2, 4), (2, 6)])
def test_key_heads_repeat_for_groups_of_value_heads(key_heads, heads):
    arguments = inputs(10, key_heads, heads)
    out, state = chunk_gated_delta_rule(**arguments, chunk_size=4, output_final_state=True)
    expected, expected_state = token_by_token(**arguments)
    assert close(out, expected)
    assert close(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    arguments = inputs(20, dtype=dtype)
    out, state = chunk_gated_delta_rule(**arguments, chunk_size=8, output_final_state=True)
    expected, expected_state = token_by_token(**arguments)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert close(state, expected_state)
    assert (out.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalizing_divides_by_the_norm_with_its_epsilon(dtype):
    arguments = inputs(9, dtype=dtype)
    arguments["query"], arguments["key"] = 3 * arguments["query"], 0.2 * arguments["key"]
    options = {"chunk_size": 4, "use_qk_l2norm_in_kernel": True, "output_final_state": True}
    _, state = chunk_gated_delta_rule(**arguments, **options)
    out, _ = chunk_gated_delta_rule(**{name: x.float() for name, x in arguments.items()}, **options)
    for name in ("query", "key"):
        squares = arguments[name].double().square().sum(-1, keepdim=True)
        arguments[name] = arguments[name].double() / (squares + 1e-6).sqrt()
    expected, expected_state = token_by_token(**arguments)
    assert close(out, expected)
    assert close(state, expected_state)


def test_the_final_state_is_returned_only_on_request():
    assert chunk_gated_delta_rule(**inputs(4), chunk_size=4)[1] is None


def test_strong_decay_forgets_without_overflow():
    arguments = inputs(16)
    arguments["g"] = torch.full_like(arguments["g"], -200.0)
    out, state = chunk_gated_delta_rule(**arguments, chunk_size=8, output_final_state=True)
    expected, expected_state = token_by_token(**arguments)
    assert close(out, expected)
    assert close(state, expected_state)


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_repeated_keys_at_full_strength_replace_their_value(chunk_size):
    arguments = inputs(16)
    arguments["key"] = arguments["key"][:, :1].expand(-1, 16, -1, -1)
    arguments["query"] = arguments["key"]
    arguments["g"], arguments["beta"] = torch.zeros(2, 16, 2), torch.ones(2, 16, 2)
    out, _ = chunk_gated_delta_rule(**arguments, chunk_size=chunk_size)
    assert close(out, arguments["value"].double() / math.sqrt(6), 1e-5)


def test_the_inverse_is_called_once_with_legal_matrices_of_all_chunks():
    seen = []
    chunk_gated_delta_rule(**inputs(13), chunk_size=4, inverse=lambda lower: seen.append(lower) or lower)
    (lower,) = seen
    assert lower.shape == (2, 2, 4, 4, 4)
    assert lower.dtype == torch.float32
    assert check_matrices(lower, 4) is not None
    assert not lower[:, :, 3, 1:].any()


def test_a_wrong_inverse_changes_the_result():
    arguments = inputs(16)
    out, _ = chunk_gated_delta_rule(**arguments, chunk_size=8)
    wrong, _ = chunk_gated_delta_rule(**arguments, chunk_size=8, inverse=lambda t: torch.eye(8).expand_as(t))
    assert (out - wrong).abs().max() > 1e-2


def test_an_integer_plan_can_stand_in_for_the_inverse():
    arguments, seen = inputs(64), []
    chunk_gated_delta_rule(**arguments, chunk_size=16, inverse=lambda lower: seen.append(lower) or lower)
    plan = qinvert.calibrate(seen[0]).layer()
    out, _ = chunk_gated_delta_rule(**arguments, chunk_size=16, inverse=plan.inverse)
    expected, _ = token_by_token(**arguments)
    error = (out.double() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.02


@pytest.mark.parametrize("chunk", [2, 16])
def test_the_exact_inverse_keeps_the_type(chunk):
    lower = torch.tril(torch.full((3, chunk, chunk), 0.25), -1)
    result = exact(lower)
    assert result.dtype == torch.float32
    assert torch.allclose(result @ (torch.eye(chunk) + lower), torch.eye(chunk), atol=1e-6)


def test_packed_sequences_are_refused():
    with pytest.raises(InputError, match=r"cu_seqlens.*pass one sequence per row"):
        chunk_gated_delta_rule(**inputs(4), cu_seqlens=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (inputs(4, key_heads=2, heads=3), {}),
        (inputs(4, key_heads=4, heads=2), {}),
        (inputs(0), {}),
        (inputs(4) | {"g": torch.zeros(2, 4, 2, 5)}, {}),
        (inputs(4) | {"g": torch.zeros(2, 4, 1)}, {}),
        (inputs(4), {"chunk_size": 0}),
        (inputs(4), {"chunk_size": -4}),
        (inputs(4), {"initial_state": torch.zeros(2, 2, 5, 6)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, options):
    with pytest.raises(InputError):
        chunk_gated_delta_rule(**arguments, **options)
