"""Chunk steps of deployed layers: as calls that a trace records, or simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from qinvert.calibration.head_names import is_split, layer_name
from qinvert.chunk_step.ports import (
    BETA,
    KEY,
    LOG_DECAY,
    OUTPUT,
    QUERY,
    STATE,
    VALUE,
    step_sizes,
)
from qinvert.chunk_step.single_token import single_token_plan
from qinvert.errors import PlanError
from qinvert.export.functions import function_names
from qinvert.export.graph import DOMAIN
from qinvert.export.step_graph import is_step, step_interface
from qinvert.export.step_interface import VALID, Layout, StepInterface
from qinvert.hardware import Hardware
from qinvert.plan.plan import LayerPlan, Plan

#: What the name of a layer's function starts with.
PREFIX: Final = "Step_"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStep:
    """The chunk step of one layer, as one of the two graphs runs it."""

    name: str
    #: The layer's plan, or the same grids for a single token.
    plan: LayerPlan
    interface: StepInterface

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.interface.tokens(self.plan)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the state."""
        return tuple(int(size) for size in self.interface.inputs(self.plan)[STATE])


class StepCalls(Protocol):
    """Runs the steps of layers."""

    def __call__(
        self, step: LayerStep, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return o and the state, from the inputs of `StepInterface.inputs` in their order and layout."""
        ...


def layer_steps(plan: Plan, chunks: int | None, hardware: Hardware | None) -> dict[str, LayerStep]:
    """Return the step of every layer for windows of ``chunks`` chunks, or for single tokens where it is None.

    Raises
    ------
    PlanError
        If a layer of the plan is not a whole chunk step, or its heads have plans of their own.
    """
    steps = {}
    for name, layer in plan.layers.items():
        if is_split(plan, layer_name(name)):
            raise PlanError(
                f"{name} is the plan of one head, but deployed graphs run the heads of a layer together; "
                "calibrate with granularity='tensor'"
            )
        if not is_step(layer):
            raise PlanError(
                f"{name} is planned for its inverse alone; calibrate with scope='chunk' for whole steps"
            )
        steps[name] = _layer_step(name, layer, chunks, hardware)
    return steps


def _layer_step(name: str, plan: LayerPlan, chunks: int | None, hardware: Hardware | None) -> LayerStep:
    # A program without a shorter form decodes by a chunk of which one token is valid.
    used = plan if chunks is not None else (single_token_plan(plan) or plan)
    interface = step_interface(
        used, {"chunks": chunks or 1, "normalize": True, "layout": str(_layout(plan))}, hardware
    )
    return LayerStep(name=name, plan=used, interface=interface)


def _layout(plan: LayerPlan) -> Layout:
    sizes = step_sizes(plan.program)
    if sizes.values_first:
        return Layout.CHANNELS_FIRST if sizes.keys_first else Layout.VALUES_FIRST
    return Layout.TOKENS_FIRST


def step_names(plan: Plan) -> dict[str, str]:
    """Return the name of every layer's function."""
    names = function_names(list(plan.layers))
    return {layer: PREFIX + name.partition("_")[2] for layer, name in names.items()}


class RecordedSteps:
    """Calls that `torch.export` sees as one node each; their results have shapes, but no values."""

    def __init__(self, plan: Plan) -> None:
        self._names = step_names(plan)

    def __call__(
        self, step: LayerStep, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StepCalls`."""
        shapes = list(step.interface.outputs(step.plan).values())
        out, state = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self._names[step.name]}",
            list(inputs.values()),
            dtypes=(torch.float32, torch.float32),
            shapes=[[int(size) for size in shape] for shape in shapes],
            version=1,
        )
        return out, state


class SimulatedSteps:
    """The exact integers of the plans."""

    def __call__(
        self, step: LayerStep, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StepCalls`."""
        given = {name: _turned(step, name, x) for name, x in inputs.items()}
        ports = [given[name] for name in (QUERY, KEY, VALUE, LOG_DECAY, BETA, STATE)]
        out, state = step.plan.step(*ports, valid=given[VALID], normalize=step.interface.normalize)
        return _turned(step, OUTPUT, out), _turned(step, STATE, state)


def _turned(step: LayerStep, name: str, x: torch.Tensor) -> torch.Tensor:
    """Transpose between the layout of a graph and that of `LayerPlan.step`, which is its own inverse."""
    interface = step.interface
    keys = step_sizes(step.plan.program).key_ports
    turned = (
        interface.keys_first if name in keys else interface.values_first and name in (VALUE, OUTPUT, STATE)
    )
    return x.mT if turned else x
