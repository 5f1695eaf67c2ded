"""Copies of tensors with grids of their own change nothing but the choice of grids."""

from __future__ import annotations

import pytest
import torch

import qinvert
from qinvert.calibration.planning.scales import scale_groups
from qinvert.errors import ProgramError
from qinvert.program.own_grids import COPY, narrow_parts, with_own_grids
from qinvert.program.program import Program
from qinvert.stress import stress_matrices


def _tiled() -> Program:
    return qinvert.block_merge(32, base=4, tile=16)


@pytest.mark.parametrize("parts", narrow_parts(_tiled()), ids="+".join)
def test_a_copy_leaves_every_float_as_it_was(parts: tuple[str, ...]) -> None:
    lower = stress_matrices("wide_gates", 3, 32).double()
    assert torch.equal(with_own_grids(_tiled(), parts).run(lower), _tiled().run(lower))


@pytest.mark.parametrize("parts", narrow_parts(_tiled()), ids="+".join)
def test_a_copy_may_have_another_grid_than_its_tensor(parts: tuple[str, ...]) -> None:
    program = with_own_grids(_tiled(), parts)
    groups = scale_groups(program)
    assert all(groups[name] != groups[name + COPY] for name in parts)
    assert len(set(groups.values())) > len(set(scale_groups(_tiled()).values()))


def test_titles_name_what_has_a_copy() -> None:
    parts = narrow_parts(_tiled())[0]
    assert with_own_grids(_tiled(), parts).title != _tiled().title
    assert "own_grids=base_16/M" in with_own_grids(_tiled(), parts).title


def test_programs_without_tiles_offer_no_parts() -> None:
    assert narrow_parts(qinvert.block_merge(32, base=4)) == []


@pytest.mark.parametrize("parts", [(), ("M",), ("merge_32/S",), ("nothing",)])
def test_only_tensors_between_two_steps_have_copies(parts: tuple[str, ...]) -> None:
    with pytest.raises(ProgramError, match="between two steps"):
        with_own_grids(_tiled(), parts)
