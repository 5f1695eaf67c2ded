"""A program whose named tensors pass on a copy of themselves that may have another grid."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final, TypeVar

from qinvert.errors import ProgramError
from qinvert.program.inlining import renamed
from qinvert.program.step_list import StepList
from qinvert.program.steps import Concat, Mask, Rescale, Step

P = TypeVar("P", bound=StepList)

#: What the name of a copy ends with.
COPY: Final = "/copy"
#: Parameter of the programs that `with_own_grids` returns, which their titles show.
PARAMETER: Final = "own_grids"


def with_own_grids(program: P, tensors: Collection[str]) -> P:
    """Return the same computation in which ``x_copy = x`` is rounded once more, for each named x.

    All later steps read the copy, so that x and what x is made of may have fewer bits than
    what comes after.  In real arithmetic nothing changes.  The copy has the bound of x.

    Parameters
    ----------
    program : StepList
    tensors : collection of str
        Outputs of steps; neither inputs nor outputs of the program.

    Raises
    ------
    ProgramError
        If a name is not that of a tensor between two steps.
    """
    inner = {step.output for step in program.steps} - {port.tensor for port in program.outputs}
    unknown = [name for name in tensors if name not in inner]
    if unknown or not tensors:
        raise ProgramError(
            f"{program.title} has no tensor {unknown} between two steps; name outputs of its steps"
        )
    names = [*program.tensors, *(constant.name for constant in program.constants)]
    copies = {name: name + COPY if name in tensors else name for name in names}
    steps: list[Step] = []
    for step in program.steps:
        steps.append(replace(renamed(step, copies.__getitem__), output=step.output))
        if step.output in tensors:
            steps.append(Rescale(output=copies[step.output], source=step.output, bound=step.bound))
    named = {**dict(program.parameters), PARAMETER: "+".join(sorted(tensors))}
    return replace(program, steps=tuple(steps), parameters=named)


def narrow_parts(program: StepList) -> list[tuple[str, ...]]:
    """Return the sets of tensors whose copies would let small diagonal blocks have fewer bits.

    A program in tiles masks each level of the merges out of one tensor, which holds the tiles of
    M.  The first set is that tensor: inside tiles M may then be rounded to fewer bits than outside.
    The second one is all masked levels but the last, which holds half of the entries of a tile.
    Programs without masks inside tiles have no such sets.
    """
    inner = {step.output for step in program.steps if isinstance(step, Concat)}
    masks = [step for step in program.steps if isinstance(step, Mask) and step.source in inner]
    sources = dict.fromkeys(step.source for step in masks)
    levels = tuple(step.output for step in masks[:-1])
    return [*((source,) for source in sources), *([levels] if levels else [])]
