import pytest
import torch

import qinvert
from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.calibration.planning.clipping import RangeRule, clip_ranges
from qinvert.formats import INT4, INT8
from qinvert.methods import block_merge
from qinvert.stress import stress_matrices
from qinvert.systems import Systems


def ranges_of(program, lower):
    observer = RangeObserver(program)
    observer.update({"M": -lower})
    return observer.ranges


def clipped(lower, rule, fmt=INT8):
    program = block_merge(lower.shape[-1], 4)
    ranges = ranges_of(program, lower)
    return ranges, clip_ranges(
        program, ranges, Systems(lower=lower), dict.fromkeys(program.tensors, fmt), rule
    )


def test_max_keeps_every_range():
    before, after = clipped(stress_matrices("outlier", 32, 16), RangeRule.MAX)
    assert before == after


def test_a_percentile_covers_all_but_one_in_ten_thousand():
    lower = stress_matrices("outlier", 1024, 16)
    before, after = clipped(lower, RangeRule.PERCENTILE)
    magnitudes = lower.abs()[lower != 0]
    share = float((magnitudes > after["M"]).float().mean())
    assert 0 < share < 3e-4
    assert after["M"] < before["M"] / 5


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
def test_mse_takes_the_range_with_the_least_error(fmt):
    lower = stress_matrices("outlier", 64, 16)
    before, after = clipped(lower, RangeRule.MSE, fmt)
    values = lower[lower != 0].double()

    def error(limit):
        scale = limit / fmt.largest
        rounded = torch.clamp(torch.round(values / scale), fmt.minimum, fmt.maximum) * scale
        return float((rounded - values).square().sum())

    best = min((before["M"] * share / 100 for share in range(1, 101)), key=error)
    assert error(after["M"]) <= 1.1 * error(best)
    assert error(after["M"]) <= error(before["M"])


def test_tensors_of_one_grid_are_clipped_together():
    _, after = clipped(stress_matrices("outlier", 32, 16), RangeRule.MSE)
    shared = [after[name] for name in ("merge_8/S11", "merge_8/S", "merge_16/S") if name in after]
    assert max(shared) == max(after[name] for name in after if name.startswith("merge_16/S"))


def test_clipping_helps_where_one_value_dominates_int4():
    lower = stress_matrices("outlier", 64, 32)
    sqnr = {
        rule: qinvert.simulate(qinvert.calibrate(lower, bits=4, ranges=rule), lower).layers["layer"].sqnr_db
        for rule in ("auto", "max", "mse", "percentile")
    }
    assert sqnr["auto"] == sqnr["mse"] > sqnr["max"] + 1


@pytest.mark.parametrize(("bits", "rule"), [(4, "mse"), (8, "max"), (16, "max"), ("auto", "max")])
def test_only_int4_is_clipped_by_default(bits, rule):
    plan = qinvert.calibrate(stress_matrices("outlier", 8, 16), bits=bits)
    assert plan.provenance["ranges"] == rule
    named = qinvert.calibrate(stress_matrices("outlier", 8, 16), bits=bits, ranges=rule)
    assert plan.layer().tensors == named.layer().tensors
