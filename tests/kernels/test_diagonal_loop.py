"""What all tiles of the diagonal go through becomes the body of one loop."""

import re

import pytest

from qinvert.kernels.diagonal_loop import rolled


def tile(i, first, factor="s0"):
    """Load a diagonal tile, scale it by a scalar, and keep the operand."""
    place = f"(row + {16 * i}) * STRIDE + column + {16 * i}, v0, FULL"
    return [
        f"v{first} = -load_tile(L + base + {place})",
        f"v{first + 1} = v{first} * {factor}",
        f"v{first + 2} = v{first + 1}.to(tl.float16)",
    ]


def test_common_statements_are_there_once():
    lines = ["v0 = live", *tile(0, 1), *tile(1, 4), "v7 = tl.dot(v3, v6)", "v8 = v2 + v7"]
    result = rolled(lines, ["store(v8, v5)"], 2)
    assert sum("load_tile" in line for line in result) == 1
    assert "    w1 = w0 * s0" in result
    # float32 values come from the operands that the loop carries.
    assert "v2 = c2_0.to(tl.float32)" in result
    assert "v5 = c2_1.to(tl.float32)" in result
    assert result[-2:] == lines[-2:]
    for i, line in enumerate(result):
        defined = {other.partition(" = ")[0].strip() for other in result[:i]}
        assert set(re.findall(r"\bv\d+\b", line.partition(" = ")[2])) <= defined


@pytest.mark.parametrize(
    "lines",
    [
        ["v0 = live", *tile(0, 1)],
        ["v0 = live", *tile(0, 1), "v4 = v3 + 1", *tile(1, 5, "v4")],
    ],
    ids=["one tile", "one depends on another"],
)
def test_other_statements_stay_as_they_are(lines):
    assert rolled(lines, [], 2) == lines


def test_statements_that_differ_follow_the_loop():
    lines = ["v0 = live", *tile(0, 1), *tile(1, 4), "v7 = v3 * s1", "v8 = v6 * s2"]
    result = rolled(lines, [], 2)
    assert result[-2:] == lines[-2:]
    assert any(line.startswith("for p in") for line in result)
