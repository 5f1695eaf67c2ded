import gc
import math

import pytest
import torch

from qinvert.calibration.growth import range_growth
from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.calibration.observation.statistics import LayerObserver, MatrixSample
from qinvert.matrices import exact_inverse
from qinvert.methods import block_merge, neumann, neumann_doubling
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def test_ranges_are_the_largest_magnitudes_over_all_batches():
    lower = stress_matrices("correlated_keys", 12, 16)
    observer = RangeObserver(neumann(16, order=3))
    for part in lower.split(5):
        observer.update({"M": -part})
    square = (lower.double() @ lower.double()).abs().max()
    assert observer.ranges["M"] == pytest.approx(float(lower.abs().max()))
    assert observer.ranges["power_2"] == pytest.approx(float(square), rel=1e-5)


def test_an_overflow_makes_the_range_infinite():
    observer = RangeObserver(neumann_doubling(16))
    observer.update({"M": -torch.tril(torch.full((1, 16, 16), 1e30), -1)})
    assert math.isinf(observer.ranges["power_2"])


def test_a_sample_is_bounded_uniform_and_independent_of_batching():
    lower = torch.arange(1000.0).reshape(-1, 1, 1).expand(-1, 2, 2)
    whole, parts = MatrixSample(100, seed=3), MatrixSample(100, seed=3)
    whole.update(Systems(lower=lower))
    for part in lower.split(7):
        parts.update(Systems(lower=part))
    first = sorted(whole.systems.lower[:, 0, 0].tolist())
    assert len(set(first)) == 100
    assert first == sorted(parts.systems.lower[:, 0, 0].tolist())
    # Mean of 100 draws from 0..999: standard deviation 29.
    assert abs(sum(first) / 100 - 499.5) < 120


def test_a_sample_of_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="no matrix"):
        _ = MatrixSample(4, seed=0).systems


def live_tensor_bytes():
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_data():
    observer = LayerObserver([block_merge(16)], capacity=32, seed=0)
    sizes = []
    for seed in range(20):
        observer.update(Systems(lower=stress_matrices("independent_keys", 64, 16, seed=seed)))
        if seed in (0, 19):
            sizes.append(live_tensor_bytes())
    assert observer.matrices == 20 * 64
    assert observer.sample.systems.count == 32
    # Keeping one batch alive would add 65,536 bytes.
    assert sizes[-1] - sizes[0] < 10_000


def test_growth_compares_powers_with_the_inverse():
    lower = stress_matrices("repeated_keys", 8, 64)
    growth = range_growth([("a", lower[:4]), ("b", lower), ("a", lower[4:])])
    assert list(growth) == ["a", "b"]
    assert growth["a"] == growth["b"]
    result = growth["a"]
    assert result.matrices == 8
    assert result.inverse == pytest.approx(float(torch.tril(exact_inverse(lower), -1).abs().max()))
    assert list(result.powers) == [1, 2, 4, 8, 16, 32]
    power_4 = torch.linalg.matrix_power(lower.double(), 4).abs().max()
    assert result.powers[4] == pytest.approx(float(power_4), rel=1e-4)
    assert result.growth > 1e6
