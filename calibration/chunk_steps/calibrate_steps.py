"""`qinvert.calibrate` with ``scope="chunk"``: one pass over the data, one plan of a step for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qinvert.calibration.choices import Granularity, RangeRule, ScaleRule
from qinvert.calibration.chunk_steps.candidate import (
    Layer,
    StepRules,
    exact_outputs,
    margins,
    with_provenance,
)
from qinvert.calibration.chunk_steps.grids import RoomRules
from qinvert.calibration.chunk_steps.observation import Observed
from qinvert.calibration.chunk_steps.one_pass import Progress, observe_steps, split_heads
from qinvert.calibration.chunk_steps.options import WIDE_BITS, ChunkOptions
from qinvert.calibration.chunk_steps.planner import StepChoices, check_widths, choose_step
from qinvert.calibration.chunk_steps.results import check_sizes
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.calibration.head_names import head_name
from qinvert.calibration.observation.data_record import DataRecord
from qinvert.calibration.output_goals import SEQUENCES, OutputGoals, reach, summary_of, with_facts
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.calibration.planning.costs import Costs
from qinvert.chunk_step.gated_delta_step import gated_delta_step
from qinvert.chunk_step.ports import BETA, NEGATIVE_BETA, find_step_sizes
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.errors import InputError, PlanError, ProgramError
from qinvert.formats import FLOAT32, INT4, INT8, INT16, NARROW_BITS, IntFormat
from qinvert.methods import AUTO
from qinvert.methods.elimination import elimination
from qinvert.plan.plan import LayerPlan
from qinvert.profiles import PROFILES, Profile, default_target
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import MAX_BETA
from qinvert.progress import track


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCalibration:
    """Everything that plans of steps follow from, beside model and data."""

    #: Method of the inverse, a program of one, or a program of a whole step.
    method: str | Program
    rules: StepRules
    choices: StepChoices
    costs: Costs
    options: ChunkOptions
    granularity: Granularity

    def run(
        self, model: torch.nn.Module, data: Any, progress: Progress | None, outputs: OutputGoals
    ) -> tuple[dict[str, LayerPlan], dict[str, Any]]:
        """Return the plan of every layer, or of every head, and what is known of data and outputs.

        Raises
        ------
        InputError, PlanError, ProgramError
            See `qinvert.calibrate`.
        """
        if not isinstance(model, torch.nn.Module) or data is None:
            raise InputError(
                "scope='chunk' plans the layers of a model: pass a model and data=...; matrices L alone have "
                "neither values nor a state, for them use scope='inverse'"
            )
        record = DataRecord(SEQUENCES if outputs.given else 0)
        rotated = self.options.rotate
        seen = observe_steps(model, data, self._program, rotated=rotated, progress=progress, record=record)
        parts = self._entries(seen)

        def planned(name: str, goal_db: float) -> LayerPlan:
            return replace(self, choices=replace(self.choices, min_sqnr_db=goal_db))._plan(*parts[name])

        goal_db = self.choices.min_sqnr_db
        if not outputs.given:
            layers = {name: planned(name, goal_db) for name in track(parts, "layers", len(parts))}
            return layers, record.provenance
        reached = reach(model, record.first, list(parts), outputs, planned, goal_db)
        return with_facts(reached, None), record.provenance | summary_of(reached, outputs)

    def _entries(self, seen: Mapping[str, tuple[Program, Observed]]) -> dict[str, tuple[Program, Observed]]:
        """Return what was seen of every entry of the plan."""
        if self.granularity is not Granularity.HEAD:
            return dict(seen)
        return {
            head_name(name, i): (program, part)
            for name, (program, observed) in seen.items()
            for i, part in enumerate(split_heads(observed))
        }

    def _program(self, chunks: DeltaChunks, max_beta: float = 1.0) -> Program:
        """Return the program for the sizes of a layer."""
        program = self._built(chunks, max_beta)
        # Names of tensors are known no sooner.
        widths = width_groups(program, self.options.int4)
        check_widths(widths, self.choices, float_state=self.options.float_state)
        return program

    def _built(self, chunks: DeltaChunks, max_beta: float) -> Program:
        method, size = self.method, chunks.beta.shape[-1]
        if isinstance(method, Program) and find_step_sizes(method) is not None:
            check_sizes(method, chunks)
            return method
        return gated_delta_step(
            self._inverse(size // 2 if self.options.halves else size),
            chunks.k.shape[-1],
            chunks.v.shape[-1],
            "channel" if chunks.g.ndim == chunks.k.ndim else "scalar",
            self.options.form,
            values_first=self.options.values_first,
            halves=self.options.halves,
            error_feedback=self.options.reads_apart,
            max_beta=max_beta,
        )

    def _inverse(self, size: int) -> Program:
        if isinstance(self.method, Program):
            if self.method.chunk != size:
                raise ProgramError(
                    f"{self.method.title} is for {self.method.chunk} x {self.method.chunk} matrices, but the "
                    f"step needs {size} x {size}; build the program for that size"
                )
            return self.method
        if self.method == AUTO:
            inverse = elimination(size)
        else:
            inverse = candidate_programs(self.method, size, on_chips=self.costs.hardware is not None)[0]
        # As sums, residual terms need no 1.0 on a grid, and no wider product.
        return residuals_as_sums(inverse)

    def _plan(self, program: Program, observed: Observed) -> LayerPlan:
        sample = observed.sample
        assert sample is not None
        largest = float(observed.largest[BETA].max())
        max_beta = 1.0 if largest <= 1 else MAX_BETA
        if max_beta > 1:
            program = self._program(sample, max_beta)
        _check_beta(program, largest)
        layer = Layer(
            program=program,
            observed=observed,
            widths=width_groups(program, self.options.int4),
            rules=self.rules,
            max_beta=max_beta,
            truth=exact_outputs(sample),
        )
        choice = choose_step(layer, self.choices, self.costs)
        facts = {**_facts(layer), "margins": margins(layer, choice.best.plan)}
        return with_provenance(choice.best.plan, {**facts, **choice.to_json(self.choices)})


def _check_beta(program: Program, largest: float) -> None:
    # A program of a step that the caller built holds for the beta that it was built for.
    bounds = {step.output: step.bound for step in program.steps}
    limit = bounds.get(NEGATIVE_BETA)
    if limit is not None and largest > limit * (1 + 2**-10):
        raise ProgramError(
            f"beta reaches {largest:.4g}, but {program.title} is for beta up to {limit:g}; build it with "
            f"max_beta={MAX_BETA:g}"
        )


def _facts(layer: Layer) -> dict[str, Any]:
    observed = layer.observed
    return {
        "heads": observed.heads,
        "tokens": observed.tokens,
        "longest": observed.longest,
        "max_beta": layer.max_beta,
        "state_growth": {str(1 << i): _rounded(observed, 1 << i) for i in range(_doublings(observed))},
    }


def _doublings(observed: Observed) -> int:
    return len(observed.state_growth).bit_length()


def _rounded(observed: Observed, chunks: int) -> float:
    """Largest state after that many chunks, to digits that any machine reproduces."""
    return float(f"{observed.state_growth[chunks - 1]:.4g}")


def step_calibration(
    *,
    method: str | Program,
    narrowest: IntFormat,
    bits: str,
    scales: ScaleRule,
    ranges: str,
    min_sqnr_db: float,
    costs: Costs,
    options: ChunkOptions,
    granularity: Granularity,
) -> StepCalibration:
    """Return the calibration of steps for what `qinvert.calibrate` was given.

    Raises
    ------
    PlanError
        If options do not go together, or ask for more bits than the target has.
    """
    _check_options(options, bits, narrowest, costs.profile)
    profile, all_wide = costs.profile, narrowest.largest > INT8.largest
    wide = [fmt for fmt in profile.formats if fmt.largest > INT8.largest]
    return StepCalibration(
        method=method,
        rules=StepRules(
            narrow=INT8 if all_wide else narrowest,
            wide=narrowest if all_wide else wide[0] if wide else None,
            equal_widths=profile.quantized_everywhere,
            scales=scales,
            requantize=profile.requantize,
            room=RoomRules(state_margin=options.state_margin, float_state=options.float_state),
        ),
        choices=StepChoices(
            min_sqnr_db=min_sqnr_db,
            widens=bits == AUTO and bool(wide),
            all_wide=all_wide,
            value_bits=options.value_bits,
            state_bits=_carried_bits(options, bool(wide) and bits == AUTO),
            reads_narrow=options.error_feedback,
            equalize=options.equalize,
            rotated=options.rotate,
            ranges=_range_rules(ranges),
        ),
        costs=costs,
        options=options,
        granularity=granularity,
    )


def _carried_bits(options: ChunkOptions, has_wide: bool) -> int | str:
    """Return the width of what is carried; beside a float32 that of its decays and of what is added to it."""
    if options.float_state:
        return WIDE_BITS if has_wide else NARROW_BITS
    return WIDE_BITS if options.error_feedback else options.state_bits


def _check_options(options: object, bits: str, narrowest: IntFormat, profile: Profile) -> None:
    if not isinstance(options, ChunkOptions):
        raise PlanError(f"chunk is a {type(options).__name__}; pass chunk=qinvert.ChunkOptions(...)")
    chosen = {name: getattr(options, name) for name in ("value_bits", "state_bits")}
    fixed = {name: given for name, given in chosen.items() if given != AUTO}
    fixed |= {"error_feedback": True} if options.error_feedback else {}
    fixed |= {"int4": options.int4} if options.int4 else {}
    if fixed and narrowest != INT8:
        name, given = next(iter(fixed.items()))
        raise PlanError(
            f"{name}={given} does not go with bits={bits}, which is the format of all tensors; leave one of "
            "them out"
        )
    if (WIDE_BITS in fixed.values() or options.error_feedback) and all(
        fmt.largest <= INT8.largest for fmt in profile.formats
    ):
        raise PlanError(
            f"target {profile.name!r} has no format of more than 8 bits for values or a state; choose "
            f"target={default_target(INT16)!r}, or leave value_bits, state_bits and error_feedback out"
        )
    if options.int4 and not {INT4, INT8} <= {*profile.formats}:
        named = ", ".join(name for name, other in PROFILES.items() if {INT4, INT8} <= {*other.formats})
        raise PlanError(
            f"target {profile.name!r} does not take 4 and 8 bits side by side; choose one of {named}, or "
            "leave int4 out"
        )
    if options.float_state and not profile.float_state:
        raise PlanError(
            f"target {profile.name!r} has no float32 between integers for a state; choose "
            f"target={default_target(INT16)!r}, or use error_feedback in place of state_bits={FLOAT32.name!r}"
        )


def _range_rules(ranges: str) -> tuple[RangeRule, ...]:
    """Return the rules that narrow values may have; ``auto`` tries the largest value and the least error."""
    return (RangeRule.MAX, RangeRule.MSE) if ranges == AUTO else (RangeRule(ranges),)
