"""`qinvert.simulate` of plans of the whole chunk step: errors of outputs, state and T, head by head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qinvert.calibration.chunk_steps.candidate import exact_outputs
from qinvert.calibration.chunk_steps.results import head_of, step_results
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.head_names import head_name, is_split
from qinvert.calibration.heads import check_heads
from qinvert.calibration.patching import forward, patched_by_layer, solve_chunks
from qinvert.chunk_step.ports import STATE, VALUE
from qinvert.delta_rule.chunks import ChunkOutputs, DeltaChunks
from qinvert.documents import to_document
from qinvert.errors import InputError, PlanError
from qinvert.execution.chunk_steps import run_integers
from qinvert.execution.laws import LAWS
from qinvert.matrices import SolvedInverse
from qinvert.metrics import ErrorStatistics, NoiseStatistics
from qinvert.numerics.exact import at_ends
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize
from qinvert.plan.plan import LayerPlan, Plan

#: Called after every batch with the layer's name and the tokens seen so far.
Progress = Callable[[str, int], None]
#: Tensor of T in programs of steps.
INVERSE = "T"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Errors of one layer's step as ``20 log10(||x|| / ||x_hat - x||)``, dB, over all data.

    *Free-running*: the integers carry the state themselves from the first chunk
    of a sequence to the last.  *One step*: every chunk starts from the exact state.
    """

    #: Tokens simulated, padding of the last chunk included.
    tokens: int
    formats: str
    program: str
    #: Outputs, free-running, and for every head.
    sqnr_o_db: float
    head_sqnr_o_db: tuple[float, ...]
    #: The state at the end of every sequence, free-running, and for every head.
    sqnr_state_db: float
    head_sqnr_state_db: tuple[float, ...]
    #: Outputs and states of one step.
    step_sqnr_o_db: float
    step_sqnr_state_db: float
    #: T below its diagonal, and for every head; None where the step does not form T.
    sqnr_t_db: float | None
    head_sqnr_t_db: tuple[float, ...]
    #: Number of values at the ends of their grid, for each tensor of values that has any.
    saturations: dict[str, int] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float:
        """The smaller one of output and state, free-running."""
        return min(self.sqnr_o_db, self.sqnr_state_db)

    def __str__(self) -> str:
        return (
            f"o {self.sqnr_o_db:.1f} dB, state {self.sqnr_state_db:.1f} dB free-running "
            f"({self.step_sqnr_o_db:.1f} and {self.step_sqnr_state_db:.1f} dB in one step), "
            f"{self.tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; infinities become None."""
        document: dict[str, Any] = to_document(self)
        return document


class StepSimulation:
    """Streams the errors of one layer's plan."""

    def __init__(self, plan: LayerPlan, rounding: Rounding) -> None:
        self.plan, self.rounding = plan, rounding
        self._whole = {name: NoiseStatistics() for name in ("out", "state", "step_out", "step_state")}
        self._heads: dict[int, dict[str, NoiseStatistics]] = {}
        self._inverses: dict[int, ErrorStatistics] = {}
        self._saturations: dict[str, int] = {}
        #: Tensors whose ranges rest on data.
        self._unproved = plan.program.depends_on(VALUE, STATE)
        self.tokens = 0

    def update(self, chunks: DeltaChunks) -> None:
        """Add the chunks of one forward pass."""
        exact = exact_outputs(chunks)
        batch, heads, number, size = chunks.beta.shape
        self.tokens += batch * number * size
        inverses: list[torch.Tensor] = []

        def observe(name: str, integers: torch.Tensor) -> None:
            self._count(name, integers)
            if name == INVERSE:
                inverses.append(integers)

        free = run_integers(self.plan, chunks, self.plan.channels, self.rounding, observe)
        self._add("out", free.out, exact.out)
        self._add("state", free.state, exact.state)
        self._one_step(chunks, exact)
        if inverses and self.plan.program.shapes[INVERSE].blocks == 1:
            # Parts hold sequences and heads, flat, one after the other.
            flat = torch.cat(inverses, 1)
            self._add_inverse(flat.reshape(number, batch, heads, size, size).movedim(0, 2), chunks)

    def _one_step(self, chunks: DeltaChunks, exact: ChunkOutputs) -> None:
        before = chunks.states(SolvedInverse(chunks.lower))
        batch, heads, number = chunks.beta.shape[:3]

        def apart(x: torch.Tensor) -> torch.Tensor:
            return x.movedim(2, 1).flatten(0, 1).unsqueeze(2)

        single = chunks.replaced(apart, before.movedim(2, 1).flatten(0, 1))
        result = step_results(self.plan, single, self.rounding)
        after = torch.cat([before[:, :, 1:], exact.state.unsqueeze(2)], 2)
        out = result.out.squeeze(2).reshape(batch, number, heads, *result.out.shape[3:]).movedim(1, 2)
        state = result.state.reshape(batch, number, heads, *result.state.shape[2:]).movedim(1, 2)
        self._whole["step_out"].update(out, exact.out)
        self._whole["step_state"].update(state, after)

    def _add(self, name: str, estimate: torch.Tensor, exact: torch.Tensor) -> None:
        self._whole[name].update(estimate, exact)
        for head in range(exact.shape[1]):
            kept = self._heads.setdefault(head, {"out": NoiseStatistics(), "state": NoiseStatistics()})
            kept[name].update(estimate[:, head], exact[:, head])

    def _add_inverse(self, integers: torch.Tensor, chunks: DeltaChunks) -> None:
        grid = self.plan.tensors[INVERSE]
        t = dequantize(integers, grid.scale, grid.format)
        if self.plan.program.parameters.get("values_first"):
            t = t.mT
        lower = chunks.lower
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        exact = (SolvedInverse(lower) @ one).to(torch.float64)
        for head in range(lower.shape[1]):
            self._inverses.setdefault(head, ErrorStatistics()).update(t[:, head], exact[:, head])

    def _count(self, name: str, integers: torch.Tensor) -> None:
        count = int(at_ends(integers, self.plan.tensors[name].format).sum())
        if count and name in self._unproved:
            self._saturations[name] = self._saturations.get(name, 0) + count

    def result(self) -> StepReport:
        """Return the report of what was seen."""
        inverses = list(self._inverses.values())
        total = ErrorStatistics()
        for part in inverses:
            total.signal += part.signal
            total.noise += part.noise
        heads = [self._heads[head] for head in sorted(self._heads)]
        return StepReport(
            tokens=self.tokens,
            formats=self.plan.formats,
            program=self.plan.program.title,
            sqnr_o_db=self._whole["out"].sqnr_db,
            head_sqnr_o_db=tuple(head["out"].sqnr_db for head in heads),
            sqnr_state_db=self._whole["state"].sqnr_db,
            head_sqnr_state_db=tuple(head["state"].sqnr_db for head in heads),
            step_sqnr_o_db=self._whole["step_out"].sqnr_db,
            step_sqnr_state_db=self._whole["step_state"].sqnr_db,
            sqnr_t_db=total.sqnr_db if inverses else None,
            head_sqnr_t_db=tuple(part.sqnr_db for part in inverses),
            saturations=dict(self._saturations),
        )


def simulate_steps(
    plan: Plan, model: Any, data: Any, rounding: Rounding, progress: Progress | None = None
) -> dict[str, StepReport]:
    """Run every layer's step on the chunks of a model's exact forward passes.

    Raises
    ------
    InputError
        If the source is not a model with data, or its layers do not fit the plan.
    PlanError
        If the model has a layer that the plan does not know, or the rounding is not known for the plan.
    """
    if not isinstance(model, torch.nn.Module) or data is None:
        raise InputError("a plan of chunk steps is simulated on a model: pass a model and data=...")
    for layer_plan in plan.layers.values():
        # Before the model runs: it may take minutes to the first chunk.
        LAWS[rounding].check(layer_plan)
    running: dict[str, StepSimulation] = {}

    def see(layer: str, chunks: DeltaChunks) -> SolvedInverse:
        for entry, part in _entries(plan, layer, chunks):
            simulation = running.setdefault(entry, StepSimulation(plan.layer(entry), rounding))
            simulation.update(part)
            if progress is not None:
                progress(entry, simulation.tokens)
        return solve_chunks(layer, chunks)

    for batch in token_batches(data, model):
        with patched_by_layer(model, see):
            forward(model, batch)
    lacking = [name for name in plan.layers if name not in running]
    if lacking:
        raise PlanError(f"the model has no layer {lacking[0]!r}; pass the model that the plan was made for")
    return {name: running[name].result() for name in plan.layers}


def _entries(plan: Plan, layer: str, chunks: DeltaChunks) -> list[tuple[str, DeltaChunks]]:
    if not is_split(plan, layer):
        return [(layer, chunks)]
    number = chunks.beta.shape[1]
    check_heads(plan, layer, number)
    return [(head_name(layer, head), head_of(chunks, head)) for head in range(number)]
