"""What the process is set to, and what it must not change: default dtype, autocast, threads, gradients."""

import ast
from pathlib import Path

import pytest
import torch

import qinvert
from qinvert.errors import InputError
from qinvert.kernels.dispatch import solve_tril
from qinvert.stress import STRESS, stress_matrices

ROOT = Path(__file__).parents[1]
#: Functions of torch whose result has the default dtype unless one is named.
FACTORIES = ("zeros", "ones", "eye", "full", "rand", "randn", "empty", "linspace")
LOWER = stress_matrices("correlated_keys", 6, 16)


def default_dtypes(tree):
    """Lines that make a tensor of the default dtype."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and not any(keyword.arg == "dtype" for keyword in node.keywords)
    ]


def test_every_new_tensor_names_its_dtype():
    assert default_dtypes(ast.parse("torch.zeros(2)")) == [1]
    assert default_dtypes(ast.parse("torch.zeros(2, dtype=x.dtype)")) == []
    files = [
        path for folder in ("qinvert", "calibration", "export") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {str(path): lines for path in files if (lines := default_dtypes(ast.parse(path.read_text())))}
    assert not found


@pytest.fixture(params=["float64", "bfloat16", "float16"])
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
def test_the_default_dtype_changes_nothing(tmp_path):
    for name, expected in MATRICES.items():
        assert torch.equal(stress_matrices(name, 2, 16), expected), name
    plan = qinvert.calibrate(LOWER, target="npu-qdq-int8")
    assert plan.to_bytes() == PLAN.to_bytes()
    qinvert.export(plan, tmp_path / "t.onnx", batch=6)
    assert all(result.mismatches == 0 for result in qinvert.verify(tmp_path / "t.onnx", plan, LOWER))
    assert torch.equal(plan.layer().inverse(LOWER), PLAN.layer().inverse(LOWER))
    assert str(plan.layer().proof()) == str(PLAN.layer().proof())


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        for name, expected in MATRICES.items():
            assert torch.equal(stress_matrices(name, 2, 16), expected), name
        assert qinvert.calibrate(LOWER, target="npu-qdq-int8").to_bytes() == PLAN.to_bytes()


def test_threads_change_nothing():
    lower = stress_matrices("wide_gates", 40, 64)
    before, plans = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            plans.add(qinvert.calibrate(lower, method="neumann_doubling", min_sqnr_db=0).to_bytes())
    finally:
        torch.set_num_threads(before)
    assert len(plans) == 1


def integers(lower):
    return PLAN.layer().inverse(lower)


def floats(lower):
    return PLAN.layer().program.run(lower)


def ports(program_or_plan, program, lower):
    """By the names of the ports: M goes in, and S of T = I + S comes out."""
    if not isinstance(lower, torch.Tensor):
        return ports(program_or_plan, program, torch.from_numpy(lower)).numpy()
    (value,) = program_or_plan.execute({program.inverse_ports.matrix: -lower}).values()
    return value


def executed_integers(lower):
    return ports(PLAN.layer(), PLAN.layer().program, lower)


def executed_floats(lower):
    return ports(PLAN.layer().program, PLAN.layer().program, lower)


def of_flash_linear_attention(lower):
    if not isinstance(lower, torch.Tensor):
        return of_flash_linear_attention(torch.from_numpy(lower)).numpy()
    return solve_tril(lower.reshape(1, -1, 1, lower.shape[-1]))


@pytest.mark.parametrize(
    "inverse",
    [
        integers,
        floats,
        qinvert.exact_inverse,
        executed_integers,
        executed_floats,
        of_flash_linear_attention,
    ],
)
def test_inverses_have_no_gradient_and_say_so(inverse):
    lower = LOWER.clone().requires_grad_()
    result = inverse(lower)
    assert torch.equal(result.detach(), inverse(LOWER))
    # Beside another path the gradient would be wrong without a word.
    with pytest.raises(InputError, match="has no gradient: train with"):
        (result.sum() + lower.sum()).backward()
    for free in (lower.detach(), LOWER.numpy()):
        assert not getattr(inverse(free), "requires_grad", False)
    with torch.no_grad():
        assert not inverse(lower).requires_grad


MATRICES = {name: stress_matrices(name, 2, 16) for name in STRESS}
PLAN = qinvert.calibrate(LOWER, target="npu-qdq-int8")
