"""A new runtime is one new module: a file that is found, listed, and verifies graphs."""

import re
import sys
from contextlib import ExitStack

import pytest
from added_modules import added

import qinvert
from qinvert.errors import ExportError, VerificationError
from qinvert.export import runtimes
from qinvert.stress import stress_matrices

TOY = '''"""The reference evaluator of onnx."""

import onnx
from onnx.reference import ReferenceEvaluator

from qinvert.export.runtimes.runtime import Execution, Runtime


def execute(content, feeds):
    session = ReferenceEvaluator(onnx.load_model_from_string(content))
    outputs = [session.run(None, dict(feed))[0] for feed in feeds]
    yield Execution(setting="reference", outputs=outputs)


RUNTIME = Runtime(
    name="toy", execute=execute, summary="written to be read", module="onnx", requirement="onnx"
)
'''
#: The same, wrong by one in row 5, column 2 of matrix 3 of the second call.
BROKEN = TOY.replace("    yield", "    outputs[1][0, 3, 5, 2] += 1\n    yield")
MODULE = f"{runtimes.__name__}.toy"
BATCH = 4


@pytest.fixture
def add(tmp_path):
    """Return a function that adds the file of a runtime to the package."""

    with ExitStack() as stack:
        yield lambda text: stack.enter_context(added(runtimes.__name__, tmp_path, toy=text)).discover()


@pytest.fixture(params=["int-ops", "npu-qdq-int8"])
def exported(request, tmp_path):
    """A graph that returns integers: wrong by one is wrong by a step."""
    lower = stress_matrices("correlated_keys", 6, 16)
    plan = qinvert.calibrate(lower, target=request.param, scales="pow2")
    qinvert.export(plan, tmp_path / "t.onnx", batch=BATCH, output="integers")
    return tmp_path / "t.onnx", plan, lower


def test_one_file_is_a_runtime(add, exported):
    path, plan, lower = exported
    add(TOY)
    assert runtimes.RUNTIMES["toy"].summary == "written to be read"
    assert "toy" in runtimes.installed()
    (result,) = qinvert.verify(path, plan, lower, runtimes=("toy",))
    assert result.runtime == "toy (reference)"
    assert (result.values, result.mismatches, result.exact) == (2 * BATCH * 16 * 16, 0, True)


def test_it_runs_beside_the_others(add, exported):
    path, plan, lower = exported
    add(TOY)
    results = qinvert.verify(path, plan, lower, runtimes=("onnxruntime", "toy"))
    assert [result.runtime for result in results][-1] == "toy (reference)"
    assert len({result.sqnr_db for result in results}) == 1


def test_one_that_is_wrong_by_one_is_refused_with_the_first_element(add, exported):
    path, plan, lower = exported
    add(BROKEN)
    with pytest.raises(VerificationError) as refused:
        qinvert.verify(path, plan, lower, runtimes=("toy",))
    # Matrix 3 of the second call of 4.
    said = re.search(
        r"toy \(reference\) differs from the simulator in 1 of 2048 values, by up to 1 steps; "
        r"first at \[7, 5, 2\]: (?:np\.int8\()?(-?\d+)\)? instead of (?:np\.int8\()?(-?\d+)\)?; ",
        str(refused.value),
    )
    assert said is not None, refused.value
    assert int(said[1]) - int(said[2]) == 1


def test_two_of_one_name_are_refused_and_the_table_stays(add):
    with pytest.raises(ExportError, match="both define 'tvm'; rename one of them"):
        add(TOY.replace('name="toy"', 'name="tvm"'))
    assert runtimes.RUNTIMES["tvm"].module == "tvm"


def test_something_else_of_that_name_is_refused(add):
    with pytest.raises(ExportError, match=r"toy defines no RUNTIME of type Runtime; add RUNTIME = Runtime"):
        add("RUNTIME = 'toy'")


def test_nothing_of_it_is_left(exported):
    path, plan, lower = exported
    assert MODULE not in sys.modules
    assert "toy" not in runtimes.RUNTIMES
    with pytest.raises(ExportError, match="unknown runtime 'toy'"):
        qinvert.verify(path, plan, lower, runtimes=("toy",))
