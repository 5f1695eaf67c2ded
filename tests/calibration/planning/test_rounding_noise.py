from __future__ import annotations

from inverse_programs import inverse_program

from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.calibration.planning.rounding_noise import settle_residues
from qinvert.formats import INT8
from qinvert.methods import block_merge
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import Add, Rescale
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

LOWER = stress_matrices("half_random", 8, 16)


def ranges_of(program: Program) -> dict[str, float]:
    observer = RangeObserver(program)
    observer.update({"M": -LOWER})
    return observer.ranges


def test_the_residual_of_a_correction_gets_the_range_of_rounding_errors():
    program = block_merge(16, 4, corrections=1)
    before = ranges_of(program)
    after = settle_residues(program, before, Systems(lower=LOWER), dict.fromkeys(program.tensors, INT8))
    assert before["correction_1/R"] < 1e-5
    assert 1e-3 < after["correction_1/R"] < 1
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"correction_1/R", "correction_1/update"}


def test_factors_count_in_what_the_residue_is_left_of():
    # Next to zero in a float run, rounding errors in integers, and as large as M without the factors.
    steps = (
        Rescale(output="half", source=MATRIX, factor=0.5),
        Rescale(output="negated", source=MATRIX, factor=-1.5 - 2.0**-12),
        Add(output="sum", left="half", right=MATRIX),
        Add(output="rest", left="sum", right="negated"),
    )
    program = inverse_program(*steps, chunk=16, output="rest")
    ranges = ranges_of(program)
    assert ranges["rest"] < 1e-3 * ranges[MATRIX]
    # On its own range the sum would have the integers of M and round nothing.
    settled = settle_residues(
        program,
        ranges | {"sum": 1.3 * ranges["sum"]},
        Systems(lower=LOWER),
        dict.fromkeys(program.tensors, INT8),
    )
    assert 2 * ranges["rest"] < settled["rest"] < 0.1 * ranges[MATRIX]
