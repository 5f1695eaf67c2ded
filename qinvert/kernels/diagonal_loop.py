"""Rolls what all tiles of the diagonal go through into one loop.

A processor's instruction cache holds about 8,000 instructions; a kernel of
two-plane values has more and waits for them.  As the body of a loop the work
on the diagonal is there once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qinvert.kernels.tiles import TILE

_VARIABLE = re.compile(r"\bv\d+\b")
_LOAD = re.compile(r"\(row \+ (\d+)\) \* STRIDE \+ column \+ (\d+), v\d+, FULL")
#: Address and mask of a tile of the diagonal inside the loop.
_ROLLED_LOAD = f"(row + p * {TILE}) * STRIDE + column + p * {TILE}, live & (row + p * {TILE} < rows), FULL"
#: A value that its float16 operand holds exactly, as integers do.
_OPERAND = re.compile(r"^(v\d+)\.to\(tl\.float16\)$")


def rolled(lines: Sequence[str], later: Sequence[str], count: int) -> list[str]:
    """Return statements with the work on ``count`` diagonal tiles of integers in a loop.

    ``later`` are the statements that follow and read what these write.

    The loop carries the float16 operands that later statements read, 4
    registers a tile and plane; float32 values are taken from them again.
    Statements that the tiles do not have in common stay as they are.
    """
    groups = _diagonals(lines, count)
    bodies = [_canonical([lines[i] for i in group]) for group in groups]
    length = 0
    for statements in zip(*bodies, strict=False):
        if len(set(statements)) > 1:
            break
        length += 1
    groups = [group[:length] for group in groups]
    taken = {i for group in groups for i in group}
    end = max(taken, default=-1)
    inside = {_name(lines[i]) for i in taken}
    early = [lines[i] for i in range(end) if i not in taken]
    if count < 2 or length < 2 or any(v in inside for line in early for v in _uses(line)):
        return list(lines)
    late = list(lines[end + 1 :])
    used = {v for line in (*late, *later) for v in _uses(line)} & inside
    return [*early, *_loop(lines, groups, bodies[0][:length], used), *late]


def _name(line: str) -> str:
    return line.partition(" = ")[0]


def _uses(line: str) -> list[str]:
    return _VARIABLE.findall(line.partition(" = ")[2] or line)


def _diagonals(lines: Sequence[str], count: int) -> list[list[int]]:
    """Return the statements that depend on one tile of M, of the diagonal, for every such tile."""
    sources: dict[str, frozenset[tuple[int, int]]] = {}
    groups: list[list[int]] = [[] for _ in range(count)]
    for i, line in enumerate(lines):
        load = _LOAD.search(line)
        found = frozenset().union(*(sources.get(v, frozenset()) for v in _uses(line)))
        if load:
            found = frozenset([(int(load[1]), int(load[2]))])
        sources[_name(line)] = found
        if len(found) == 1 and (tile := next(iter(found)))[0] == tile[1]:
            groups[tile[0] // TILE].append(i)
    return groups


def _canonical(lines: Sequence[str]) -> list[str]:
    """Return statements with variables numbered by themselves: ``w0``, ``w1``, ..."""
    names: dict[str, str] = {}
    result = []
    for line in lines:
        expression = _LOAD.sub(lambda _: _ROLLED_LOAD, line.partition(" = ")[2])
        expression = _VARIABLE.sub(lambda match: names.get(match[0], match[0]), expression)
        names[_name(line)] = f"w{len(names)}"
        result.append(f"{names[_name(line)]} = {expression}")
    return result


def _loop(lines: Sequence[str], groups: list[list[int]], body: Sequence[str], used: set[str]) -> list[str]:
    places = {_name(lines[i]): (p, k) for p, group in enumerate(groups) for k, i in enumerate(group)}
    operands = {
        match[1]: _name(lines[i])
        for group in groups
        for i in group
        if (match := _OPERAND.match(lines[i].partition(" = ")[2]))
    }
    wanted = sorted({places[operands.get(v, v)][1] for v in used})
    carried = [(k, p) for k in wanted for p in range(len(groups))]
    kinds = {k: "tl.float16" if body[k].endswith(".to(tl.float16)") else "tl.float32" for k in wanted}
    before = [f"c{k}_{p} = tl.zeros((NB, 16, 16), {kinds[k]})" for k, p in carried]
    select = [f"    c{k}_{p} = tl.where(p == {p}, w{k}, c{k}_{p})" for k, p in carried]
    after = []
    for name in sorted(used, key=lambda v: int(v[1:])):
        p, k = places[operands.get(name, name)]
        after.append(f"{name} = c{k}_{p}" + (".to(tl.float32)" if name in operands else ""))
    loop = f"for p in tl.range(0, {len(groups)}, num_stages=1):"
    return [*before, loop, *(f"    {line}" for line in body), *select, *after]
