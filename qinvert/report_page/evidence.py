"""Everything that a page can show of a plan: the plan, and what was measured for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from qinvert.calibration.capture import capture_batch
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.evaluate import Evaluation, Score, evaluate
from qinvert.calibration.figures_of_merit import Figures, figures_of
from qinvert.calibration.growth import RangeGrowth
from qinvert.calibration.matrix_sample import MatrixSample
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.simulate import Report, simulate
from qinvert.calibration.sources import open_systems
from qinvert.calibration.tensor_errors import tensor_errors
from qinvert.calibration.width_survey import WidthRow, width_survey
from qinvert.errors import InputError
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.pretrained import opened
from qinvert.progress import track
from qinvert.systems import Systems

Progress = Callable[[str, int], None]

#: Entries whose values, programs and candidates are drawn where nobody names any.
DETAILED: Final = 4
#: Sequences of a model's data on which output and logits are compared.
EVALUATED: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A plan with its measurements; what is None or empty was not measured."""

    plan: Plan
    #: Words for what the measurements were made on, such as "a model with data".
    measured_on: str = ""
    growth: Mapping[str, RangeGrowth] = field(default_factory=dict)
    report: Report | None = None
    evaluation: Evaluation | None = None
    #: A few matrices of every entry.
    systems: Mapping[str, Systems] = field(default_factory=dict)
    #: Sqnr of every tensor, by entry, of those in detail.
    tensors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: Each program under 4 to 16 bits, by entry, of those in detail.
    widths: Mapping[str, Sequence[WidthRow]] = field(default_factory=dict)
    #: Entries that are drawn in detail, worst first.
    detailed: tuple[str, ...] = ()

    @property
    def goal_db(self) -> float | None:
        """The sqnr that was asked for, of T or of a chunk step."""
        goal = self.plan.provenance.get("min_sqnr_db")
        return float(goal) if isinstance(goal, (int, float)) else None

    @property
    def max_loss_db(self) -> float | None:
        """The largest distance to the floor that was asked for."""
        loss = self.plan.provenance.get("max_loss_db")
        return float(loss) if isinstance(loss, (int, float)) else None

    @property
    def of_steps(self) -> bool:
        """Whether the plan holds whole chunk steps."""
        return not all(layer.program.is_inverse for layer in self.plan.layers.values())

    def figures(self, name: str) -> Figures:
        """Return the figures of one entry."""
        return figures_of(name, self.plan.layers[name], self.report)


def gather(
    plan: Plan,
    source: Any = None,
    data: Any = None,
    *,
    score: Score | None = None,
    layers: Sequence[str] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Evidence:
    """Measure what a source allows; see `qinvert.report` for the arguments.

    Raises
    ------
    InputError
        If the source is not legal, or is missing where there is data.
    PlanError
        If a named layer is not in the plan, or the source is another model.
    """
    for name in layers or ():
        plan.layer(name)
    source = opened(source)
    if source is None:
        if data is not None:
            raise InputError("data=... goes with a model; pass the model as the source")
        found = Evidence(plan=plan)
    elif isinstance(source, torch.nn.Module):
        found = _of_model(plan, source, data, score, progress, force)
    else:
        sample = MatrixSample(plan)
        stream = sample.watched(open_systems(source, data))
        report = simulate(plan, stream, progress=progress, force=force)
        found = _measured(plan, "matrices", sample, report, None)
    return _detailed(found, layers, progress)


def _of_model(
    plan: Plan, model: torch.nn.Module, data: Any, score: Score | None, progress: Progress | None, force: bool
) -> Evidence:
    check_identity(plan, model, force)
    if data is None:
        raise InputError("a model needs data=...: token ids [batch, length], a text file, or batches")
    # The data may be a stream, and is read more than once.
    batches = list(token_batches(data, model))
    sample = MatrixSample(plan)
    if all(layer.program.is_inverse for layer in plan.layers.values()):
        report = simulate(plan, sample.watched(open_systems(model, batches)), progress=progress, force=True)
    else:
        report = simulate(plan, model, batches, progress=progress, force=force)
        for batch in batches:
            for item in capture_batch(model, batch):
                sample.update(item.layer, Systems(lower=item.lower))
    first = _first(batches)
    evaluation = evaluate(model, plan, first, score=score, progress=progress, force=force)
    return _measured(plan, "a model with data", sample, report, evaluation)


def _first(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many whole batches as have `EVALUATED` sequences, at least one."""
    found, sequences = [], 0
    for batch in batches:
        if sequences >= EVALUATED:
            break
        found.append(batch)
        sequences += len(batch["input_ids"])
    return found


def _measured(
    plan: Plan, on: str, sample: MatrixSample, report: Report, evaluation: Evaluation | None
) -> Evidence:
    return Evidence(
        plan=plan,
        measured_on=on,
        growth=sample.growth,
        report=report,
        evaluation=evaluation,
        systems=sample.systems,
    )


def _detailed(found: Evidence, layers: Sequence[str] | None, progress: Progress | None) -> Evidence:
    """Return the evidence with what is measured of the worst entries, or of the named ones."""
    from dataclasses import replace

    names = tuple(layers) if layers else _worst(found)
    tensors: dict[str, Mapping[str, float]] = {}
    widths: dict[str, Sequence[WidthRow]] = {}
    for name in track(names, "layers in detail", len(names)):
        layer, systems = found.plan.layers[name], found.systems.get(name)
        if systems is None or not layer.program.is_inverse:
            continue
        tensors[name] = tensor_errors(layer, systems)
        if systems.count > 1:
            widths[name] = width_survey(layer.program, systems)
        if progress is not None:
            progress(name, systems.count)
    return replace(found, detailed=names, tensors=tensors, widths=widths)


def _worst(found: Evidence) -> tuple[str, ...]:
    def rank(entry: tuple[str, LayerPlan]) -> tuple[bool, float]:
        judged = found.figures(entry[0]).judged_db
        return bool(entry[1].provenance.get("meets_goal", True)), 0.0 if judged is None else judged

    order = sorted(found.plan.layers.items(), key=rank)
    return tuple(name for name, _ in order[:DETAILED])
