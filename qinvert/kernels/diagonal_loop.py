"""Puts the work that all tiles of the diagonal share into one loop.

A processor's instruction cache holds about 8,000 instructions; a kernel of
two-plane values has more and waits for them.  In a loop, the instructions for
the diagonal exist only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Final

from qinvert.kernels.source import existing, loaded_tile
from qinvert.kernels.statements import Kind, Statement, expression, variable
from qinvert.kernels.tiles import TILE, Position

#: First row and column of a tile of the diagonal inside the loop over ``p``.
_FIRST: Final = f"p * {TILE}"
#: M at that tile.
_ROLLED_LOAD: Final = loaded_tile(_FIRST, _FIRST, existing(_FIRST))
#: Kinds of statements whose value has the type of a product's operands.
_OPERANDS: Final = (Kind.CONVERSION, Kind.OPERAND)


def rolled(statements: Sequence[Statement], later: Sequence[Statement], count: int) -> list[Statement]:
    """Return statements with the work on ``count`` diagonal tiles of integers in a loop.

    ``later`` are the statements that follow and read what these define.

    The loop carries the float16 operands that later statements read, 4
    registers per tile and plane; float32 values are converted back from them.
    Statements that the tiles do not have in common stay as they are, behind it.
    """
    groups = _diagonals(statements, count)
    body = _common([_canonical(group) for group in groups])
    groups = [group[: len(body)] for group in groups]
    if count < 2 or len(body) < 2:
        return list(statements)
    taken = {statement.variable for group in groups for statement in group}
    others = [statement for statement in statements if statement.variable not in taken]
    # What the loop reads comes before it, and all else behind it, where it may read what the loop defines.
    needed = _needed(others, body)
    early = [statement for statement in others if statement.variable in needed]
    late = [statement for statement in others if statement.variable not in needed]
    used = taken & _read([*late, *later])
    wanted = [statement for statement in statements if statement.variable in used]
    return [*early, *_loop(groups, body, wanted), *late]


def _needed(statements: Sequence[Statement], body: Sequence[Statement]) -> set[str]:
    """Return the variables of ``statements`` that ``body`` reads, and all that those are made of."""
    needed = _read(body)
    for statement in reversed(statements):
        if statement.variable in needed:
            needed |= set(statement.reads)
    return needed


def _read(statements: Sequence[Statement]) -> set[str]:
    return {name for statement in statements for name in statement.reads}


def _diagonals(statements: Sequence[Statement], count: int) -> list[list[Statement]]:
    """Return, for every tile of M on the diagonal, the statements that depend on that tile only."""
    sources: dict[str, frozenset[Position]] = {}
    groups: list[list[Statement]] = [[] for _ in range(count)]
    for statement in statements:
        found = frozenset().union(*(sources.get(name, frozenset()) for name in statement.reads))
        if statement.position is not None:
            found = frozenset([statement.position])
        sources[statement.variable] = found
        if len(found) == 1 and (tile := next(iter(found)))[0] == tile[1]:
            groups[tile[0]].append(statement)
    return groups


def _canonical(statements: Sequence[Statement]) -> list[Statement]:
    """Return the body of the loop that one tile gives: ``w0 = ...``, ``w1 = ...``, ..."""
    names: dict[str, str] = {}
    body = []
    for k, statement in enumerate(statements):
        value = statement.expression.renamed(names) if statement.position is None else _ROLLED_LOAD
        body.append(Statement(variable=f"w{k}", expression=value, kind=statement.kind, depth=1))
        names[statement.variable] = f"w{k}"
    return body


def _common(bodies: Sequence[Sequence[Statement]]) -> list[Statement]:
    """Return the statements with which all bodies start."""
    steps = zip(*bodies, strict=False)
    return [step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps)]


def _loop(
    groups: Sequence[Sequence[Statement]], body: Sequence[Statement], wanted: Sequence[Statement]
) -> list[Statement]:
    """Return the loop, and after it statements that define the variables of ``wanted``."""
    places = {s.variable: (k, p) for p, group in enumerate(groups) for k, s in enumerate(group)}
    operands = {s.reads[0]: s.variable for group in groups for s in group if s.kind is Kind.CONVERSION}
    held = {s.variable: places[operands.get(s.variable, s.variable)] for s in wanted}
    carried = [(k, p) for k in sorted({k for k, _ in held.values()}) for p in range(len(groups))]
    return [
        *(_empty(k, p, body[k].kind) for k, p in carried),
        Statement(expression=expression("for p in tl.range(0, {}, num_stages=1):", len(groups))),
        *body,
        *(_selected(k, p) for k, p in carried),
        *(_resumed(name, *place, converted=name in operands) for name, place in held.items()),
    ]


def _carried(k: int, p: int) -> str:
    """Return the name of the variable that carries step ``k`` of tile ``p`` out of the loop."""
    return f"c{k}_{p}"


def _empty(k: int, p: int, kind: Kind) -> Statement:
    dtype = "tl.float16" if kind in _OPERANDS else "tl.float32"
    return Statement(variable=_carried(k, p), expression=expression("tl.zeros((NB, 16, 16), {})", dtype))


def _selected(k: int, p: int) -> Statement:
    name = _carried(k, p)
    value = expression("tl.where(p == {}, {}, {})", p, variable(f"w{k}"), variable(name))
    return Statement(variable=name, expression=value, depth=1)


def _resumed(name: str, k: int, p: int, converted: bool) -> Statement:
    value = expression("{}{}", variable(_carried(k, p)), ".to(tl.float32)" if converted else "")
    return Statement(variable=name, expression=value)
