import pytest

from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.errors import ProgramError
from qinvert.methods import REGISTRY
from qinvert.plan.quantization import Requantize
from qinvert.program.steps import MatMul

SHORT = ["neumann(chunk=64, order=1)", "neumann(chunk=64, order=2)", "neumann(chunk=64, order=3)"]
MERGES = [
    "block_merge(chunk=64, base=16)",
    "block_merge(chunk=64, base=8, tile=16)",
    "block_merge(chunk=64, base=4, tile=16)",
    "block_merge(chunk=64, base=2, tile=16)",
    "block_merge(chunk=64, base=16, corrections=1)",
    "block_merge(chunk=64, base=8, tile=16, corrections=1)",
    "block_merge(chunk=64, base=4, tile=16, corrections=1)",
    "block_merge(chunk=64, base=2, tile=16, corrections=1)",
]
#: Titles in order, by method: plans list their candidates, and of equals the first is taken.
TITLES = {
    "auto": [*SHORT, *MERGES, "banded_residual(chunk=64, order=3, steps=8)"],
    "block_merge": MERGES,
    "elimination": [
        "elimination(chunk=64)",
        "elimination(chunk=64, corrections=1)",
        "elimination(chunk=64, tile=16)",
        "elimination(chunk=64, tile=16, corrections=1)",
        "elimination(chunk=64, restart=4)",
        "elimination(chunk=64, side=right, radix=4, residuals=sums)",
    ],
    "banded_residual": [
        "banded_residual(chunk=64, order=1, steps=16)",
        "banded_residual(chunk=64, order=1, steps=32)",
        "banded_residual(chunk=64, order=3, steps=8)",
        "banded_residual(chunk=64, order=3, steps=16)",
        "banded_residual(chunk=64, order=7, steps=4)",
        "banded_residual(chunk=64, order=7, steps=8)",
    ],
    "neumann": ["neumann(chunk=64, order=15)"],
    "neumann_doubling": ["neumann_doubling(chunk=64)"],
    "newton_schulz": ["newton_schulz(chunk=64, iterations=12)"],
    "forward_substitution": ["forward_substitution(chunk=64)"],
    "column_sweep": ["column_sweep(chunk=64)"],
}
#: Of ``auto``, for chunks so small that some candidates do not exist.
SMALL = {
    2: [
        "neumann(chunk=2, order=1)",
        "block_merge(chunk=2, base=2)",
        "block_merge(chunk=2, base=2, corrections=1)",
    ],
    4: [
        "neumann(chunk=4, order=1)",
        "neumann(chunk=4, order=2)",
        "neumann(chunk=4, order=3)",
        "block_merge(chunk=4, base=4)",
        "block_merge(chunk=4, base=2, layout=masked)",
        "block_merge(chunk=4, base=4, corrections=1)",
        "block_merge(chunk=4, base=2, layout=masked, corrections=1)",
        "banded_residual(chunk=4, order=2, steps=2)",
    ],
}
FACTORED = "block_merge(chunk=64, base=2, layout=masked, factored=True)"
CORRECTED = "block_merge(chunk=64, base=2, layout=masked, corrections=1, factored=True)"


def titles(method, chunk, *arguments):
    return [program.title for program in candidate_programs(method, chunk, *arguments)]


@pytest.mark.parametrize("method", TITLES)
def test_candidates_come_in_this_order(method):
    assert titles(method, 64) == TITLES[method]


def test_every_method_is_in_the_table():
    assert TITLES.keys() == {"auto", *REGISTRY}


@pytest.mark.parametrize("chunk", SMALL)
def test_small_chunks_leave_fewer_candidates(chunk):
    assert titles("auto", chunk) == SMALL[chunk]


@pytest.mark.parametrize("method", ["auto", "block_merge"])
def test_factored_candidates_come_in_this_order(method):
    assert titles(method, 64, True) == titles(method, 64, True, Requantize.DIVIDE) == [FACTORED, CORRECTED]
    assert titles(method, 64, True, Requantize.MULTIPLIER) == [FACTORED]


def has_free_residuals(program):
    products = [step for step in program.steps if isinstance(step, MatMul)]
    return any({*p.add, *p.subtract} - {p.left, p.right} for p in products)


@pytest.mark.parametrize("method", [m for m in REGISTRY.values() if m.factored], ids=lambda m: m.name)
def test_factored_candidates_have_free_residuals_only_where_they_may(method):
    assert not any(map(has_free_residuals, method.factored(64, False)))
    assert any(map(has_free_residuals, method.factored(64, True)))


@pytest.mark.parametrize("method", sorted(REGISTRY.keys() - {"block_merge"}))
def test_other_methods_have_no_factored_form(method):
    with pytest.raises(ProgramError, match=f"'{method}' has no factored form; use auto or block_merge"):
        candidate_programs(method, 64, factored=True)


@pytest.mark.parametrize("factored", [False, True])
def test_an_unknown_method_is_refused(factored):
    with pytest.raises(ProgramError, match=r"unknown method 'magic'; use one of block_merge, .*, auto, or"):
        candidate_programs("magic", 64, factored)
