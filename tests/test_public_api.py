import importlib
import inspect
import pydoc
import subprocess
import sys

import pytest

import qinvert
from qinvert.errors import QInvertError

CONTRACT = (
    "Plan banded_residual block_merge calibrate column_sweep elimination evaluate exact_inverse export "
    "forward_substitution neumann neumann_doubling newton_schulz patched simulate verify"
)
HEAVY = {"torch", "numpy", "scipy", "onnx", "onnxruntime", "transformers"}


@pytest.mark.parametrize("name", CONTRACT.split())
def test_the_contract_is_public(name):
    assert callable(getattr(qinvert, name))
    assert name in qinvert.__all__


def test_every_public_name_exists_and_dir_lists_it():
    assert dir(qinvert) == sorted(qinvert.__all__)
    for name in qinvert.__all__:
        assert getattr(qinvert, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = qinvert.nope


def test_every_error_is_one_error():
    errors = importlib.import_module("qinvert.errors")
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not QInvertError
    ]
    assert 3 <= len(kinds) <= 7
    assert all(issubclass(kind, QInvertError) for kind in kinds)
    assert issubclass(QInvertError, ValueError)


def loaded(code):
    """Run code in a process of its own and return the heavy packages that it loads."""
    code = f"{code}\nimport sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import qinvert") == set()


@pytest.mark.parametrize("method", ["block_merge", "elimination", "newton_schulz", "neumann"])
def test_building_and_printing_a_program_loads_nothing_heavy(method):
    assert loaded(f"import qinvert; p = qinvert.{method}(64); str(p)") == set()


def test_what_is_heavy_is_found():
    assert {"torch", "numpy"} <= loaded("import qinvert; qinvert.exact_inverse")


def test_loading_and_printing_a_plan_loads_nothing_heavy(tmp_path):
    lower = qinvert.stress.stress_matrices("correlated_keys", 8, 16)
    qinvert.calibrate({"layer": lower}).save(tmp_path / "plan.json")
    code = f"import qinvert; plan = qinvert.Plan.load({str(tmp_path / 'plan.json')!r}); str(plan)"
    assert loaded(f"{code}; str(plan.layer())") <= {"numpy"}


def test_signatures_and_help_show_the_arguments_of_every_public_function():
    hidden = []
    for name in qinvert.__all__:
        value = getattr(qinvert, name)
        if inspect.isclass(value) or not callable(value):
            continue
        kinds = [parameter.kind for parameter in inspect.signature(value).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            hidden.append(name)
    assert hidden == []
    exported = inspect.signature(qinvert.export)
    assert {"plan", "path", "profile", "layer", "batch", "opset"} <= exported.parameters.keys()
    text = pydoc.render_doc(qinvert.export, renderer=pydoc.plaintext)
    assert "key_size" in text
    assert "Whether q and k of a chunk step are raw" in text


def test_the_signature_of_export_is_shown_without_torch():
    assert loaded("import qinvert.export") == set()
    shown = "import inspect, qinvert; assert 'batch' in inspect.signature(qinvert.export).parameters"
    assert "torch" not in loaded(shown)
    assert "onnx" in loaded(shown)
