"""What all tiles of the diagonal go through becomes the body of one loop."""

import pytest

from qinvert.kernels.diagonal_loop import rolled
from qinvert.kernels.source import Source, existing, loaded_tile
from qinvert.kernels.statements import Kind, rendered


def tile(source, i, factor="s0", column=None):
    """Load a tile of the diagonal, scale it, and keep the operand; return values and operands."""
    j = i if column is None else column
    mask = source.once("{}", existing(0))
    place = loaded_tile(16 * i, 16 * j, mask)
    scaled = source.assign("{} * {}", source.assign("{}", place, position=(i, j)), factor)
    return scaled, source.assign("{}.to(tl.float16)", scaled, kind=Kind.CONVERSION)


def loads(lines):
    return sum("load_tile" in line for line in lines)


def unchanged(source, later=()):
    return rolled(source.statements, later, 2) == source.statements


def test_common_statements_are_there_once():
    source = Source()
    (first, a), (second, b) = tile(source, 0), tile(source, 1)
    total = source.assign("{} + {}", first, source.assign("tl.dot({}, {})", a, b, kind=Kind.PRODUCT))
    body = list(source.statements)
    source.call("store({}, {})", total, second)
    # Rendering refuses what is read before it is defined.
    lines = rendered(rolled(body, source.statements[len(body) :], 2))
    assert loads(lines) == 1
    assert "    w1 = w0 * s0" in lines
    # float32 values come from the operands that the loop carries.
    assert "v2 = c2_0.to(tl.float32)" in lines
    assert "v5 = c2_1.to(tl.float32)" in lines
    assert "c2_0 = tl.zeros((NB, 16, 16), tl.float16)" in lines
    assert lines[-2:] == rendered(source.statements)[-3:-1]


def test_the_loop_carries_values_in_their_type():
    source = Source()
    for i in range(2):
        scaled, _ = tile(source, i)
        doubled = source.assign("{} * 2", scaled)
        shifted = source.assign("({} + 1).to(tl.float16)", doubled, kind=Kind.OPERAND)
        source.call("store({}, {})", doubled, shifted)
    body = [s for s in source.statements if s.variable]
    later = [s for s in source.statements if not s.variable]
    lines = rendered([*rolled(body, later, 2), *later])
    # Nothing converts the one, and the other is not the operand of one variable.
    assert "c3_1 = tl.zeros((NB, 16, 16), tl.float32)" in lines
    assert "c4_1 = tl.zeros((NB, 16, 16), tl.float16)" in lines
    values = [line for line in lines if line.split(" = ")[-1] in ("c3_0", "c4_0", "c3_1", "c4_1")]
    assert values == ["v4 = c3_0", "v5 = c4_0", "v9 = c3_1", "v10 = c4_1"]
    assert not any("c2_" in line for line in lines)


def test_one_tile_is_no_loop():
    source = Source()
    tile(source, 0)
    assert rolled(source.statements, (), 1) == source.statements
    assert unchanged(source)


@pytest.mark.parametrize("factors", [("s0", "s0"), ("s0", "s1")])
def test_tiles_are_rolled_only_if_they_go_through_the_same(factors):
    source = Source()
    for i, factor in enumerate(factors):
        tile(source, i, factor)
    assert unchanged(source) is (factors[0] != factors[1])


def test_tiles_that_depend_on_another_stay_as_they_are():
    source = Source()
    _, operand = tile(source, 0)
    tile(source, 1, source.assign("{} + 1", operand))
    assert unchanged(source)


def test_tiles_beside_the_diagonal_stay_as_they_are():
    source = Source()
    tile(source, 0, column=1)
    tile(source, 1, column=0)
    assert unchanged(source)


def test_what_reads_the_loop_follows_it():
    source = Source()
    (first, _), (other, _) = tile(source, 0), tile(source, 1, column=0)
    total = source.assign("{} + {}", first, other)
    tile(source, 1)
    lines = rendered(rolled(source.statements, (), 2))
    assert loads(lines) == 2  # one in the loop, and the one beside the diagonal
    assert lines[-1] == f"{total.text} = {first.text} + {other.text}"
    # Nothing that the loop does not read takes registers before it.
    (loop,) = [i for i, line in enumerate(lines) if line.startswith("for p in")]
    assert loads(lines[:loop]) == 0


def test_what_the_loop_reads_comes_before_it():
    source = Source()
    tile(source, 0, column=1)
    place = source.assign("row + column")
    factor = source.assign("{} * 2", place)
    for i in range(2):
        tile(source, i, factor)
    lines = rendered(rolled(source.statements, (), 2))
    (loop,) = [i for i, line in enumerate(lines) if line.startswith("for p in")]
    assert lines.index(f"{factor.text} = {place.text} * 2") < loop


def test_statements_that_differ_follow_the_loop():
    source = Source()
    operands = [tile(source, i)[1] for i in range(2)]
    for i, operand in enumerate(operands):
        source.assign("{} * s{}", operand, i)
    lines = rendered(rolled(source.statements, (), 2))
    assert lines[-2:] == rendered(source.statements)[-2:]
    assert any(line.startswith("for p in") for line in lines)
