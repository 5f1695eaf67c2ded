"""What `calibrate(hardware=...)` chooses by itself, and how well it predicts the compilers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import fit_hardware
import numpy as np
import onnx
from npu_graphs import DATA, FLOAT16, Case, Cell, matrices, plan_of
from scipy.stats import spearmanr
from sequential_graphs import sqnr_db

import qinvert
from qinvert.export.exporting import build
from qinvert.hardware import HARDWARE, find_hardware
from qinvert.program.steps import Step

#: Goals for the sqnr, in dB; the first is the default.
GOALS = (20.0, 29.0, 70.0)
#: Matrices per call.
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One plan that was chosen for a chip and a goal."""

    chip: str
    goal: float
    program: str
    target: str
    chains: int
    #: On other matrices than those of the calibration.
    sqnr_db: float
    predicted: float
    compiled: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How the table of one chip predicts graphs of programs that its fit never saw."""

    chip: str
    graphs: int
    mean_error: float
    median_error: float
    rank_correlation: float


def choices(
    chips: Sequence[str], chunk: int, compile_model: Callable[[onnx.ModelProto, str, str], Cell]
) -> Iterator[Choice]:
    """Yield what is chosen for every goal on every chip that has a table of costs."""
    given, other = matrices(DATA[0], chunk, seed=0), matrices(DATA[0], chunk, seed=1)
    for chip in chips:
        for goal in GOALS if chip in HARDWARE else ():
            plan = qinvert.calibrate(given, hardware=chip, batch=BATCH, min_sqnr_db=goal)
            layer = plan.layer()
            chains, predicted = find_hardware(chip).best_chains(layer, BATCH)
            model = build(
                plan, batch=BATCH, chains=chains, input="M", input_type="integers", output="integers"
            )
            found = np.asarray(layer.inverse(other.numpy())) - np.eye(chunk)
            yield Choice(
                chip=chip,
                goal=goal,
                program=layer.program.title,
                target=plan.target,
                chains=chains,
                sqnr_db=sqnr_db(found, other.numpy()),
                predicted=predicted,
                compiled=compile_model(model, chip, f"calibrate(hardware={chip!r}), {goal:g} dB"),
            )


def predictions(found: Mapping[Case, Cell]) -> list[Prediction]:
    """Compare predicted with compiled costs, chip by chip."""
    known = {program.steps for chunk in fit_hardware.CHUNKS for program in fit_hardware.programs(chunk)}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for case, cell in found.items():
        if cell.cycles is not None and _predictable(case, known):
            plan = plan_of(case.contender, case.chunk, case.profile, case.contender.grids)
            predicted = find_hardware(case.chip).cost(plan.layer(), case.batch, case.chains)
            pairs.setdefault(case.chip, []).append((cell.cycles, predicted))
    return [_prediction(chip, values) for chip, values in pairs.items()]


def _predictable(case: Case, known: set[Sequence[Step]]) -> bool:
    program = case.contender.program
    if program is None or case.element == FLOAT16 or case.chip not in HARDWARE:
        return False
    return case.profile in find_hardware(case.chip).targets and program(case.chunk).steps not in known


def _prediction(chip: str, pairs: list[tuple[float, float]]) -> Prediction:
    truth, guess = np.array(pairs).T
    errors = np.abs(guess / truth - 1)
    return Prediction(
        chip=chip,
        graphs=len(pairs),
        mean_error=float(errors.mean()),
        median_error=float(np.median(errors)),
        rank_correlation=float(spearmanr(truth, guess).statistic) if len(pairs) > 1 else float("nan"),
    )
