"""Chunk after chunk in integers, the state carried as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch

from qinvert.chunk_step.ports import (
    BETA,
    LOG_DECAY,
    OUTPUT,
    STATE,
    VALUE,
    StepSizes,
    check_state_grids,
    step_sizes,
)
from qinvert.execution.floating import execute as execute_floating
from qinvert.execution.laws import LAWS
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize, quantize
from qinvert.plan.quantized_program import QuantizedProgram

#: Ports of a step by name, ``[N, rows, columns]`` with all tokens.
Ports: TypeAlias = Mapping[str, torch.Tensor]


def run_chunks(
    plan: QuantizedProgram, inputs: Ports, chunks_per_call: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a chunk step on all chunks of a batch, bit for bit as in ONNX.

    Inside a call the integers of the state go on as they are.  Between two calls they
    are read as real numbers and rounded again, which changes those of two planes only.

    Parameters
    ----------
    plan : QuantizedProgram
        Of a chunk step; its state has one grid.
    inputs : mapping
        Real values of every port, ``[N, rows, columns]``, with a multiple of C tokens and the first state.
    chunks_per_call : int

    Returns
    -------
    tuple
        Integers of o of all tokens, and integers of the state behind every chunk.
    """
    check_state_grids(plan)
    grid, outputs, states = plan.tensors[STATE], [], list[torch.Tensor]()
    state, law = _quantized(plan, STATE, inputs[STATE]), LAWS[Rounding.ONNX]
    evaluator = law.evaluator(plan, len(state), state.device)
    for i, chunk in enumerate(_chunks(step_sizes(plan.program), inputs)):
        if i and i % chunks_per_call == 0:
            state = _quantized(plan, STATE, dequantize(state, grid.scale, grid.format))
        given = {name: _quantized(plan, name, x) for name, x in chunk.items()}
        with torch.autocast(state.device.type, enabled=False):
            found = plan.program.evaluate(evaluator, {**given, STATE: state})
        outputs.append(found[OUTPUT])
        state = found[STATE]
        states.append(state)
    return _joined(step_sizes(plan.program), outputs), states


def _quantized(plan: QuantizedProgram, name: str, values: torch.Tensor) -> torch.Tensor:
    return quantize(values, plan.tensors[name].scale, plan.tensors[name].format)


def run_chunks_exactly(plan: QuantizedProgram, inputs: Ports) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Do what `run_chunks` does in float64; return real values.

    What leaves float64 on the way, or float32 before it, goes on from its largest number.
    """
    # Integers saturate there; the rule itself would end in inf - inf.
    inputs = {name: torch.nan_to_num(x) for name, x in inputs.items()}
    outputs, states, state = [], list[torch.Tensor](), inputs[STATE]
    for chunk in _chunks(step_sizes(plan.program), inputs):
        found = execute_floating(plan.program, {**chunk, STATE: state}, torch.float64)
        outputs.append(found[OUTPUT])
        state = torch.nan_to_num(found[STATE])
        states.append(state)
    return _joined(step_sizes(plan.program), outputs), states


def _chunks(sizes: StepSizes, inputs: Ports) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the ports of every chunk but the state."""
    axes = {
        VALUE: _tokens(sizes),
        BETA: _tokens(sizes),
        LOG_DECAY: 2,
        **dict.fromkeys(sizes.key_ports, 2 if sizes.keys_first else 1),
    }
    for start in range(0, inputs[BETA].numel() // len(inputs[BETA]), sizes.chunk):
        yield {name: inputs[name].narrow(axis, start, sizes.chunk) for name, axis in axes.items()}


def _joined(sizes: StepSizes, outputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(outputs, dim=_tokens(sizes))


def _tokens(sizes: StepSizes) -> int:
    """Axis of the tokens in v and o."""
    return 2 if sizes.values_first else 1
