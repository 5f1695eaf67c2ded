from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import qinvert
from qinvert import methods
from qinvert.errors import ProgramError
from qinvert.methods import METHODS, REGISTRY
from qinvert.stress import stress_matrices

#: Arguments that make a method exact in real arithmetic, by name; none if the default is.
EXACT = {
    "banded_residual": lambda chunk: {"steps": chunk},
    "neumann": lambda chunk: {"order": chunk - 1},
    "newton_schulz": lambda chunk: {"iterations": max(2 * chunk.bit_length() - 2, 12) + 1},
}

every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_every_method_is_found_by_the_name_of_its_programs(name):
    assert methods.find_method(name)(64).name == name
    assert methods.find_method(name) is getattr(methods, name) is getattr(qinvert, name)
    assert name in methods.__all__
    assert REGISTRY[name].name == name
    assert REGISTRY[name].build is METHODS[name]


@every_method
@pytest.mark.parametrize("chunk", [2, 4, 16, 64, 256])
def test_every_method_is_the_float64_inverse_where_it_is_exact(name, chunk, solved):
    lower = torch.cat([stress_matrices(data, 1, chunk) for data in ("small_random", "independent_keys")])
    program = METHODS[name](chunk, **EXACT.get(name, lambda _: {})(chunk))
    assert torch.allclose(program.run(lower, dtype=torch.float64), solved(lower), rtol=0, atol=1e-11)


@every_method
@pytest.mark.parametrize("chunk", [2, 4, 8, 16, 32, 64, 128, 256])
def test_the_defaults_fit_every_chunk_and_make_the_program_again(name, chunk):
    program = METHODS[name](chunk)
    assert METHODS[name](chunk, **program.parameters) == program
    assert program.run(torch.zeros(chunk, chunk)).tolist() == torch.eye(chunk).tolist()


@every_method
@pytest.mark.parametrize("chunk", [0, 1, 3, 2048, 64.0, "64", None])
def test_an_illegal_chunk_is_refused(name, chunk):
    with pytest.raises(ProgramError, match=r"chunk .* is not a power of two"):
        METHODS[name](chunk)


@every_method
def test_every_docstring_says_what_the_method_costs_and_keeps(name):
    documentation = inspect.getdoc(METHODS[name])
    words = ("Cost: ", "Range: ", "Stability: ", "Parameters\n", "Raises\n", "References\n")
    assert documentation.startswith("``")
    assert all(word in documentation for word in words)


@pytest.mark.parametrize("name", ["auto", "block-merge", "", None, ["neumann"]])
def test_an_unknown_method_lists_the_legal_names(name):
    legal = "block_merge, elimination, banded_residual, neumann, neumann_doubling, newton_schulz"
    legal += ", forward_substitution, column_sweep"
    with pytest.raises(ProgramError, match=rf"unknown method .*; use one of {legal}, auto"):
        methods.find_method(name)


def test_building_every_program_loads_no_torch():
    code = (
        "import sys; from qinvert.methods import METHODS; [build(8) for build in METHODS.values()];"
        "print(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
