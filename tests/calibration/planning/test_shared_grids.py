"""Programs whose tensors share grids: their floor, their groups, and when residues are looked for."""

import pytest
import torch

from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning import rounding_noise
from qinvert.calibration.planning.rounding_noise import settle_residues
from qinvert.calibration.planning.scales import scale_groups
from qinvert.calibration.planning.sensitivity import measure_sensitivities
from qinvert.formats import INT8
from qinvert.methods import block_merge, elimination
from qinvert.metrics import ErrorStatistics, floor_inverse
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.residual_sums import residual_sums, residuals_as_sums
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

CHUNK = 16
SYSTEMS = Systems(lower=stress_matrices("correlated_keys", 8, CHUNK))
FORMS = [elimination(CHUNK), block_merge(CHUNK, 1, layout="masked"), elimination(CHUNK, tile=8)]


def grids_of(program, scale=1 / 127):
    return dict.fromkeys(program.tensors, Quantization(format=INT8, scale=float32(scale)))


def floor_of(program):
    noise = measure_sensitivities(program, [grids_of(program)], SYSTEMS)
    return noise.floor_db(dict.fromkeys(scale_groups(program).values(), INT8))


@pytest.mark.parametrize("program", FORMS, ids=lambda program: program.title)
def test_the_floor_does_not_depend_on_what_else_shares_the_grid_of_m(program):
    sums = residuals_as_sums(program)
    # Everything that M flows into has its grid; its own rounding is still measured by itself.
    assert len(set(scale_groups(sums).values())) < len(set(scale_groups(program).values()))
    assert floor_of(sums) == pytest.approx(floor_of(program), abs=0.2)
    # And it is the floor of an exact inverse on these grids.
    plan = LayerPlan(program=sums, tensors=grids_of(sums), requantize=Requantize.MULTIPLIER)
    measured = ErrorStatistics()
    measured.update(floor_inverse(plan, SYSTEMS), SYSTEMS.inverse())
    assert floor_of(sums) == pytest.approx(measured.sqnr_db, abs=1)


@pytest.mark.parametrize("program", FORMS, ids=lambda program: program.title)
def test_the_tensors_of_a_residual_sum_share_one_grid(program):
    groups = scale_groups(residuals_as_sums(program))
    for step in residual_sums(residuals_as_sums(program)):
        assert len({groups[name] for name in (step.output, *step.inputs)}) == 1


def observed(program):
    observer = LayerObserver([program], 64, 0)
    observer.update(SYSTEMS)
    return observer.ranges(program)


def test_residues_are_looked_for_only_where_a_tensor_is_small_enough_for_one(monkeypatch):
    runs = []

    class Counting(rounding_noise._ResidueEvaluator):
        def __init__(self, *arguments):
            runs.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(rounding_noise, "_ResidueEvaluator", Counting)
    for program, expected in (
        (residuals_as_sums(elimination(CHUNK)), 0),
        (block_merge(CHUNK, 4), 0),
        (block_merge(CHUNK, 4, corrections=1), 1),
    ):
        runs.clear()
        ranges, formats = observed(program), dict.fromkeys(program.tensors, INT8)
        settled = settle_residues(program, ranges, SYSTEMS, formats)
        assert len(runs) == expected
        changed = {name for name in ranges if settled[name] != ranges[name]}
        # Without a run the answer is the same as with one: nothing is widened.
        assert bool(changed) == bool(expected)
        assert all(settled[name] > ranges[name] for name in changed)


def test_without_the_shortcut_nothing_else_comes_out(monkeypatch):
    program = block_merge(CHUNK, 4)
    ranges, formats = observed(program), dict.fromkeys(program.tensors, INT8)
    quick = settle_residues(program, ranges, SYSTEMS, formats)
    # Every tensor that stands alone is followed, which takes the run.
    monkeypatch.setattr(rounding_noise, "SMALL", 1e9)
    full = settle_residues(program, ranges, SYSTEMS, formats)
    assert quick == full == ranges
    assert torch.isfinite(torch.tensor(list(full.values()))).all()
