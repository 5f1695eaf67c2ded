"""What a plan returns for the chunks of a layer: T, or the results of the whole step."""

from __future__ import annotations

from typing import cast

import torch

from qinvert.calibration.head_names import head_name, is_split
from qinvert.calibration.heads import check_heads, layer_inverse, plan_inverse
from qinvert.chunk_step.ports import step_sizes
from qinvert.delta_rule.chunks import Applied, ChunkOutputs, DeltaChunks
from qinvert.errors import InputError
from qinvert.execution.chunk_steps import run_integers
from qinvert.matrices import like
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.program.step_list import StepList


def layer_results(
    plan: LayerPlan, chunks: DeltaChunks, rounding: Rounding = Rounding.ONNX
) -> Applied | ChunkOutputs:
    """Return T of a plan of inverses, or outputs and state of a plan of steps.

    Raises
    ------
    InputError
        If the chunks have other sizes than the step.
    """
    if plan.program.is_inverse:
        return layer_inverse(plan, chunks.systems)
    return step_results(plan, chunks, rounding)


def plan_results(
    plan: Plan, layer: str, chunks: DeltaChunks, rounding: Rounding = Rounding.ONNX
) -> Applied | ChunkOutputs:
    """`layer_results` of a layer, each head by its own program where the plan has heads.

    Raises
    ------
    InputError
        If the chunks have other sizes than the step.
    PlanError
        If the layer has another number of heads than the plan.
    """
    split = is_split(plan, layer)
    if plan.layer(head_name(layer, 0) if split else layer).program.is_inverse:
        return plan_inverse(plan, layer, chunks.systems)
    if not split:
        return step_results(plan.layer(layer), chunks, rounding)
    number = chunks.beta.shape[1]
    check_heads(plan, layer, number)
    parts = [
        step_results(plan.layer(head_name(layer, head)), head_of(chunks, head), rounding)
        for head in range(number)
    ]
    return ChunkOutputs(
        out=torch.cat([part.out for part in parts], 1), state=torch.cat([part.state for part in parts], 1)
    )


def step_results(plan: LayerPlan, chunks: DeltaChunks, rounding: Rounding = Rounding.ONNX) -> ChunkOutputs:
    """Outputs and state of a plan of steps.

    Raises
    ------
    InputError
        If the chunks have other sizes than the step.
    ProgramError
        If it is another program.
    """
    check_sizes(plan.program, chunks)
    with torch.no_grad():
        result = run_integers(plan, chunks, plan.channels, rounding)
    inputs = (chunks.q, chunks.k, chunks.v, chunks.g, chunks.beta, chunks.state)
    out, state = (cast("torch.Tensor", like(x, *inputs)) for x in (result.out, result.state))
    return ChunkOutputs(out=out, state=state)


def check_sizes(program: StepList, chunks: DeltaChunks) -> None:
    """Refuse chunks of other sizes than a program of a step is for.

    Raises
    ------
    InputError
        With both sizes.
    ProgramError
        If it is another program.
    """
    sizes = step_sizes(program)
    given = (chunks.k.shape[-2], chunks.k.shape[-1], chunks.v.shape[-1], chunks.g.ndim == chunks.k.ndim)
    wanted = (sizes.chunk, sizes.key_size, sizes.value_size, sizes.per_channel)
    if given != wanted:
        raise InputError(
            "the layer has chunk, key size, value size, one decay per channel = "
            f"{given}, but the program is for {wanted}; calibrate this model, or build the program for these "
            "sizes"
        )


def head_of(chunks: DeltaChunks, head: int) -> DeltaChunks:
    """Return the chunks of one head."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x[:, head : head + 1]

    return chunks.replaced(cut, cut(chunks.state))
