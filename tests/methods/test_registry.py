from __future__ import annotations

import pytest

from qinvert import methods
from qinvert.errors import ProgramError


@pytest.mark.parametrize("name", ["block_merge", "neumann", "neumann_doubling"])
def test_every_method_is_found_by_the_name_of_its_programs(name):
    assert methods.find_method(name)(64).name == name
    assert methods.find_method(name) is getattr(methods, name)


@pytest.mark.parametrize("name", ["auto", "block-merge", "", None, ["neumann"]])
def test_an_unknown_method_lists_the_legal_names(name):
    with pytest.raises(
        ProgramError, match=r"unknown method .*; use one of block_merge, neumann, neumann_doubling, auto"
    ):
        methods.find_method(name)
