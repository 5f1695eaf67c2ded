"""`qinvert.simulate`: what the integers of a plan cost, per layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from qinvert.calibration.chunk_steps.simulate_steps import StepReport, simulate_steps
from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.head_errors import HeadErrors, head_errors, worst_head
from qinvert.calibration.head_names import head_number, is_split, layer_name
from qinvert.calibration.heads import split_heads
from qinvert.calibration.model_identity import check_identity
from qinvert.calibration.sources import DEFAULT_LAYER, check_size, open_systems
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.execution.inputs import needed
from qinvert.execution.laws import LAWS
from qinvert.html_table import html_table
from qinvert.metrics import ErrorStatistics, floor_inverse
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.simulation import simulate_counting
from qinvert.systems import HEAD_AXIS, Systems

Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Errors of one layer; every metric as defined in `qinvert.metrics`."""

    #: Matrices simulated.
    matrices: int
    #: Formats of the plan.
    formats: str
    #: Title of the program.
    program: str
    #: Signal to quantization noise below the diagonal, all matrices together.
    sqnr_db: float
    #: The same for the exact inverse on the plan's input and output grids.
    floor_db: float
    #: sqnr of every head, of which an entry of one head has one; empty without an axis of heads.
    head_sqnr_db: tuple[float, ...]
    #: max over matrices of ||E||_F / ||T||_F.
    worst_rel: float
    #: max|E|.
    max_abs: float
    #: Sums of squares of tril(T, -1) and tril(E, -1), to add layers up.
    signal: float
    noise: float
    #: Values of T that are NaN or Inf.
    non_finite: int
    #: Number of values at the ends of their grid, for each tensor that has any; partial tensors, on
    #: whose values there no result depends, are left out.
    saturations: dict[str, int]
    #: Errors of every head, with its share of the layer's signal.
    heads: tuple[HeadErrors, ...] = ()

    @property
    def worst_head(self) -> HeadErrors | None:
        """The head with the least sqnr among those that carry signal; None without an axis of heads."""
        return worst_head(self.heads)

    @property
    def worst_head_sqnr_db(self) -> float | None:
        """Sqnr of the worst head; None where the matrices have no head axis."""
        return min(self.head_sqnr_db, default=None)

    @property
    def loss_db(self) -> float:
        """``floor_db - sqnr_db``: what the algorithm loses."""
        return self.floor_db - self.sqnr_db if math.isfinite(self.floor_db) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; infinities become None."""
        document: dict[str, Any] = to_document(self)
        return document


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """One `LayerReport` per layer, or one `StepReport` for each whole chunk step."""

    layers: dict[str, LayerReport] = field(default_factory=dict)
    #: Of a plan with ``scope="chunk"``; `layers` is then empty.
    steps: dict[str, StepReport] = field(default_factory=dict)

    def totals(self) -> dict[str, float]:
        """Sqnr of every layer, over all its heads where the plan has them one by one."""
        sums: dict[str, ErrorStatistics] = {}
        for name, layer in self.layers.items():
            whole = sums.setdefault(layer_name(name), ErrorStatistics())
            whole.signal += layer.signal
            whole.noise += layer.noise
            whole.non_finite += layer.non_finite
        return {name: total.sqnr_db for name, total in sums.items()}

    @property
    def worst_sqnr_db(self) -> float:
        """Smallest sqnr of all layers."""
        inverses = [layer.sqnr_db for layer in self.layers.values()]
        return min(inverses + [step.sqnr_db for step in self.steps.values()])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        document: dict[str, Any] = to_document(self)
        return document

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: sqnr {r.sqnr_db:.1f} dB (floor {r.floor_db:.1f}), worst_rel {r.worst_rel:.2e}, "
            f"max_abs {r.max_abs:.2e}, {r.matrices} matrices"
            for name, r in self.layers.items()
        ) + "\n".join(f"{name}: {report}" for name, report in self.steps.items())

    def __repr__(self) -> str:
        if not self.layers and not self.steps:
            return "<Report of no layers>"
        return (
            f"<Report of {len(self.layers) + len(self.steps)} entries: worst sqnr "
            f"{self.worst_sqnr_db:.1f} dB>"
        )

    def _repr_html_(self) -> str:
        if self.steps:
            cells = [[n, f"{s.sqnr_o_db:.1f}", f"{s.sqnr_state_db:.1f}"] for n, s in self.steps.items()]
            return html_table("Simulated chunk steps, sqnr in dB", ["layer", "output", "state"], cells)
        rows = [
            [name, r.formats, f"{r.sqnr_db:.1f}", f"{r.floor_db:.1f}", f"{r.max_abs:.2e}"]
            for name, r in self.layers.items()
        ]
        columns = ["layer", "format", "sqnr, dB", "floor, dB", "max|E|"]
        return html_table("Simulated integer inverse", columns, rows)


class LayerSimulation:
    """Streams the errors of one layer's plan."""

    def __init__(self, plan: LayerPlan, rounding: Rounding = Rounding.ONNX, head: int | None = None) -> None:
        self.plan = plan
        #: The only head of the systems; None where they may have an axis of heads.
        self.head = head
        self.rounding = rounding
        self.achieved = ErrorStatistics()
        self.floor = ErrorStatistics()
        self.saturations: dict[str, int] = {}
        self.heads: dict[int, ErrorStatistics] = {}

    def update(self, systems: Systems) -> None:
        """Add checked systems, with beta for a factored plan."""
        truth = systems.inverse()
        estimate, saturations = simulate_counting(self.plan, systems, self.rounding)
        for name, count in saturations.items():
            self.saturations[name] = self.saturations.get(name, 0) + count
        self.achieved.update(estimate, truth)
        if self.head is not None:
            self.heads[self.head] = self.achieved
        elif systems.has_heads:
            pairs = zip(estimate.unbind(HEAD_AXIS), truth.unbind(HEAD_AXIS), strict=True)
            for head, (part, exact) in enumerate(pairs):
                self.heads.setdefault(head, ErrorStatistics()).update(part, exact)
        self.floor.update(floor_inverse(self.plan, systems), truth)

    def result(self) -> LayerReport:
        """Return the report of what was seen."""
        return LayerReport(
            matrices=self.achieved.matrices,
            formats=self.plan.formats,
            program=self.plan.program.title,
            sqnr_db=self.achieved.sqnr_db,
            floor_db=self.floor.sqnr_db,
            head_sqnr_db=tuple(head.sqnr_db for head in self.heads.values()),
            worst_rel=self.achieved.worst_rel,
            max_abs=self.achieved.max_abs,
            signal=self.achieved.signal,
            noise=self.achieved.noise,
            non_finite=self.achieved.non_finite,
            saturations=self.saturations,
            heads=head_errors(self.heads),
        )


def simulate(
    plan: Plan,
    source: Any,
    data: Any = None,
    *,
    num_samples: int | None = None,
    seq_len: int | None = None,
    rounding: str = "onnx",
    progress: Progress | None = None,
    force: bool = False,
) -> Report:
    """Run every layer's integer program on ``source`` and measure the error of T.

    Parameters
    ----------
    plan : Plan
    source, data
        Where L comes from; see `qinvert.calibration.sources.open_source`.
        Layers are matched by name; a source with one unnamed layer goes with
        a plan of one layer.
    num_samples, seq_len : int, optional
        How many sequences of ``data`` to read, and how many tokens each of
        them has; see `qinvert.TokenData`.
    rounding : {"onnx", "hexagon", "tflite"}
        Whose rounding the integers follow, see `LayerPlan.inverse`.
    progress : callable, optional
        Called as ``progress(layer, matrices)`` after every batch.
    force : bool
        Go on with another model than the one that the plan was made for.

    Raises
    ------
    InputError
        If a matrix is not legal, or the source lacks a layer of the plan or
        the beta that it takes.
    PlanError
        If the source has a layer that the plan does not know, or is another model than the
        plan was made for, or if the rounding is not known for a plan like this.
    """
    # Before the model runs: it may take minutes to the first matrix.
    chosen = check_rounding(plan, rounding)
    check_identity(plan, source, force)
    if not all(layer.program.is_inverse for layer in plan.layers.values()):
        given = with_options(data, num_samples, seq_len)
        return Report(steps=simulate_steps(plan, source, given, chosen, progress))
    running: dict[str, LayerSimulation] = {}
    for given, whole in open_systems(source, with_options(data, num_samples, seq_len)):
        name = match_layer(plan, given)
        parts = split_heads(name, whole) if is_split(plan, name) else [(name, whole)]
        for layer, systems in parts:
            if layer not in running:
                running[layer] = LayerSimulation(plan.layer(layer), chosen, head_number(layer))
            check_size(systems.chunk, plan.layer(layer).chunk, layer)
            running[layer].update(needed(plan.layer(layer).program, systems, f"beta of layer {layer!r}"))
            if progress is not None:
                progress(layer, running[layer].achieved.matrices)
    lacking = [name for name in plan.layers if name not in running]
    if lacking:
        raise InputError(f"the source has no matrices for layer {lacking[0]!r}; pass all layers of the plan")
    return Report(layers=_with_shares({name: running[name].result() for name in plan.layers}))


def check_rounding(plan: Plan, rounding: str) -> Rounding:
    """Return the rounding of that name, if it is known for every layer of the plan.

    Raises
    ------
    PlanError
        With the reason.
    """
    chosen = Rounding.named(rounding)
    for layer in plan.layers.values():
        LAWS[chosen].check(layer)
    return chosen


def _with_shares(layers: dict[str, LayerReport]) -> dict[str, LayerReport]:
    """Return the reports with the share of each head in its layer, where heads are entries of their own."""
    totals: dict[str, float] = {}
    for name, layer in layers.items():
        totals[layer_name(name)] = totals.get(layer_name(name), 0.0) + layer.signal

    def shared(name: str, layer: LayerReport) -> LayerReport:
        share = layer.signal / (totals[layer_name(name)] or 1.0)
        return replace(layer, heads=tuple(replace(head, signal_share=share) for head in layer.heads))

    return {
        name: layer if head_number(name) is None else shared(name, layer) for name, layer in layers.items()
    }


def match_layer(plan: Plan, given: str) -> str:
    """Return the entry or layer of a plan that a source means by a name; a plan of one layer has any name.

    Raises
    ------
    PlanError
        If the plan has no such layer.
    """
    if given == DEFAULT_LAYER and given not in plan.layers and len(plan.layers) == 1:
        return next(iter(plan.layers))
    if not is_split(plan, given):
        plan.layer(given)
    return given
