"""Which tensors of a chunk step must have one width, and the formats that follow from the chosen widths."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from qinvert.chunk_step.ports import KEY, LOG_DECAY, NEW_VALUES, OUTPUT, STATE, VALUE, carried_tensors
from qinvert.errors import PlanError
from qinvert.formats import FLOAT32, INT4, IntFormat
from qinvert.program.program import Program
from qinvert.program.scale_groups import scale_groups
from qinvert.program.steps import MOVES, Add, Exponential, MatMul, Multiply, Rescale, Subtract

#: Steps whose inputs and output have one width on every target.
TIED = (*MOVES, Add, Subtract, Multiply)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Groups of tensors of one width."""

    #: Tensors of each group, by the name of the group.
    groups: Mapping[str, tuple[str, ...]]
    #: Exponentials that are stored as wide as their source where the target asks for it.
    exponentials: Mapping[str, str]
    #: Members of groups of values that do not depend on values: their factors.
    factors: frozenset[str]
    #: Tensors that hold the state as it is carried.
    carried: tuple[str, ...]
    #: Tensors of 4 bits, in groups that have no more than 8.
    int4: frozenset[str] = frozenset()

    @property
    def value_groups(self) -> tuple[str, ...]:
        """Groups that depend on values, whose ranges need data: those that are worth more bits."""
        return tuple(name for name in self.groups if name not in (KEY, LOG_DECAY))

    @property
    def narrow_groups(self) -> tuple[str, ...]:
        """Groups that a tensor of 4 bits keeps from having more than 8."""
        return tuple(name for name, tensors in self.groups.items() if self.int4.intersection(tensors))

    def formats(
        self,
        narrow: IntFormat,
        wide: IntFormat,
        widened: Collection[str],
        *,
        equal_widths: bool,
        float_state: bool = False,
    ) -> dict[str, IntFormat]:
        """Return the format of every tensor.

        Parameters
        ----------
        narrow, wide : IntFormat
        widened : collection of str
            Groups that are wide; sums of log decays always are.
        equal_widths : bool
            Whether all that an elementwise operator reads and writes has one width.  Else
            exponentials and other factors of values stay narrow: on 8 bits no library's exp
            decides a rounding.
        float_state : bool
            Whether the state is carried in float32; its decays and what is added to it stay integers.
        """
        found = {
            tensor: wide if name in widened or name == LOG_DECAY else narrow
            for name, tensors in self.groups.items()
            for tensor in tensors
        }
        if not equal_widths:
            found |= dict.fromkeys(self.factors, narrow)
        found |= dict.fromkeys(self.int4, INT4)
        for tensor, reader in self.exponentials.items():
            found[tensor] = wide if equal_widths else found[reader]
        return found | (dict.fromkeys(self.carried, FLOAT32) if float_state else {})


def width_groups(program: Program, int4: Collection[str] = ()) -> Widths:
    """Return the groups of a chunk step: keys, log decays, and those of values.

    A group is named after the port that it holds or the new values, or after its first tensor.
    Tensors named in ``int4`` have 4 bits, with all that share their grid.

    Raises
    ------
    PlanError
        If one of these names is that of no tensor, or of a log decay.
    """
    ties, outputs = _Ties(program.tensors), {port.name: port.tensor for port in program.outputs}
    ties.join(STATE, outputs[STATE])
    exponentials = _exponentials(program)
    for step in program.steps:
        if isinstance(step, TIED):
            ties.join(*(name for name in (*step.inputs, step.output) if name in program.shapes))
        elif isinstance(step, MatMul):
            ties.join(step.output, *step.add, *step.subtract)
        elif isinstance(step, Exponential):
            ties.join(LOG_DECAY, step.source)
    _join_keys(program, ties, exponentials)
    members: dict[str, list[str]] = {}
    for name in program.tensors:
        if name not in exponentials:
            members.setdefault(ties.find(name), []).append(name)
    named = {
        NEW_VALUES: NEW_VALUES,
        VALUE: VALUE,
        OUTPUT: outputs[OUTPUT],
        STATE: STATE,
        KEY: KEY,
        LOG_DECAY: LOG_DECAY,
    }
    special = {ties.find(tensor): name for name, tensor in named.items() if tensor in program.shapes}
    groups = {special.get(root, names[0]): tuple(names) for root, names in members.items()}
    values, keys = program.depends_on(VALUE, STATE), {ties.find(KEY), ties.find(LOG_DECAY)}
    factors = (name for name in program.tensors if name not in values and ties.find(name) not in keys)
    return Widths(
        groups=groups,
        exponentials=exponentials,
        factors=frozenset(factors) - {*exponentials},
        carried=carried_tensors(program),
        int4=_of_four_bits(program, groups, int4),
    )


def _of_four_bits(
    program: Program, groups: Mapping[str, tuple[str, ...]], names: Collection[str]
) -> frozenset[str]:
    """Return the named tensors and all that share a grid with one of them."""
    legal = {tensor for group, tensors in groups.items() if group != LOG_DECAY for tensor in tensors}
    for name in names:
        if name not in legal:
            why = "holds log decays, which 4 bits cannot sum" if name in program.shapes else "is no tensor"
            raise PlanError(
                f"int4 names {name!r}, which {why} of {program.title}; use names such as 'D', 'scores' or 'T'"
            )
    grids, carried = scale_groups(program), carried_tensors(program)
    wanted = {*names, *(carried if {*carried}.intersection(names) else ())}
    shared = {grids[name] for name in wanted}
    return frozenset(name for name in grids if grids[name] in shared)


class _Ties:
    """Sets of names that grow together."""

    def __init__(self, names: Iterable[str]) -> None:
        self._parent = {name: name for name in names}

    def find(self, name: str) -> str:
        while self._parent[name] != name:
            name = self._parent[name]
        return name

    def join(self, first: str, *others: str) -> None:
        for name in others:
            self._parent[self.find(name)] = self.find(first)


def _exponentials(program: Program) -> dict[str, str]:
    """Return the tensor that a Rescale makes of each exponential."""
    found = {step.output for step in program.steps if isinstance(step, Exponential)}
    return {
        step.source: step.output
        for step in program.steps
        if isinstance(step, Rescale) and step.source in found
    }


def _join_keys(program: Program, ties: _Ties, exponentials: Collection[str]) -> None:
    """Put everything that depends on neither values nor log decays alone into the group of the keys."""
    values = {ties.find(name) for name in program.depends_on(VALUE, STATE)}
    apart = values | {ties.find(LOG_DECAY)}
    for name in program.tensors:
        if name not in exponentials and ties.find(name) not in apart:
            ties.join(KEY, name)
