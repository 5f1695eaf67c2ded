"""Statements know what they read, and are refused where it is not there."""

import pytest

from qinvert.errors import ProgramError
from qinvert.kernels.source import Source
from qinvert.kernels.statements import Expression, Statement, expression, rendered, summed, variable


def test_an_expression_reads_what_its_operands_read():
    a, b = variable("v1"), variable("v12")
    inner = expression("{} * {}", a, "s0")
    outer = expression("tl.where({} > {}, {}, {})", b, 0.5, inner, a)
    assert inner == Expression(template="{} * s0", reads=("v1",))
    assert outer.text == "tl.where(v12 > 0.5, v1 * s0, v1)"
    assert outer.reads == ("v12", "v1", "v1")
    assert summed([a, inner]).text == "v1 + v1 * s0"


def test_every_variable_is_renamed_at_once():
    swapped = expression("{} - {} + {}", variable("v1"), variable("v2"), variable("v3"))
    assert swapped.renamed({"v1": "v2", "v2": "v1"}).text == "v2 - v1 + v3"


@pytest.mark.parametrize(("template", "reads"), [("{} + {}", ("v0",)), ("1", ("v0",)), ("{}", ())])
def test_variables_without_a_place_are_refused(template, reads):
    with pytest.raises(ProgramError, match="places for"):
        Expression(template=template, reads=reads)


def test_an_operand_too_many_is_refused():
    with pytest.raises(ProgramError, match="1 places for 2 variables"):
        expression("-{}", variable("v0"), variable("v1"))


def test_lines_are_indented_by_their_loops():
    text = expression("{} + 1", variable("v0"))
    statements = [
        Statement(variable="v0", expression=expression("0")),
        Statement(variable="v1", expression=text, depth=1),
        Statement(expression=expression("store({})", variable("v1")), depth=2),
    ]
    assert rendered(statements) == ["v0 = 0", "    v1 = v0 + 1", "        store(v1)"]


def test_a_variable_that_is_not_defined_yet_is_refused():
    source = Source()
    first = source.assign("1")
    source.assign("{} + 1", first)
    assert rendered(source.statements) == ["v0 = 1", "v1 = v0 + 1"]
    with pytest.raises(ProgramError, match=r"'v1 = v0 \+ 1' reads v0, which is not defined yet"):
        rendered(source.statements[::-1])
    source.call("store({})", variable("v5"))
    with pytest.raises(ProgramError, match="reads v5"):
        rendered(source.statements)


def test_a_variable_does_not_define_itself():
    with pytest.raises(ProgramError, match="reads v0"):
        rendered([Statement(variable="v0", expression=expression("{} + 1", variable("v0")))])


def test_equal_expressions_share_a_variable():
    source = Source()
    a, b = source.assign("1"), source.assign("1")
    assert a != b
    assert source.once("{} + 1", a) == source.once("{} + 1", a)
    assert source.once("{} + 1", a) != source.once("{} + 1", b)
    # The same text, however it is put together.
    assert source.once("{} * {}", a, 2) == source.once("{}", expression("{} * 2", a))
    assert [s.variable for s in source.statements] == ["v0", "v1", "v2", "v3", "v4"]
