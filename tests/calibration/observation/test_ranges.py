import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qinvert.calibration.observation.ranges import RangeObserver, RangeQueue, magnitudes
from qinvert.methods import block_merge, neumann_doubling
from qinvert.stress import stress_matrices

PROGRAMS = (block_merge(8, 2), neumann_doubling(8))


def parts_of(counts):
    return [-stress_matrices("correlated_keys", n, 8, seed=i) * (i + 1) for i, n in enumerate(counts)]


def test_magnitudes_are_those_of_every_matrix_alone():
    (part,) = parts_of([5])
    together = magnitudes(PROGRAMS[0], {"M": part})
    for i in range(5):
        alone = magnitudes(PROGRAMS[0], {"M": part[i : i + 1]})
        assert {name: float(values[0]) for name, values in alone.items()} == pytest.approx(
            {name: float(values[i]) for name, values in together.items()}, rel=1e-6
        )


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    layers=st.integers(1, 3),
    capacity=st.sampled_from([1, 50, 1024]),
)
def test_layers_that_share_a_queue_have_the_ranges_of_their_own_matrices(counts, layers, capacity):
    queue = RangeQueue(capacity)
    shared = [[RangeObserver(p) for p in PROGRAMS] for _ in range(layers)]
    alone = [[RangeObserver(p) for p in PROGRAMS] for _ in range(layers)]
    for i, part in enumerate(parts_of(counts)):
        queue.add(shared[i % layers], {"M": part})
        for observer in alone[i % layers]:
            observer.update({"M": part})
    queue.flush()
    observers = [observer for layer in shared for observer in layer]
    for found, wanted in zip(observers, (observer for layer in alone for observer in layer), strict=True):
        assert found.ranges == pytest.approx(wanted.ranges, rel=1e-6)
    # A second flush has nothing to run on.
    before = [dict(observer.ranges) for observer in observers]
    queue.flush()
    assert [observer.ranges for observer in observers] == before


def test_matrices_wait_until_there_are_enough():
    queue, observer = RangeQueue(10), RangeObserver(PROGRAMS[0])
    (part,) = parts_of([9])
    queue.add([observer], {"M": part})
    assert observer.ranges["M"] == 0
    queue.add([observer], {"M": part[:1]})
    assert observer.ranges["M"] == pytest.approx(float(part.abs().max()))


def test_an_overflow_of_one_layer_is_not_that_of_another():
    queue, first, second = RangeQueue(), RangeObserver(PROGRAMS[1]), RangeObserver(PROGRAMS[1])
    queue.add([first], {"M": -torch.tril(torch.full((1, 8, 8), 1e30), -1)})
    queue.add([second], {"M": parts_of([3])[0]})
    queue.flush()
    assert math.isinf(first.ranges["power_2"])
    assert math.isfinite(second.ranges["power_2"])
