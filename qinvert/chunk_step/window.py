"""Several chunks of one head as one program: the key paths side by side, the states one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from qinvert.checks import check_integer
from qinvert.chunk_step.ports import (
    BETA,
    INPUTS,
    KEY,
    LOG_DECAY,
    OUTPUT,
    QUERY,
    STATE,
    VALUE,
    StepSizes,
    step_sizes,
)
from qinvert.chunk_step.ports import check_state_grids as check_state_grids
from qinvert.errors import ProgramError
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.inlining import inlined, renamed
from qinvert.program.ports import MAX_PORTS, Port
from qinvert.program.program import Program
from qinvert.program.step_list import StepList
from qinvert.program.steps import Axis, Concat, Constant, Range, Slice, Step, Transpose
from qinvert.program.transposes import without_double_transposes

#: Most chunks of one program; each output is a port.
MAX_CHUNKS: Final = MAX_PORTS - 2


def window_plan(
    plan: QuantizedProgram,
    chunks: int,
    *,
    values_first: bool | None = None,
    keys_first: bool | None = None,
    every_state: bool = False,
) -> QuantizedProgram:
    """Return the plan of ``chunks`` chunk steps in a row, each on the grids of ``plan``.

    The integers of the state go from chunk to chunk as they are.

    Parameters
    ----------
    plan : QuantizedProgram
        Of one chunk step.
    chunks : int
    values_first : bool, optional
        Whether the ports v, o and state hold values before tokens and keys, ``[Dv, chunks C]`` and
        ``[Dv, Dk]``; as in ``plan`` if left out.
    keys_first : bool, optional
        Whether the ports q, k, and g of channels hold channels before tokens; as in ``plan`` if left out.
    every_state : bool
        Whether the states behind all chunks but the last are outputs, too: ``state_1``, ``state_2``, ...

    Raises
    ------
    PlanError
        If the state's input and output have two grids.
    ProgramError
        If ``plan`` is not that of a chunk step, or the number of chunks is not legal.
    """
    window = _Window(plan.program, chunks, values_first, keys_first)
    check_state_grids(plan)
    program = window.program(every_state=every_state)
    tensors = {name: plan.tensors[origin] for name, origin in window.origins.items()}
    return QuantizedProgram(program=program, tensors=tensors, requantize=plan.requantize)


class _Window:
    """Collects the steps of all chunks, and from which tensor of the chunk step each has its grid."""

    def __init__(
        self, program: StepList, chunks: int, values_first: bool | None, keys_first: bool | None
    ) -> None:
        self.chunks = check_integer("chunks", chunks, 1, MAX_CHUNKS, ProgramError)
        self.step = program
        self.sizes = step_sizes(program)
        self.turns = values_first is not None and values_first != self.sizes.values_first
        self.turns_keys = keys_first is not None and keys_first != self.sizes.keys_first
        self.origins = {port.name: port.tensor for port in program.inputs}
        self._steps: list[Step] = []
        self._constants: dict[str, Constant] = {}

    def program(self, *, every_state: bool) -> Program:
        whole, out = self._sizes(), {port.name: port.tensor for port in self.step.outputs}
        outputs, states, state = [], list[str](), self._turned(STATE, STATE)
        values = self._turned(VALUE, VALUE)
        for i in range(self.chunks):
            parts = {name: self._part(i, name, name) for name in (QUERY, KEY, LOG_DECAY, BETA)}
            if self.turns_keys:
                parts |= {name: self._transposed(parts[name], name) for name in self.sizes.key_ports}
            parts |= {VALUE: self._part(i, VALUE, values), STATE: state}
            found = self._inline(parts, f"chunk_{i}/" if self.chunks > 1 else "")
            outputs.append(found[OUTPUT])
            state = found[STATE]
            states.append(state)
        o = self._turned(self._joined(outputs, out[OUTPUT]), out[OUTPUT])
        returned = [self._turned(name, out[STATE]) for name in (states if every_state else states[-1:])]
        if self.turns_keys:
            self._shorten([o, *returned])
        return Program(
            name=self.step.name,
            chunk=self.step.chunk,
            parameters={**self.step.parameters, **({"chunks": self.chunks} if self.chunks > 1 else {})},
            inputs=self._inputs(whole),
            outputs=self._outputs(whole, o, returned),
            constants=tuple(self._constants.values()),
            steps=tuple(self._steps),
        )

    def _shorten(self, outputs: list[str]) -> None:
        """Leave out that keys are transposed there and back."""
        short = without_double_transposes(self._steps, outputs)
        self._steps = list(short.steps)
        self.origins |= {name: self.origins[source] for name, source in short.added.items()}
        kept = {*(step.output for step in short.steps), *INPUTS}
        self.origins = {name: origin for name, origin in self.origins.items() if name in kept}

    def _sizes(self) -> StepSizes:
        return replace(self.sizes, chunk=self.chunks * self.sizes.chunk)

    def _inputs(self, whole: StepSizes) -> tuple[Port, ...]:
        """Ports of which v and the state, or the keys, are in the other layout; beta stays as it is."""
        turned = {*((VALUE, STATE) if self.turns else ()), *(whole.key_ports if self.turns_keys else ())}
        other = {port.name: port for port in self._other(whole).inputs()}
        return tuple(other[port.name] if port.name in turned else port for port in whole.inputs())

    @staticmethod
    def _other(whole: StepSizes) -> StepSizes:
        return replace(whole, values_first=not whole.values_first, keys_first=not whole.keys_first)

    def _outputs(self, whole: StepSizes, o: str, states: list[str]) -> tuple[Port, ...]:
        output, last = (self._other(whole) if self.turns else whole).outputs(o, states[-1])
        earlier = [
            replace(last, name=f"{STATE}_{i}", tensor=name) for i, name in enumerate(states[:-1], start=1)
        ]
        return output, *earlier, last

    def _inline(self, inputs: dict[str, str], prefix: str) -> dict[str, str]:
        steps, constants, outputs = inlined(self.step, inputs, prefix)
        # All chunks share their constants.
        names = {c.name: c.name.removeprefix(prefix) for c in constants}
        rename: Callable[[str], str] = lambda name: names.get(name, name)  # noqa: E731 - a parameter
        self._steps += [renamed(step, rename) for step in steps]
        self._constants |= {names[c.name]: replace(c, name=names[c.name]) for c in constants}
        self.origins |= {prefix + step.output: step.output for step in self.step.steps}
        return outputs

    def _part(self, i: int, port: str, tensor: str) -> str:
        """Slice the tokens of a chunk out of an input."""
        if self.chunks == 1:
            return tensor
        span = (i * self.sizes.chunk, (i + 1) * self.sizes.chunk)
        rows, columns = self._spans(port, span)
        name = f"chunk_{i}/{port}"
        self._append(Slice(output=name, source=tensor, rows=rows, columns=columns), port)
        return name

    def _spans(self, port: str, span: Range) -> tuple[Range | None, Range | None]:
        row = port == LOG_DECAY and not self.sizes.per_channel
        row = row or (port in (VALUE, BETA) and self.sizes.values_first)
        row = row or (port in self.sizes.key_ports and self.sizes.keys_first != self.turns_keys)
        return (None, span) if row else (span, None)

    def _joined(self, outputs: list[str], origin: str) -> str:
        if self.chunks == 1:
            return outputs[0]
        axis = Axis.COLUMNS if self.sizes.values_first else Axis.ROWS
        self._append(Concat(output=f"{OUTPUT}/chunks", sources=tuple(outputs), axis=axis), origin)
        return f"{OUTPUT}/chunks"

    def _turned(self, tensor: str, origin: str) -> str:
        return self._transposed(tensor, origin) if self.turns else tensor

    def _transposed(self, tensor: str, origin: str) -> str:
        self._append(Transpose(output=f"{tensor}/layout", source=tensor), origin)
        return f"{tensor}/layout"

    def _append(self, step: Step, origin: str) -> None:
        self._steps.append(step)
        self.origins[step.output] = origin
