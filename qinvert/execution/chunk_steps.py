"""Runs a program of the chunk step over many chunks, with the state handed on from each to the next.

What does not depend on the state runs once for all chunks; the rest runs chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

import torch

from qinvert.chunk_step.ports import (
    BETA,
    KEY,
    LOG_DECAY,
    OUTPUT,
    QUERY,
    STATE,
    VALUE,
    StepSizes,
    check_state_grids,
    step_sizes,
)
from qinvert.delta_rule.chunks import ChunkOutputs, DeltaChunks
from qinvert.execution.floating import FloatEvaluator
from qinvert.execution.laws import LAWS
from qinvert.execution.tensors import TorchEvaluator
from qinvert.execution.value_channels import enter, leave
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.step_list import StepList

#: Matrices that run at once on a CPU, and on a GPU: what fits its caches, and what fills it.
CPU_MATRICES: Final = 512
GPU_MATRICES: Final = 65536

#: Makes an interpreter for a number of matrices.
Evaluators: TypeAlias = Callable[[int], TorchEvaluator]
#: ``observe(name, values)`` with values ``[chunks, sequences * heads, rows, columns]`` of single blocks, of
#: some sequences at a time.
Observer: TypeAlias = Callable[[str, torch.Tensor], None]


def run_float(
    program: StepList,
    chunks: DeltaChunks,
    dtype: torch.dtype = torch.float32,
    observe: Observer | None = None,
    channels: ValueChannels | None = None,
) -> ChunkOutputs:
    """The step in floating point, over all chunks of a layer."""
    return _run(
        program,
        entered(chunks, channels),
        lambda batch: FloatEvaluator(batch, dtype, chunks.q.device),
        lambda _, x: x.to(dtype),
        lambda _, x: x,
        channels,
        observe,
    )


def run_integers(
    plan: QuantizedProgram,
    chunks: DeltaChunks,
    channels: ValueChannels | None = None,
    rounding: Rounding = Rounding.ONNX,
    observe: Observer | None = None,
) -> ChunkOutputs:
    """The step in exact integers, over all chunks of a layer; ``observe`` receives integers.

    The state travels from chunk to chunk as it is: its input and output have one grid.

    Raises
    ------
    PlanError
        If the grids of the state differ, or that rounding is not known for the plan.
    """
    law = LAWS[rounding]
    law.check(plan)
    check_state_grids(plan)

    def quantized(name: str, values: torch.Tensor) -> torch.Tensor:
        grid = plan.tensors[name]
        return law.quantize(values, grid.scale, grid.format)

    def real(port: str, values: torch.Tensor) -> torch.Tensor:
        grid = plan.tensors[next(p.tensor for p in plan.program.outputs if p.name == port)]
        return dequantize(values, grid.scale, grid.format)

    return _run(
        plan.program,
        entered(chunks, channels),
        lambda batch: law.evaluator(plan, batch, chunks.q.device),
        quantized,
        real,
        channels,
        observe,
    )


def entered(chunks: DeltaChunks, channels: ValueChannels | None) -> DeltaChunks:
    """Return chunks whose values and state are in the channels of a plan."""
    if channels is None:
        return chunks
    return replace(chunks, v=enter(channels, chunks.v), state=enter(channels, chunks.state))


def _run(
    program: StepList,
    chunks: DeltaChunks,
    evaluators: Evaluators,
    take: Callable[[str, torch.Tensor], torch.Tensor],
    give: Callable[[str, torch.Tensor], torch.Tensor],
    channels: ValueChannels | None,
    observe: Observer | None,
) -> ChunkOutputs:
    sizes, (batch, heads, number) = step_sizes(program), chunks.beta.shape[:3]
    runner = _Runner(program, evaluators, observe)
    outs, states = [], []
    # Autocast would compute products of float32 integers in 16 bits.
    with torch.autocast(chunks.q.device.type, enabled=False):
        for part in _parts(chunks, sizes):
            inputs = {name: take(name, x) for name, x in part.items()}
            out, state = runner.run(inputs)
            outs.append(give(OUTPUT, out))
            states.append(give(STATE, state))
    out, state = torch.cat(outs, 1), torch.cat(states)
    if sizes.values_first:
        out, state = out.mT, state.mT
    out = out.reshape(number, batch, heads, *out.shape[2:]).movedim(0, 2)
    state = state.reshape(batch, heads, *state.shape[1:])
    return ChunkOutputs(out=leave(channels, out), state=leave(channels, state))


def _parts(chunks: DeltaChunks, sizes: StepSizes) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the inputs of some sequences and heads: ``[N, n, rows, columns]``, the state without N."""
    values, state, beta = chunks.v, chunks.state, chunks.beta.unsqueeze(-1)
    if sizes.values_first:
        values, state, beta = values.mT, state.mT, beta.mT
    g = chunks.g if sizes.per_channel else chunks.g.unsqueeze(-2)
    whole = {QUERY: chunks.q, KEY: chunks.k, VALUE: values, BETA: beta, LOG_DECAY: g}
    if sizes.keys_first:
        whole |= {name: whole[name].mT for name in sizes.key_ports}
    most = GPU_MATRICES if chunks.q.is_cuda else CPU_MATRICES
    heads, number = chunks.beta.shape[1:3]
    # Whole sequences, so that whoever observes can tell the heads apart.
    size = heads * max(1, most // (heads * number))
    flat = {name: x.flatten(0, 1) for name, x in whole.items()}
    states = state.flatten(0, 1)
    for start in range(0, len(states), size):
        part = {name: x[start : start + size].transpose(0, 1) for name, x in flat.items()}
        yield {**part, STATE: states[start : start + size]}


class _Runner:
    """Runs one program over chunks of some sequences and heads."""

    def __init__(self, program: StepList, evaluators: Evaluators, observe: Observer | None) -> None:
        self.program, self.evaluators, self.observe = program, evaluators, observe
        late = program.depends_on(STATE)
        self.early = [step for step in program.steps if step.output not in late]
        self.late = [step for step in program.steps if step.output in late]
        outputs = {port.name: port.tensor for port in program.outputs}
        self.output, self.state = outputs[OUTPUT], outputs[STATE]
        read = {name for step in self.late for name in step.inputs}
        written = {*(step.output for step in self.early), *(port.name for port in program.inputs)}
        #: What chunks take from the part that all share.
        self.shared = ({*read, *outputs.values()} & written) - late

    def run(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs ``[N, n, rows, columns]`` and the last state ``[n, rows, columns]``."""
        number, count = inputs[QUERY].shape[:2]
        values = {name: x.flatten(0, 1) for name, x in inputs.items() if name != STATE}
        self._see(inputs, number)
        evaluator = self.evaluators(number * count)
        self.program.follow(evaluator, self.early, values, self.shared, self._observer(number))
        state, outs = inputs[STATE], []
        evaluator = self.evaluators(count)
        for i in range(number):
            # Blocks come first, then chunks, then sequences and heads.
            local = {name: _chunk(values[name], i, number, count) for name in self.shared}
            local[STATE] = state
            wanted = (self.output, self.state)
            self.program.follow(evaluator, self.late, local, wanted, self._observer(1))
            outs.append(local[self.output])
            state = local[self.state]
        return torch.stack(outs), state

    def _see(self, inputs: Mapping[str, torch.Tensor], number: int) -> None:
        if self.observe is not None:
            for name, x in inputs.items():
                self.observe(name, x[None] if name == STATE else x)

    def _observer(self, number: int) -> Observer | None:
        if self.observe is None:
            return None
        observe = self.observe

        def forward(name: str, values: torch.Tensor) -> None:
            blocks = self.program.shapes[name].blocks
            for block in values.reshape(blocks, number, -1, *values.shape[1:]):
                observe(name, block)

        return forward


def _chunk(values: torch.Tensor, index: int, number: int, count: int) -> torch.Tensor:
    return values.reshape(-1, number, count, *values.shape[1:])[:, index].flatten(0, 1)
