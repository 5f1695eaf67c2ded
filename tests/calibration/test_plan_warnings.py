import pytest

import qinvert
from qinvert.calibration.plan_warnings import REACH, beyond_reach, reach
from qinvert.cautions import MissedGoalWarning
from qinvert.formats import FORMATS, INT4, INT8, INT16
from qinvert.profiles import PROFILES
from qinvert.stress import stress_matrices

LOWER = stress_matrices("correlated_keys", 24, 32)


def test_a_missed_goal_warns_with_what_was_reached_and_what_helps():
    with pytest.warns(MissedGoalWarning, match=r"layer 'layer' misses its goal: \d+\.\d dB; .*bits="):
        plan = qinvert.calibrate(LOWER, min_sqnr_db=45)
    assert not plan.layer().provenance["meets_goal"]


def test_a_goal_that_is_met_does_not_warn(recwarn):
    assert qinvert.calibrate(LOWER, min_sqnr_db=15).layer().provenance["meets_goal"]
    assert not [w for w in recwarn if issubclass(w.category, MissedGoalWarning)]


def test_a_goal_beyond_the_types_of_the_target_says_at_once_which_target_reaches_it():
    class ReadError(Exception):
        pass

    def source():
        raise ReadError
        yield LOWER

    # The warning comes before the first matrix is read.
    with (
        pytest.warns(MissedGoalWarning, match=r"npu-qdq-int8.*pass target='npu-qdq-int16'"),
        pytest.raises(ReadError),
    ):
        qinvert.calibrate(source(), min_sqnr_db=60, target="npu-qdq-int8")


def test_the_target_that_is_named_reaches_the_goal():
    with pytest.warns(MissedGoalWarning, match="npu-qdq-int16"):
        qinvert.calibrate(LOWER, min_sqnr_db=60)
    plan = qinvert.calibrate(LOWER, min_sqnr_db=60, target="npu-qdq-int16")
    assert plan.layer().provenance["meets_goal"]


def test_warnings_name_the_line_of_the_caller(recwarn):
    qinvert.calibrate(LOWER, min_sqnr_db=60)
    found = [w for w in recwarn if issubclass(w.category, MissedGoalWarning)]
    assert [w.filename for w in found] == [__file__, __file__]


def test_a_target_with_wider_types_is_told_to_use_them():
    assert "bits='auto'" in beyond_reach(60, PROFILES["npu-qdq-int16"], (INT8,))
    assert beyond_reach(60, PROFILES["npu-qdq-int16"], (INT8, INT16)) == ""
    assert "no target reaches it" in beyond_reach(200, PROFILES["npu-qdq-int16"], (INT16,))


def test_reach_is_that_of_values_spread_over_the_grid():
    for name in ("int4", "int8", "int16"):
        uniform = 10 * __import__("math").log10(4 * FORMATS[name].largest ** 2)
        assert REACH[name] == pytest.approx(uniform, abs=0.6)
    assert reach((INT4, INT8)) == REACH["int8"]
