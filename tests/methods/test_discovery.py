from __future__ import annotations

import pytest
from added_modules import added

import qinvert
from qinvert import methods
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.errors import ProgramError
from qinvert.methods import METHODS, REGISTRY, Method
from qinvert.stress import stress_matrices

TOY = '''
"""Two terms of the Neumann series."""

from qinvert.methods._builder import Builder
from qinvert.methods._method import Method


def toy(chunk, scaled=0):
    builder = Builder(chunk)
    total = builder.matmul("S", builder.matrix, builder.matrix, add=(builder.matrix,))
    return builder.program("toy", {}, total)


METHOD = Method(
    name="toy", build=toy, candidates=lambda chunk: (toy(chunk),), automatic=lambda chunk: (toy(chunk),)
)
'''
LOWER = stress_matrices("independent_keys", 8, 16)


@pytest.fixture
def toy(tmp_path):
    with added("qinvert.methods", tmp_path, toy=TOY) as package:
        yield package.discover()["toy"]


def test_a_method_of_one_file_is_planned_simulated_and_exported(toy, tmp_path):
    plan = qinvert.calibrate(LOWER, method="toy", min_sqnr_db=0)
    assert plan.layer().program == toy.build(16)
    assert plan.layer().program.title == "toy(chunk=16)"
    assert qinvert.simulate(plan, LOWER).layers["layer"].sqnr_db > 10
    qinvert.export(plan, tmp_path / "t.onnx")
    assert all(result.max_steps <= 1 for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER))


def test_a_method_of_one_file_is_a_function_a_name_and_a_candidate(toy):
    assert methods.find_method("toy") is methods.toy is METHODS["toy"] is toy.build
    # Equal ranks are in the order of names; the package's own come first and references last.
    assert list(METHODS) == list(REGISTRY)
    assert list(METHODS)[-4:] == ["newton_schulz", "toy", "forward_substitution", "column_sweep"]
    assert [p.title for p in candidate_programs("auto", 16)][-2:] == [
        "banded_residual(chunk=16, order=8, steps=2)",
        "toy(chunk=16)",
    ]
    with pytest.raises(ProgramError, match="'toy' has no factored form; use auto or block_merge"):
        candidate_programs("toy", 16, factored=True)


def test_a_method_is_unknown_once_its_folder_is_gone(tmp_path):
    before = dict(REGISTRY)
    with added("qinvert.methods", tmp_path, toy=TOY) as package:
        package.discover()
        assert METHODS.keys() - before.keys() == {"toy"}
    assert list(REGISTRY.items()) == list(before.items())
    with pytest.raises(ProgramError, match="unknown method 'toy'"):
        qinvert.calibrate(LOWER, method="toy")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def toy(chunk): ...",
            r"qinvert\.methods\.toy defines no METHOD of type Method; add METHOD = Method",
        ),
        (TOY.replace("METHOD = Method", "METHOD = dict"), r"qinvert\.methods\.toy defines no METHOD"),
        ("from qinvert.methods.neumann import METHOD", r"neumann and .*\.toy both define 'neumann'; rename"),
        (TOY.replace('name="toy"', 'name="auto"'), r"method name 'auto' is not a Python name other than"),
        (TOY.replace('name="toy"', 'name="to-y"'), r"method name 'to-y' is not a Python name"),
        (
            TOY.replace('name="toy"', 'name="other"'),
            r"method 'other' is built by <function toy.*give both the same",
        ),
        (TOY.replace("automatic=", "sequential=True, automatic="), r"'toy' is sequential, and the planner"),
    ],
)
def test_a_module_that_is_no_method_is_refused_and_changes_nothing(source, message, tmp_path):
    before = dict(REGISTRY)
    with added("qinvert.methods", tmp_path, toy=source) as package:
        with pytest.raises(ProgramError, match=message):
            package.discover()
        assert list(REGISTRY.items()) == list(before.items())
        assert {name: method.build for name, method in before.items()} == METHODS


@pytest.mark.parametrize("method", REGISTRY.values(), ids=REGISTRY)
@pytest.mark.parametrize("chunk", [2, 4, 64])
def test_candidates_are_programs_of_the_method(method: Method, chunk):
    programs = [*method.candidates(chunk)]
    programs += method.automatic(chunk) if method.automatic else ()
    programs += method.factored(chunk, True) if method.factored else ()
    assert {(program.name, program.chunk) for program in programs} == {(method.name, chunk)}
