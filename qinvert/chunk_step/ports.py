"""The ports of a chunk step, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qinvert.errors import PlanError, ProgramError
from qinvert.plan.quantization import CONSTANT_GRID, Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.ports import Meaning, Port
from qinvert.program.step_list import StepList
from qinvert.program.steps import Multiply, Rescale, Shape

#: Name of a program of the whole chunk step.
NAME: Final = "gated_delta_step"
QUERY: Final = "q"
KEY: Final = "k"
VALUE: Final = "v"
BETA: Final = "beta"
LOG_DECAY: Final = "g"
STATE: Final = "state"
OUTPUT: Final = "o"
#: Tensor of V', which all products of values read.
NEW_VALUES: Final = "v_new"
#: Tensor of the state that products read, where it is rounded apart from the state that is carried.
READ_STATE: Final = "state/read"
#: Tensor of -beta, whose bound is the largest beta that a step was built for.
NEGATIVE_BETA: Final = "beta/negative"
INPUTS: Final = (QUERY, KEY, VALUE, BETA, LOG_DECAY, STATE)
OUTPUTS: Final = (OUTPUT, STATE)
#: Sums of log decays are cut off here in integers: exp(-16) is below every step of an 8-bit grid.
MAX_LOG_DECAY: Final = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Sizes of a chunk step, and in which order its ports hold them."""

    #: Tokens of a chunk, C.
    chunk: int
    #: Length of a key, Dk.
    key_size: int
    #: Length of a value, Dv.
    value_size: int
    #: Whether every channel of a key has a log decay of its own.
    per_channel: bool
    #: Whether v, o and the state are held transposed: ``[Dv, C]`` and ``[Dv, Dk]``.
    values_first: bool
    #: Whether q, k, and g of channels are held transposed: ``[Dk, C]``.
    keys_first: bool

    def inputs(self) -> tuple[Port, ...]:
        """Return the input ports."""
        c, values = self.chunk, self.value_size
        keys = (self.key_size, c) if self.keys_first else (c, self.key_size)
        shapes = {
            QUERY: keys,
            KEY: keys,
            VALUE: self._turned(c, values),
            BETA: self._turned(c, 1),
            LOG_DECAY: keys if self.per_channel else (1, c),
            STATE: self._turned(self.key_size, values),
        }
        # Shapes alone cannot tell, where a chunk has as many tokens as a key has channels.
        turned = {name: Meaning.CHANNELS_FIRST for name in self.key_ports if self.keys_first}
        return tuple(
            Port(name=name, shape=Shape(1, *shape), meaning=turned.get(name, Meaning.TENSOR))
            for name, shape in shapes.items()
        )

    @property
    def key_ports(self) -> tuple[str, ...]:
        """Ports that have the layout of keys."""
        return (QUERY, KEY, LOG_DECAY) if self.per_channel else (QUERY, KEY)

    def outputs(self, output: str, state: str) -> tuple[Port, ...]:
        """Return the output ports, which return the tensors ``output`` and ``state``."""
        o = Shape(1, *self._turned(self.chunk, self.value_size))
        s = Shape(1, *self._turned(self.key_size, self.value_size))
        return Port(name=OUTPUT, shape=o, tensor=output), Port(name=STATE, shape=s, tensor=state)

    def _turned(self, rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if self.values_first else (rows, columns)


def find_step_sizes(program: StepList) -> StepSizes | None:
    """Return the sizes of a chunk step if ``program`` has its ports, else None."""
    shapes = {port.name: port.shape for port in program.inputs}
    if tuple(shapes) != INPUTS or tuple(port.name for port in program.outputs) != OUTPUTS:
        return None
    (_, *key), value, state = shapes[KEY], shapes[VALUE], shapes[STATE]
    values_first = shapes[BETA].rows == 1
    keys_first = next(p.meaning for p in program.inputs if p.name == KEY) is Meaning.CHANNELS_FIRST
    chunk, keys = reversed(key) if keys_first else key
    sizes = StepSizes(
        chunk=chunk,
        key_size=keys,
        value_size=state.rows if values_first else state.columns,
        per_channel=shapes[LOG_DECAY].rows != 1,
        values_first=values_first,
        keys_first=keys_first,
    )
    o, s = (port.tensor for port in program.outputs)
    fits = program.inputs == sizes.inputs() and program.outputs == sizes.outputs(o, s)
    return sizes if fits and value.rows * value.columns == chunk * sizes.value_size else None


def step_sizes(program: StepList) -> StepSizes:
    """Return the sizes of a chunk step.

    Raises
    ------
    ProgramError
        If the program has other ports.
    """
    found = find_step_sizes(program)
    if found is None:
        raise ProgramError(
            f"{program.title} is not a whole chunk step: it takes {', '.join(map(str, program.inputs))}; "
            "calibrate with scope='chunk', or build it by qinvert.gated_delta_step"
        )
    return found


def step_bounds(program: StepList) -> dict[str, float]:
    """Return what the inputs of a chunk step are bounded by: unit keys, scaled queries, beta, cut-off decays.

    Empty for other programs.
    """
    sizes = find_step_sizes(program)
    if sizes is None:
        return {}
    bounds = {step.output: step.bound for step in program.steps}
    largest = bounds.get(NEGATIVE_BETA)
    found = {KEY: 1.0, QUERY: float(sizes.key_size**-0.5), LOG_DECAY: MAX_LOG_DECAY}
    return found if largest is None else found | {BETA: largest}


def carried_tensors(program: StepList) -> tuple[str, ...]:
    """Return the tensors that hold the state as it is carried: the old one, what decay keeps, the new one.

    They have one grid.  A decay of 1 then keeps every value of the state: chunks that are all padding
    change nothing.
    """
    kept = [step.output for step in program.steps if isinstance(step, Multiply) and STATE in step.inputs]
    return (STATE, *kept, *(port.tensor for port in program.outputs if port.name == STATE))


def beyond_decays(program: StepList) -> set[str]:
    """Return the tensors that do not follow from log decays alone."""
    return program.depends_on(*(port.name for port in program.inputs if port.name != LOG_DECAY))


def state_grid(plan: QuantizedProgram) -> Quantization:
    """Return the grid on which products read the state: its own, or that onto which a float32 is rounded."""
    grids = [plan.tensors[STATE]]
    grids += [
        plan.tensors[s.output] for s in plan.program.steps if isinstance(s, Rescale) and s.source == STATE
    ]
    return next((grid for grid in grids if not grid.format.is_float), CONSTANT_GRID)


def check_state_grids(plan: QuantizedProgram) -> None:
    """Refuse a plan whose state cannot be handed on as it is.

    Raises
    ------
    PlanError
        With both grids.
    """
    taken = plan.tensors[STATE]
    given = next(plan.tensors[port.tensor] for port in plan.program.outputs if port.name == STATE)
    if taken != given:
        raise PlanError(
            f"the state is taken on the grid {taken} and returned on {given}, so that no call could hand it "
            "to the next; give both one quantization"
        )
