from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inverse_programs import inverse_program

import qinvert
from qinvert.formats import INT8
from qinvert.methods import block_merge
from qinvert.metrics import ErrorStatistics, NoiseStatistics, floor_inverse, norm_share
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def unit(chunk: int = 4, count: int = 1, **entries: float) -> torch.Tensor:
    """Identity matrices with entries such as ``e10=0.5`` in the last one."""
    matrices = torch.eye(chunk, dtype=torch.float64).repeat(count, 1, 1)
    for place, value in entries.items():
        matrices[-1, int(place[1]), int(place[2])] = value
    return matrices


def measured(estimate: torch.Tensor, exact: torch.Tensor) -> ErrorStatistics:
    statistics = ErrorStatistics()
    statistics.update(estimate, exact)
    return statistics


@pytest.fixture(scope="module")
def plan() -> LayerPlan:
    return qinvert.calibrate(stress_matrices("half_random", 8, 16), method="block_merge").layer()


@pytest.mark.parametrize(("error", "decibels"), [(1.0, 0.0), (0.1, 20.0), (0.001, 60.0), (10.0, -20.0)])
def test_sqnr_is_twenty_log_of_the_ratio_below_the_diagonal(error, decibels):
    exact, estimate = unit(e10=1.0), unit(e10=1.0, e32=error)
    assert measured(estimate, exact).sqnr_db == pytest.approx(decibels)


@pytest.mark.parametrize(
    ("error", "decibels"), [(5.0, 0.0), (0.5, 20.0), (0.0, math.inf), (math.nan, -math.inf)]
)
def test_sqnr_of_vectors_counts_every_value(error, decibels):
    statistics = NoiseStatistics()
    for exact in (torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])):
        estimate = exact.clone()
        if exact.numel() == 1:
            estimate += error
        statistics.update(estimate, exact)
    assert statistics.sqnr_db == pytest.approx(decibels)


def test_sqnr_is_over_all_matrices_together():
    exact, estimate = unit(count=3, e10=3.0), unit(count=3, e10=3.0, e21=0.3)
    exact[0, 2, 0] = estimate[0, 2, 0] = 4.0
    assert measured(estimate, exact).sqnr_db == pytest.approx(20 * math.log10(5.0 / 0.3))


@pytest.mark.parametrize("place", ["e00", "e33", "e03", "e12"])
def test_the_diagonal_and_above_count_in_the_other_metrics_only(place):
    exact, estimate = unit(e10=1.0), unit(e10=1.0, **{place: 7.0})
    statistics = measured(estimate, exact)
    change = 7.0 - float(exact[0, int(place[1]), int(place[2])])
    assert statistics.sqnr_db == math.inf
    assert statistics.max_abs == change
    assert statistics.worst_rel == pytest.approx(change / math.sqrt(5.0))


def test_worst_rel_is_the_worst_matrix_relative_to_its_own_norm():
    exact = torch.cat([unit(e10=0.0), unit(e10=10.0)])
    estimate = torch.cat([unit(e10=1.0), unit(e10=12.0)])
    statistics = measured(estimate, exact)
    assert statistics.worst_rel == pytest.approx(1 / math.sqrt(4))
    assert statistics.max_abs == 2.0


@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 11)))
def test_streaming_gives_what_one_update_gives(seed, cuts):
    exact = torch.tril(torch.randn(12, 4, 4, generator=torch.Generator().manual_seed(seed)).double())
    estimate = exact + 0.01 * torch.randn(12, 4, 4, generator=torch.Generator().manual_seed(seed + 1))
    together, streamed = measured(estimate, exact), ErrorStatistics()
    edges = [0, *sorted(cuts), 12]
    for start, stop in pairwise(edges):
        streamed.update(estimate[start:stop], exact[start:stop])
    assert streamed.matrices == together.matrices == 12
    assert (streamed.worst_rel, streamed.max_abs) == (together.worst_rel, together.max_abs)
    assert streamed.sqnr_db == pytest.approx(together.sqnr_db, rel=1e-12)


def test_leading_dimensions_are_all_matrices():
    exact, estimate = unit(count=6, e10=1.0), unit(count=6, e10=1.5)
    nested = measured(estimate.reshape(2, 3, 4, 4), exact.reshape(2, 3, 4, 4))
    assert nested == measured(estimate, exact)
    assert nested.matrices == 6


def test_errors_are_taken_in_float64():
    exact = unit(e10=1.0)
    estimate = exact.float()
    exact[0, 1, 0] += 1e-12
    assert measured(estimate, exact).max_abs == pytest.approx(1e-12, rel=1e-3)


def test_no_error_is_infinite_sqnr_and_nothing_seen_too():
    assert measured(unit(e10=1.0), unit(e10=1.0)).sqnr_db == math.inf
    assert ErrorStatistics().sqnr_db == math.inf


def test_an_error_without_a_signal_is_minus_infinite_sqnr():
    assert measured(unit(e10=1.0), unit()).sqnr_db == -math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_ruins_every_metric(value):
    statistics = measured(unit(count=3, e10=value, e21=value), unit(count=3, e10=1.0))
    assert statistics.non_finite == 2
    assert statistics.sqnr_db == -math.inf
    assert statistics.worst_rel == statistics.max_abs == math.inf
    statistics.update(unit(e10=1.0), unit(e10=1.0))
    assert statistics.sqnr_db == -math.inf
    assert statistics.worst_rel == statistics.max_abs == math.inf


@pytest.mark.parametrize("place", ["e00", "e03"])
def test_what_is_not_finite_anywhere_is_minus_infinite_sqnr(place):
    statistics = measured(unit(e10=0.9, **{place: math.nan}), unit(e10=1.0))
    assert statistics.non_finite == 1
    assert statistics.sqnr_db == -math.inf


def test_the_floor_inverts_the_quantized_matrix_and_rounds_once(plan, solved):
    lower = stress_matrices("half_random", 8, 16)
    steps = np.rint(-lower.numpy() / np.float32(plan.input.scale)).clip(-128, 127)
    exact = solved(torch.from_numpy(-steps * np.float64(np.float32(plan.input.scale))))
    floor = floor_inverse(plan, Systems(lower=lower)).double()
    integers = torch.tril(floor, -1) / plan.output.scale
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert (floor - exact).abs().max() <= plan.output.scale * 0.501
    assert torch.equal(floor.diagonal(dim1=-2, dim2=-1), torch.ones(8, 16, dtype=torch.float64))
    assert not torch.triu(floor, 1).any()


def test_the_floor_is_the_plan_where_nothing_is_lost(plan):
    lower = torch.zeros(2, 16, 16)
    lower[:, 7, 3] = 40 * plan.input.scale
    assert torch.equal(floor_inverse(plan, Systems(lower=lower)), plan.inverse(lower))


def test_the_floor_keeps_leading_dimensions(plan):
    lower = stress_matrices("half_random", 6, 16)
    nested = floor_inverse(plan, Systems(lower=lower.reshape(2, 3, 16, 16)))
    assert torch.equal(nested.reshape(6, 16, 16), floor_inverse(plan, Systems(lower=lower)))


def test_the_floor_of_an_explicit_inverse_rounds_the_identity_too():
    grid = Quantization(format=INT8, scale=2.0**-8)
    program = inverse_program(identity=True)
    plan = LayerPlan(program=program, tensors={"M": grid}, requantize=Requantize.DIVIDE)
    floor = floor_inverse(plan, Systems(lower=torch.zeros(4, 4)))
    assert torch.equal(floor, torch.eye(4) * 127 / 256)


PUBLISHED = [
    ("half_random", "floor", 1.4e-2),
    ("half_random", 1, 1.7e-2),
    ("half_random", 4, 1.7e-2),
    ("half_random", 8, 1.8e-2),
    ("half_random", 16, 3.6e-2),
    ("beta_ones", "floor", 5.2e-3),
    ("beta_ones", 1, 1.3e-2),
    ("beta_ones", 4, 1.4e-2),
    ("beta_ones", 8, 4.9e-2),
]


def mean_relative_error(name: str, base: int | str) -> float:
    lower = stress_matrices(name, 32, 64)
    plan = qinvert.calibrate(lower, method=block_merge(64, 4 if base == "floor" else base)).layer()
    exact = qinvert.exact_inverse(lower)
    error = (floor_inverse(plan, Systems(lower=lower)) if base == "floor" else plan.inverse(lower)) - exact
    return float((torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)).mean())


@pytest.mark.parametrize(("name", "base", "published"), PUBLISHED)
def test_published_int8_errors(name, base, published):
    assert published / 1.3 < mean_relative_error(name, base) < published * 1.3


def test_powers_in_blocks_of_16_ruin_int8_on_one_repeated_key():
    assert mean_relative_error("beta_ones", 16) > 1


@pytest.mark.parametrize("name", ["half_random", "beta_ones", "wide_gates", "filled_blocks"])
def test_one_correction_reaches_the_floor(name):
    lower = stress_matrices(name, 16, 64)
    plan = qinvert.calibrate(lower, method=block_merge(64, 4, corrections=1)).layer()
    exact = qinvert.exact_inverse(lower)
    achieved = measured(plan.inverse(lower), exact).sqnr_db
    floor = measured(floor_inverse(plan, Systems(lower=lower)), exact).sqnr_db
    assert floor - 1 < achieved < floor + 1


@pytest.mark.parametrize(
    ("found", "wanted", "share"),
    [([3.0, 4.0], [3.0, 4.0], 0), ([0.0, 0.0], [0.0, 0.0], 0), ([3.0, 0.0], [3.0, 4.0], 0.8)],
)
def test_the_share_of_a_difference_is_that_of_the_wanted_norm(found, wanted, share):
    assert norm_share(torch.tensor(found), torch.tensor(wanted)) == pytest.approx(share)


def test_the_share_of_a_difference_of_what_is_not_finite_passes_no_limit():
    assert not norm_share(torch.tensor([math.nan]), torch.tensor([1.0])) <= 1
    assert not norm_share(torch.tensor([1.0]), torch.tensor([0.0])) <= 1
    # Its norm in float32 is infinite, and every share of it would be 0.
    assert norm_share(torch.tensor([2e38, 2e38]), torch.tensor([1e38, 1e38])) == pytest.approx(1)
