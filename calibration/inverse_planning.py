"""Plans of inverses for goals that may rise: one layer at a time, from what a pass has observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from qinvert.calibration.data.processes import Shard
from qinvert.calibration.grid_options import GridOptions
from qinvert.calibration.observation.held_out import held_out
from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.calibration.planning.explanation import explain
from qinvert.calibration.planning.planner import Candidate, choose, considered, weighed
from qinvert.calibration.planning.sensitivity import MATRICES, LayerGrids, measure_together
from qinvert.calibration.planning.unseen import signal_shares, unseen_facts
from qinvert.errors import ProgramError
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.program.program import Program
from qinvert.progress import track

#: Layers whose candidates a device measures in one run.
LAYERS_AT_ONCE: Final = 8


class InversePlanning:
    """Plans layers for goals; what candidates measure of themselves is kept from goal to goal."""

    def __init__(self, observers: Mapping[str, LayerObserver], options: GridOptions, of_model: bool) -> None:
        self._observers, self._options, self._of_model = observers, options, of_model
        self._candidates: dict[str, list[Candidate]] = {}
        self._shares = signal_shares(observers)

    def plan(self, name: str, goal_db: float) -> LayerPlan:
        """Return the plan of one entry for a goal of T."""
        options, observer = self._options, self._observers[name]
        candidates = self._weighed(name)
        goals = replace(options.goals, min_sqnr_db=goal_db)
        options = replace(options, goals=goals)
        return _plan_layer(observer, options, self._of_model, candidates, self._shares.get(name))

    def _weighed(self, name: str) -> list[Candidate]:
        if name not in self._candidates:
            options = self._options
            self._candidates[name] = weighed(
                self._observers[name], options.ladder, options.rules, options.costs
            )
        return self._candidates[name]

    def plan_all(self, goal_db: float) -> dict[str, LayerPlan]:
        """Return the plan of every entry; under torchrun each process makes its share of them.

        Raises
        ------
        InputError
            If another process fails.
        """
        shard, names = Shard.current(), list(self._observers)
        with shard.together():
            own = names[shard.rank :: shard.size]
            _measure([c for name in own for c in considered(self._weighed(name))])
            made = {name: self.plan(name, goal_db) for name in track(own, "layers", len(own))}
            parts = shard.gather("planning", made)
        found = {name: plan for part in parts for name, plan in part.items()}
        return {name: found[name] for name in names}


def _measure(candidates: Sequence[Candidate]) -> None:
    """Measure the noise of candidates, on a device those of several layers in one run of their program.

    A run costs a device as much for one layer as for `LAYERS_AT_ONCE`.  What kernels it takes may depend
    on the number of matrices, so that this is always the same, however many layers a process plans.
    """
    alike: dict[tuple[object, ...], list[tuple[Candidate, LayerGrids]]] = {}
    for candidate in candidates:
        grids = candidate.layer_grids
        kind = (id(candidate.program), min(grids.sample.count, MATRICES), grids.sample.lower.device)
        alike.setdefault(kind, []).append((candidate, grids))
    for found in alike.values():
        size = 1 if found[0][1].truth.device.type == "cpu" else LAYERS_AT_ONCE
        for start in range(0, len(found), size):
            part, layers = zip(*found[start : start + size], strict=True)
            for candidate, measured in zip(
                part, measure_together(part[0].program, layers, size), strict=True
            ):
                candidate.know(measured)


def _plan_layer(
    observer: LayerObserver,
    options: GridOptions,
    of_model: bool,
    candidates: Sequence[Candidate],
    share: float | None,
) -> LayerPlan:
    sample = observer.sampled
    costs = options.costs
    choice = choose(observer, options.ladder, options.rules, options.goals, costs, candidates)
    free = replace(options.rules, requantize=Requantize.DIVIDE)
    wider = [choice.best.candidate.on(fmt, free) for fmt in (INT8, INT8X2, INT16)]
    provenance = {
        "matrices": observer.matrices,
        "observed": observer.observed,
        "sample": sample.count,
        **costs.chains(choice.best.plan, choice.best.compiled),
        **explain(choice, wider, held_out(observer.sample, observer.held)),
        **unseen_facts(choice.best.plan, observer, options.goals.min_sqnr_db, of_model, share),
    }
    return replace(choice.best.plan, provenance=provenance)


def candidates_of(method: str | Program, chunk: int, factored: bool, options: GridOptions) -> list[Program]:
    """Return the programs that a method leaves open for matrices of a size.

    Raises
    ------
    ProgramError
        If the method is unknown, has no factored form, or has another chunk size.
    """
    if isinstance(method, Program):
        if method.chunk != chunk:
            raise ProgramError(
                f"{method.title} is for {method.chunk} x {method.chunk} matrices, but the data has "
                f"{chunk} x {chunk}; build the program for that chunk size"
            )
        if factored and not method.inverse_ports.factored:
            raise ProgramError(f"{method.title} does not take beta; build it with factored=True")
        return [method]
    requantize, on_chips = options.profile.requantize, options.costs.hardware is not None
    return candidate_programs(method, chunk, factored, requantize, on_chips)
