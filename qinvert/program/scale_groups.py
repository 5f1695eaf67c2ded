"""Tensors of a program that must share a grid."""

from __future__ import annotations

from qinvert.program.program import Program
from qinvert.program.residual_sums import residual_sums
from qinvert.program.steps import MOVES


def scale_groups(program: Program) -> dict[str, str]:
    """Return for every tensor the representative of the tensors that must share its grid.

    Slices, masks and concats move values without rounding, so they connect
    their inputs and outputs.  So do the sums of `qinvert.program.residual_sums`:
    on one grid a sum of integers is exact, whatever kernel computes it.
    """
    parent = {name: name for name in program.tensors}

    def find(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for step in (*(s for s in program.steps if isinstance(s, MOVES)), *residual_sums(program)):
        for name in step.inputs:
            if name in parent:
                parent[find(step.output)] = find(name)
    return {name: find(name) for name in parent}
