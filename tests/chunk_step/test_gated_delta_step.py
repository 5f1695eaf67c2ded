"""The program of a whole chunk step against the delta rule, its proved ranges, and what it refuses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qinvert
from qinvert.chunk_step.form import Decay, Form
from qinvert.chunk_step.gated_delta_step import MAX_SIZE, gated_delta_step
from qinvert.chunk_step.ports import INPUTS, find_step_sizes, step_sizes
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import ProgramError
from qinvert.matrices import solve
from qinvert.methods import block_merge, elimination, neumann
from qinvert.program.ports import Port
from qinvert.program.program import Program
from qinvert.program.serialization import program_from_json, program_to_json
from qinvert.program.steps import Exponential, MatMul, Multiply, Shape

C, KEYS, VALUES = 8, 4, 6
FORMS = [
    (decay, form, first, halves)
    for decay, form, first, halves in itertools.product(Decay, Form, [True, False], [False, True])
    if not (halves and form is Form.WY)
]
forms = pytest.mark.parametrize(("decay", "form", "first", "halves"), FORMS)


def step(decay, form, first, halves, inverse=None, **options) -> Program:
    inverse = inverse or elimination(C // 2 if halves else C)
    return gated_delta_step(inverse, KEYS, VALUES, decay, form, values_first=first, halves=halves, **options)


def chunks(decay: str, count: int, seed: int, *, top: float = 1.0, alike: float = 0.0) -> DeltaChunks:
    """Unit keys, more or less alike, beta up to ``top`` with its ends, decays that sum up to at most 16."""
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(1, count, 1, C, KEYS)) + alike * rng.normal(size=(1, count, 1, 1, KEYS)) * 5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = rng.normal(size=k.shape)
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * KEYS**0.5
    width = (KEYS,) if decay == "channel" else ()
    g = -rng.random((1, count, 1, C, *width)) * rng.choice(
        [0, 0.1, 16 / C], size=(1, count, 1, 1, *(1,) * len(width))
    )
    beta = rng.choice([0, 0.5, 1], p=[0.1, 0.2, 0.7], size=(1, count, 1, C)) * top
    v = rng.normal(size=(1, count, 1, C, VALUES))
    state = rng.normal(size=(1, count, KEYS, VALUES))
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    return DeltaChunks(**{name: torch.from_numpy(value) for name, value in tensors.items()})


def ports(given_chunks: DeltaChunks, decay: str, first: bool) -> dict[str, torch.Tensor]:
    """What the program takes, ``[count, rows, columns]``."""

    def turned(x):
        return x.mT if first else x

    c = given_chunks
    return {
        "q": turned(c.q[0, :, 0]),
        "k": turned(c.k[0, :, 0]),
        "v": turned(c.v[0, :, 0]),
        "beta": turned(c.beta[0, :, 0, :, None]),
        "g": turned(c.g[0, :, 0]) if decay == "channel" else c.g[0, :, 0, None],
        "state": turned(c.state[0]),
    }


@forms
def test_every_form_is_the_delta_rule_in_float64(decay, form, first, halves):
    program = step(decay, form, first, halves)
    for seed, alike in ((0, 0.0), (1, 1.0)):
        c = chunks(decay, 5, seed, alike=alike)
        expected = c.apply(solve(c.lower))
        found = program.execute(ports(c, decay, first), dtype=torch.float64)
        for name, value in (("o", expected.out[0, :, 0]), ("state", expected.state[0])):
            value = value.mT if first else value
            assert found[name].shape == value.shape
            assert torch.allclose(found[name], value, rtol=0, atol=1e-11), name


@pytest.mark.parametrize(
    "inverse", [block_merge(C, 2), block_merge(C, 4, "masked"), neumann(C, C - 1)], ids=lambda p: p.title
)
@pytest.mark.parametrize("first", [True, False])
def test_any_inverse_serves(inverse, first):
    program, c = step("scalar", "folded", first, False, inverse), chunks("scalar", 4, 3)
    expected = c.apply(solve(c.lower)).out[0, :, 0]
    found = program.execute(ports(c, "scalar", first), dtype=torch.float64)["o"]
    assert torch.allclose(found.mT if first else found, expected, rtol=0, atol=1e-9)
    assert program.parameters["inverse"] == inverse.title


def test_chunks_follow_each_other():
    """The state of one chunk is the state that the next one starts with."""
    program, c = step("scalar", "state", False, False), chunks("scalar", 4, 5)
    state, found = torch.zeros(1, KEYS, VALUES, dtype=torch.float64), []
    whole = ports(c, "scalar", first=False)
    for i in range(4):
        one = {name: value[i : i + 1] for name, value in whole.items()} | {"state": state}
        results = program.execute(one, dtype=torch.float64)
        state = results["state"]
        found.append(results["o"])
    rows = {n: getattr(c, n).transpose(1, 2) for n in ("q", "k", "v", "g", "beta")}
    expected = DeltaChunks(**rows, state=torch.zeros(1, 1, KEYS, VALUES, dtype=torch.float64))
    outputs = expected.apply(solve(expected.lower))
    assert torch.allclose(torch.cat(found), outputs.out[0, 0], rtol=0, atol=1e-11)
    assert torch.allclose(state[0], outputs.state[0, 0], rtol=0, atol=1e-11)


@settings(max_examples=25)
@given(
    options=st.sampled_from(FORMS),
    seed=st.integers(0, 2**32 - 1),
    top=st.sampled_from([0.3, 1.0, 2.0]),
    alike=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_every_proved_range_holds(options, seed, top, alike):
    decay, _, first, _ = options
    program = step(*options, max_beta=max(top, 1.0))
    largest: dict[str, float] = {}
    program.execute(
        ports(chunks(decay, 20, seed, top=top, alike=alike), decay, first),
        dtype=torch.float64,
        observe=lambda name, value: largest.__setitem__(name, float(value.abs().max())),
    )
    bounds = {s.output: s.bound for s in program.steps if s.bound is not None}
    assert len(bounds) > 15
    assert {n: (largest[n], b) for n, b in bounds.items() if largest[n] > b * (1 + 1e-12)} == {}


@forms
def test_what_meets_no_values_has_a_proved_range(decay, form, first, halves):
    """Key path, decays and inverse: only what values and states enter has none."""
    program = step(decay, form, first, halves)
    tainted = {"v", "state"}
    for s in program.steps:
        if tainted & {*s.inputs}:
            tainted.add(s.output)
        elif not s.output.startswith(("inverse/", "beta/turned", "beta/upper", "beta/lower")):
            assert s.bound is not None, s.output


def test_a_bound_that_is_too_small_would_be_seen():
    program = step("scalar", "folded", True, False)
    largest: dict[str, float] = {}
    program.execute(
        ports(chunks("scalar", 200, 0, alike=100.0), "scalar", True),
        dtype=torch.float64,
        observe=lambda name, value: largest.__setitem__(name, float(value.abs().max())),
    )
    bounds = {s.output: s.bound for s in program.steps if s.bound is not None}
    attained = {name for name, bound in bounds.items() if largest[name] > 0.95 * bound}
    assert {"M", "gram", "D", "T", "T/beta", "scores"} <= attained


@pytest.mark.parametrize("decay", Decay)
def test_no_exponent_is_positive_however_strong_the_decay(decay):
    program, c = step(decay, "folded", True, False), chunks(decay, 6, 1)
    given_ports = ports(c, decay, first=True)
    given_ports["g"] = 50 * given_ports["g"] - 30 * (torch.rand(given_ports["g"].shape) < 0.2)
    seen = {}
    found = program.execute(given_ports, dtype=torch.float64, observe=seen.__setitem__)
    for s in program.steps:
        if isinstance(s, Exponential):
            assert float(seen[s.source].max()) <= 0
            assert 0 <= float(seen[s.output].min()) <= float(seen[s.output].max()) <= 1
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_values_first_puts_values_on_the_left_of_every_product_they_enter():
    program = step("scalar", "folded", True, False)
    tainted = {"v", "state"}
    for s in program.steps:
        if isinstance(s, MatMul):
            assert s.right not in tainted, s.output
        if tainted & {*s.inputs}:
            tainted.add(s.output)
    # In the folded form only the old state is multiplied elementwise, by one number.
    assert [s.output for s in program.steps if isinstance(s, Multiply) and tainted & {*s.inputs}] == [
        "state/kept"
    ]


@forms
def test_programs_are_saved_and_recognized(decay, form, first, halves):
    program = step(decay, form, first, halves)
    assert program_from_json(program_to_json(program)) == program
    sizes = step_sizes(program)
    assert (sizes.chunk, sizes.key_size, sizes.value_size) == (C, KEYS, VALUES)
    assert (sizes.per_channel, sizes.values_first) == (decay == "channel", first)
    assert tuple(port.name for port in program.inputs) == INPUTS
    assert not program.is_inverse


def test_other_programs_are_no_chunk_steps():
    assert find_step_sizes(elimination(8)) is None
    with pytest.raises(ProgramError, match=r"elimination.* is not a whole chunk step: it takes M"):
        step_sizes(elimination(8))
    program = step("scalar", "folded", True, False)
    wrong = Port(name="v", shape=Shape(1, VALUES, C + 1))
    other = Program(
        name="x",
        chunk=C,
        inputs=tuple(wrong if port.name == "v" else port for port in program.inputs),
        outputs=tuple(
            Port(name=port.name, shape=p.shape, tensor=p.name)
            for port, p in zip(program.outputs, (program.inputs[2], program.inputs[5]), strict=True)
        )[1:],
        steps=(),
    )
    assert find_step_sizes(other) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inverse": block_merge(C, factored=True)}, "does not map M to S of T = I . S; pass for example"),
        ({"inverse": "elimination"}, "inverse str does not map M to S"),
        ({"form": "uw"}, "form 'uw' is unknown; use state, wy or folded"),
        ({"decay": "vector"}, "decay 'vector' is unknown; use scalar or channel"),
        ({"form": "wy", "halves": True}, "applies T to one tensor, but form 'wy' has two; use 'folded'"),
        ({"max_beta": 2.5}, r"max_beta 2.5 is not in \(0, 2\]; 1 fits gates that are sigmoids"),
        ({"max_beta": 0}, "max_beta 0 is not in"),
        ({"max_beta": "1"}, "max_beta '1' is not in"),
        ({"key_size": 0}, f"key_size 0 is not in \\[1, {MAX_SIZE}\\]"),
        ({"value_size": 2 * MAX_SIZE}, "value_size 2048 is not in"),
        ({"key_size": 64.0}, "key_size 64.0 is not in"),
        ({"inverse": elimination(1024), "halves": True}, r"chunk 2048 is not a power of two in \[2, 1024\]"),
    ],
)
def test_options_that_are_not_legal_are_refused(changes, words):
    options = {"inverse": elimination(C), "key_size": KEYS, "value_size": VALUES} | changes
    with pytest.raises(ProgramError, match=words):
        gated_delta_step(
            options.pop("inverse"), options.pop("key_size"), options.pop("value_size"), **options
        )


def test_it_is_a_public_name():
    assert qinvert.gated_delta_step is gated_delta_step
