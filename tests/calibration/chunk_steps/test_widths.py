"""Which tensors of a step share a width, and the formats that follow."""

import itertools
from dataclasses import replace

import pytest
from chunk_layers import CHOICES, step_program

from qinvert.calibration.chunk_steps.planner import check_widths
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.chunk_step.form import Decay, Form
from qinvert.errors import PlanError
from qinvert.formats import INT4, INT8, INT16
from qinvert.program.steps import MOVES, Add, Exponential, MatMul, Multiply, Subtract

FORMS = [
    {"decay": decay, "form": form, "values_first": first, "halves": halves}
    for decay, form, first, halves in itertools.product(Decay, Form, [True, False], [False, True])
    if not (halves and form is Form.WY)
]
forms = pytest.mark.parametrize("options", FORMS, ids=lambda o: "-".join(map(str, o.values())))

#: Members of the groups of values that all forms and decays have, without halves.
STATES = {"state", "decay_kept", "state/kept", "state/written", "state/new"}
OUTPUTS = {"o/old", "o/new", "o"}
GROUPS = {
    ("folded", "scalar"): {"v": {"v", "v_predicted", "rhs"}, "v_new": {"v_new"}, "o": OUTPUTS},
    ("folded", "channel"): {"v": {"v", "v_predicted", "rhs"}, "v_new": {"v_new"}, "o": OUTPUTS},
    ("wy", "scalar"): {
        "v": {"v", "beta/for_values", "v/beta"},
        "v_new": {"U", "v_predicted", "v_new"},
        "o": OUTPUTS,
    },
    ("wy", "channel"): {
        "v": {"v", "beta/for_values", "v/beta"},
        "v_new": {"U", "v_predicted", "v_new"},
        "o": OUTPUTS,
    },
    # The decay of reads is a factor of rows of v and of o: all of them have one width.
    ("state", "scalar"): {
        "o": OUTPUTS
        | {"v", "v/beta", "v_predicted", "v_predicted/beta", "rhs", "o/read"}
        | {"beta/for_values", "decay_reads/for_values", "beta/decayed"},
        "v_new": {"v_new"},
    },
    ("state", "channel"): {
        "v": {"v", "v_predicted", "v_error", "beta/for_values", "rhs"},
        "v_new": {"v_new"},
        "o": OUTPUTS,
    },
}


def plain(form, decay="scalar"):
    return width_groups(step_program(decay, form))


@forms
def test_every_tensor_is_in_one_group_or_an_exponential(options):
    program = step_program(**options)
    widths = width_groups(program)
    members = [name for names in widths.groups.values() for name in names]
    assert len(members) == len(set(members))
    assert {*members, *widths.exponentials} == {*program.tensors}
    assert {"k", "g", "v", "o", "state", "v_new"} >= {*widths.groups} >= {"k", "g", "o", "state", "v_new"}


@forms
def test_values_and_keys_are_apart(options):
    """What depends on values is in no group of keys, and what depends on keys alone in none of values."""
    program = step_program(**options)
    widths = width_groups(program)
    tainted = program.depends_on("v", "state")
    for group, names in widths.groups.items():
        values = tainted & {*names}
        assert not values if group in ("k", "g") else values, group
        factors = {*names} - tainted if group not in ("k", "g") else set()
        assert factors <= widths.factors
        # Factors of values are beta and decays, never keys.
        assert not factors & {"k", "q", "M", "gram", "T", "scores"}
    assert {"q", "k", "M", "T", "scores", "k/written"} & {*program.tensors} <= {*widths.groups["k"]}
    assert {"g"} <= {*widths.groups["g"]}


@forms
@pytest.mark.parametrize("widened", [(), ("v", "o"), ("state",), ("k",), ("v", "v_new", "o", "state")])
def test_elementwise_steps_have_one_width_where_the_target_asks_for_it(options, widened):
    program = step_program(**options)
    formats = width_groups(program).formats(INT8, INT16, widened, equal_widths=True)
    constants = {constant.name for constant in program.constants}
    for step in program.steps:
        if isinstance(step, (*MOVES, Add, Subtract, Multiply, Exponential)):
            assert len({formats[n] for n in {*step.inputs, step.output} - constants}) == 1, step
        elif isinstance(step, MatMul):
            assert all(formats[name] == formats[step.output] for name in (*step.add, *step.subtract))


@forms
def test_elsewhere_factors_and_exponentials_stay_narrow(options):
    widths = width_groups(step_program(**options))
    wide = widths.formats(INT8, INT16, widths.value_groups, equal_widths=False)
    assert all(wide[name] == INT8 for name in (*widths.factors, *widths.exponentials))
    assert wide["state"] == wide["o/new"] == INT16


@forms
def test_the_two_ends_of_the_state_have_one_width(options):
    program = step_program(**options)
    widths = width_groups(program)
    assert {"state", "state/new", "state/kept", "state/written"} <= {*widths.groups["state"]}
    assert widths.formats(INT8, INT16, ["state"], equal_widths=True)["state/new"] == INT16


def test_log_decays_are_always_wide():
    widths = plain(Form.FOLDED)
    formats = widths.formats(INT8, INT16, (), equal_widths=True)
    wide = {name for name, fmt in formats.items() if fmt == INT16}
    assert wide == {*widths.groups["g"], *widths.exponentials}
    assert all(
        name == "g" or name.startswith("D/terms") or name.endswith("/log") for name in widths.groups["g"]
    )


@pytest.mark.parametrize(("form", "decay"), GROUPS)
def test_the_groups_of_values_of_every_form(form, decay):
    widths = plain(form, decay)
    turned = {"decay_kept/column"} if decay == "channel" else set()
    expected = GROUPS[form, decay] | {"state": STATES | turned}
    assert {name: {*widths.groups[name]} for name in widths.value_groups} == expected


@forms
def test_groups_that_are_worth_more_bits_hold_values(options):
    widths = width_groups(step_program(**options))
    assert set(widths.value_groups) == set(widths.groups) - {"k", "g"}


@pytest.mark.parametrize("form", Form)
def test_what_is_read_of_a_state_is_a_group_of_its_own(form):
    program = step_program("scalar", form, error_feedback=True)
    widths = width_groups(program)
    assert widths.groups["state/read"] == ("state/read",)
    assert {*widths.groups["state"]} == STATES
    formats = widths.formats(INT8, INT16, ["state"], equal_widths=True)
    assert (formats["state"], formats["state/read"]) == (INT16, INT8)
    readers = [step for step in program.steps if "state/read" in step.inputs]
    assert len(readers) == 2
    assert all(isinstance(step, MatMul) for step in readers)
    assert [s.output for s in program.steps if "state" in s.inputs] == ["state/read", "state/kept"]


@forms
@pytest.mark.parametrize("named", [("D",), ("T", "o"), ("state",)], ids="-".join)
def test_named_tensors_have_4_bits_with_all_that_share_their_grid_and_no_others(options, named):
    program = step_program(**options)
    legal = tuple(name for name in named if name in program.shapes)
    widths = width_groups(program, legal)
    formats = widths.formats(INT8, INT16, (), equal_widths=False)
    held = {name for name, fmt in formats.items() if fmt == INT4}
    assert {*legal} <= held
    exponentials = {reader for source, reader in widths.exponentials.items() if source in held}
    assert held - {*widths.exponentials} == widths.int4
    assert exponentials <= held
    for step in program.steps:
        if isinstance(step, MOVES):
            assert len({name in held for name in {*step.inputs, step.output} & {*program.tensors}}) == 1
    carried = {"state", "state/kept", "state/new"}
    assert held >= carried if "state" in named else not held & carried
    assert held < {*program.tensors}


def test_a_group_with_a_tensor_of_4_bits_is_said_to_be_narrow():
    program = step_program()
    assert width_groups(program).narrow_groups == ()
    assert set(width_groups(program, ("T", "rhs")).narrow_groups) == {"k", "v"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t", "int4 names 't', which is no tensor of"),
        ("g", "'g', which holds log decays"),
        ("D/log", "'D/log'"),
    ],
)
def test_names_that_cannot_have_4_bits_are_refused(name, words):
    with pytest.raises(PlanError, match=words) as error:
        width_groups(step_program(), ("T", name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fixed", [{"value_bits": 16}, {"all_wide": True}])
def test_4_bits_do_not_go_with_16_of_the_same_tensor(fixed):
    widths = width_groups(step_program(), ("o",))
    check_widths(widths, CHOICES)
    check_widths(widths, replace(CHOICES, state_bits=16), float_state=True)
    with pytest.raises(PlanError, match="int4 gives 'o' 4 bits, but another option gives it 16 bits"):
        check_widths(widths, replace(CHOICES, **fixed))


def test_4_bits_do_not_go_with_a_float_of_the_same_tensor():
    widths = width_groups(step_program(), ("state",))
    check_widths(widths, CHOICES)
    with pytest.raises(PlanError, match="int4 gives 'state' 4 bits, but another option gives it float32"):
        check_widths(widths, CHOICES, float_state=True)
