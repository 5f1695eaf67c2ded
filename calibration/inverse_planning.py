"""Plans of inverses for goals that may rise: one layer at a time, from what a pass has observed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from qinvert.calibration.data.processes import Shard
from qinvert.calibration.grid_options import GridOptions
from qinvert.calibration.observation.held_out import held_out
from qinvert.calibration.observation.statistics import LayerObserver
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.calibration.planning.explanation import explain
from qinvert.calibration.planning.planner import Candidate, Choice, choose, considered, weighed
from qinvert.calibration.planning.sensitivity import MATRICES, LayerGrids, measure_together
from qinvert.calibration.planning.unseen import TRY_AUTO, signal_shares, unseen_facts
from qinvert.errors import ProgramError
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.program.program import Program
from qinvert.progress import track

#: Layers whose candidates a device measures in one run.
LAYERS_AT_ONCE: Final = 8

T = TypeVar("T")


class InversePlanning:
    """Plans layers for goals; what candidates measure of themselves is kept from goal to goal.

    Parameters
    ----------
    observers : mapping
        What was seen of every layer, of every head, or of both.
    options : GridOptions
    of_model : bool
        Whether heads are those of a model, see `unseen_facts`.
    remedy : str
        What plans advise for heads below the goal.
    """

    def __init__(
        self,
        observers: Mapping[str, LayerObserver],
        options: GridOptions,
        of_model: bool,
        remedy: str = TRY_AUTO,
    ) -> None:
        self.observers, self.of_model = observers, of_model
        self._options, self._remedy = options, remedy
        self._candidates: dict[str, list[Candidate]] = {}
        #: Share of each head in the signal of its layer.
        self.shares = signal_shares(observers)

    def plan(self, name: str, goal_db: float) -> LayerPlan:
        """Return the plan of one entry for a goal of T."""
        options, observer = self._options, self.observers[name]
        options = replace(options, goals=replace(options.goals, min_sqnr_db=goal_db))
        choice = choose(
            observer, options.ladder, options.rules, options.goals, options.costs, self._weighed(name)
        )
        facts = unseen_facts(
            choice.best.plan,
            observer,
            goal_db,
            of_model=self.of_model,
            share=self.shares.get(name),
            remedy=self._remedy if choice.meets_goal else None,
        )
        return replace(choice.best.plan, provenance={**_facts_of(choice, observer, options), **facts})

    def _weighed(self, name: str) -> list[Candidate]:
        if name not in self._candidates:
            options = self._options
            self._candidates[name] = weighed(
                self.observers[name], options.ladder, options.rules, options.costs
            )
        return self._candidates[name]

    def plan_all(self, goal_db: float, names: Iterable[str] | None = None) -> dict[str, LayerPlan]:
        """Return the plan of every entry, or of those ``names``; under torchrun processes share them.

        Raises
        ------
        InputError
            If another process fails.
        """

        def made(own: Sequence[str]) -> dict[str, LayerPlan]:
            _measure([c for name in own for c in considered(self._weighed(name))])
            return {name: self.plan(name, goal_db) for name in track(own, "layers", len(own))}

        return shared_out(list(self.observers if names is None else names), made)


def shared_out(names: Sequence[str], make: Callable[[Sequence[str]], Mapping[str, T]]) -> dict[str, T]:
    """Return what ``make`` returns for all names; under torchrun each process makes its share.

    Raises
    ------
    InputError
        If another process fails.
    """
    shard = Shard.current()
    with shard.together():
        parts = shard.gather("planning", make(names[shard.rank :: shard.size]))
    found = {name: value for part in parts for name, value in part.items()}
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


def _facts_of(choice: Choice, observer: LayerObserver, options: GridOptions) -> dict[str, Any]:
    free = replace(options.rules, requantize=Requantize.DIVIDE)
    wider = [choice.best.candidate.on(fmt, free) for fmt in (INT8, INT8X2, INT16)]
    return {
        "matrices": observer.matrices,
        "observed": observer.observed,
        "sample": observer.sampled.count,
        **options.costs.chains(choice.best.plan, choice.best.compiled),
        **explain(choice, wider, held_out(observer.sample, observer.held)),
    }


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
