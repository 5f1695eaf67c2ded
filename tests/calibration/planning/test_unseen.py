import numpy as np
import pytest
import torch

import qinvert
from qinvert.calibration.observation.held_out import FEWEST, held_out
from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning.unseen import interval, measure_unseen
from qinvert.cautions import DataWarning
from qinvert.methods import block_merge
from qinvert.metrics import ErrorStatistics
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def observed(lower, capacity=16, heads=None):
    observer = LayerObserver([block_merge(lower.shape[-1], 4)], capacity, 0)
    observer.update(Systems(lower=lower), heads)
    return observer


def rows(lower):
    return {tuple(x) for x in lower.flatten(1).tolist()}


def test_held_out_matrices_are_none_of_the_sample():
    observer = observed(stress_matrices("correlated_keys", 200, 16))
    held = held_out(observer.sample, observer.held)
    assert held.apart
    assert held.systems.count == 32
    assert not rows(held.systems.lower) & rows(observer.sampled.lower)


@pytest.mark.parametrize("count", [5, 16, 16 + FEWEST - 1])
def test_of_few_matrices_none_is_held_out_and_all_are_measured(count):
    observer = observed(stress_matrices("correlated_keys", count, 16))
    held = held_out(observer.sample, observer.held)
    assert not held.apart
    assert held.systems.count == count


def test_every_matrix_keeps_its_head():
    lower = stress_matrices("correlated_keys", 60, 16)
    lower[:, 1, 0] = torch.arange(60) / 100
    held = held_out(*(lambda o: (o.sample, o.held))(observed(lower, heads=torch.arange(60) % 3)))
    numbers = (held.systems.lower[:, 1, 0] * 100).round().long()
    assert torch.equal(held.heads, numbers % 3)


def test_the_figure_is_the_sqnr_of_the_simulated_plan():
    lower = stress_matrices("correlated_keys", 40, 16)
    plan = qinvert.calibrate(lower).layer()
    observer = observed(lower, capacity=64)
    held = held_out(observer.sample, observer.held)
    expected = ErrorStatistics()
    expected.update(plan.inverse(held.systems.lower), held.systems.inverse())
    found = measure_unseen(plan, held)
    assert found.sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-5)
    assert found.low_db <= found.sqnr_db <= found.high_db


def test_intervals_hold_the_true_ratio_where_four_matrices_each_are_alike():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        signal, noise = (np.repeat(rng.lognormal(0, 1, 32), 4) for _ in range(2))
        low, high = interval(signal, 0.01 * noise)
        inside += low <= 20 <= high
    assert 80 <= inside <= 98


def test_an_interval_is_wide_where_few_matrices_decide():
    signal = np.full(64, 1.0)
    rare = np.where(np.arange(64) == 0, 1000.0, 1.0)
    assert np.ptp(interval(signal, 0.01 * signal)) < 1e-9
    assert np.ptp(interval(rare, 0.01 * signal)) > 6


def test_a_sample_that_is_too_small_for_its_tail_warns():
    lower = 0.2 * stress_matrices("correlated_keys", 100, 16)
    lower[7] *= 5
    with pytest.warns(DataWarning, match="too small for its tail"):
        qinvert.calibrate(lower)


def test_a_sample_without_a_tail_does_not_warn(recwarn):
    plan = qinvert.calibrate(stress_matrices("correlated_keys", 200, 16))
    assert plan.layer().provenance["unseen"]["held_out"]
    assert not [w for w in recwarn if issubclass(w.category, DataWarning)]


def test_advice_rests_on_a_simulation_of_the_wider_format():
    # Most matrices are tiny: what a few of them predict is far from what all reach.
    lower = stress_matrices("correlated_keys", 192, 32)
    lower[12:] *= 0.01
    facts = qinvert.calibrate(lower, bits=4, min_sqnr_db=24).layer().provenance
    advised = float(facts["fix"].split("should reach ")[1].split(" dB")[0])
    reached = qinvert.simulate(qinvert.calibrate(lower, bits=8, min_sqnr_db=24), lower).worst_sqnr_db
    assert abs(advised - reached) < 3
