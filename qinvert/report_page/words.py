"""Numbers as a page writes them, and what a page says of a layer."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from qinvert.plan.plan import LayerPlan
from qinvert.report_page.evidence import Evidence
from qinvert.strict_json import INFINITE

#: Share of a tensor's values that may lie at the ends of its grid: the largest of any data do.
TOUCHING: Final = 1e-5


class Status(StrEnum):
    """Whether a layer reaches what was asked for."""

    #: All goals are reached.
    MET = "meets its goal"
    #: All goals are reached, and something should be looked at.
    CAUTION = "meets its goal, with a caution"
    #: A goal is missed.
    MISSED = "misses its goal"
    #: The plan says nothing of goals.
    UNKNOWN = "was not calibrated"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWords:
    """What a page says of one entry of a plan."""

    name: str
    status: Status
    #: One sentence of verdict.
    sentence: str
    #: What keeps it from being better, or asks for a look; one sentence each.
    remarks: tuple[str, ...]


def decibels(value: float | None, unit: str = "") -> str:
    """``31.2``, ``exact`` without an error, ``none`` without a signal, and a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    if value >= INFINITE:
        return "exact"
    return "none" if value <= -INFINITE else f"{value:.1f}{unit}"


def number(value: float | None) -> str:
    """Write a number with three digits that count; very large ones by powers of ten."""
    if value is None:
        return "-"
    if value == value // 1 and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def counted(count: int, noun: str) -> str:
    """``1 value``, ``2 values``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def short_title(layer: LayerPlan) -> str:
    """Return the program's title; of a chunk step its name, and the inverse in it."""
    program = layer.program
    inverse = None if program.is_inverse else program.parameters.get("inverse")
    return program.title if inverse is None else f"{program.name} with {inverse}"


def layer_words(found: Evidence, name: str) -> LayerWords:
    """Return the verdict on one entry."""
    layer = found.plan.layers[name]
    facts, figures = layer.provenance, found.figures(name)
    judged = figures.judged_db
    remarks = [*map(str, facts.get("head_cautions", ())), *map(str, facts.get("data_cautions", ()))]
    remarks += [*_heads_below(found, name), *_saturation(found, name)]
    if "meets_goal" not in facts:
        status = Status.UNKNOWN
    elif not facts["meets_goal"] or _below(found, figures.now_db):
        status = Status.MISSED
    else:
        status = Status.CAUTION if remarks else Status.MET
    if facts.get("fix"):
        remarks.insert(0, str(facts["fix"]))
    goal = "" if found.goal_db is None else f"; the goal is {found.goal_db:g} dB"
    return LayerWords(
        name=name,
        status=status,
        sentence=f"{_program(layer)} {_reaches(found, name, judged)}{goal}.",
        remarks=tuple(_sentence(remark) for remark in remarks),
    )


def _below(found: Evidence, now_db: float | None) -> bool:
    return found.goal_db is not None and now_db is not None and now_db < found.goal_db


def _program(layer: LayerPlan) -> str:
    return f"{short_title(layer)} in {layer.formats}"


def _reaches(found: Evidence, name: str, judged: float | None) -> str:
    if judged is None:
        return "has no figures: nothing was measured"
    figures, layer = found.figures(name), found.plan.layers[name]
    what = "sqnr of T" if layer.program.is_inverse else "sqnr of output and state, the smaller one,"
    text = f"reaches {decibels(judged, ' dB')} {what}"
    if figures.now_db is not None:
        text += " on this report's data"
    elif figures.held_out_db is not None and layer.provenance["unseen"].get("held_out"):
        low, high = decibels(figures.held_out_low_db), decibels(figures.held_out_high_db)
        text += f" on matrices that it was not chosen on ({low} to {high})"
    else:
        text += " on its calibration data"
    report = found.report.layers.get(name) if found.report else None
    floor = figures.floor_db if report is None else report.floor_db
    if floor is not None and abs(floor) < INFINITE and math.isfinite(judged):
        text += _against_floor(floor - judged)
    return text


def _against_floor(loss: float) -> str:
    if loss < 0.05:
        return ", which is all that its grids allow"
    return f", {loss:.1f} dB less than its grids allow"


def _heads_below(found: Evidence, name: str) -> list[str]:
    """Return the heads of a chunk step whose output the layer as a whole hides; plans of T know theirs."""
    report = None if found.report is None else found.report.steps.get(name)
    if report is None or found.goal_db is None or not report.sqnr_db >= found.goal_db:
        return []
    low = [(head, v) for head, v in enumerate(report.head_sqnr_o_db) if v < found.goal_db]
    each = ", ".join(f"head {head} {decibels(value, ' dB')}" for head, value in low)
    return [f"the outputs of single heads stay below the goal: {each}"] if low else []


def _saturation(found: Evidence, name: str) -> list[str]:
    if found.report is None:
        return []
    report: Any = found.report.layers.get(name) or found.report.steps.get(name)
    layer = found.plan.layers[name]
    proof, calls = layer.proof(), _calls(report, layer)
    # Where a proof holds, values at the ends of a grid are no loss.
    open_ = {
        tensor: count
        for tensor, count in report.saturations.items()
        if (tensor in proof.unproved or tensor in proof.may_saturate)
        and count > TOUCHING * calls * math.prod(layer.program.shapes[tensor])
    }
    if not open_:
        return []
    worst = max(open_, key=lambda tensor: open_[tensor])
    return [
        f"{counted(sum(open_.values()), 'value')} in {counted(len(open_), 'tensor')}, {worst} first, "
        "at the ends of their grids: the data go further than those of the calibration, or their grids are "
        "narrower on purpose"
    ]


def _calls(report: Any, layer: LayerPlan) -> int:
    """How often the program ran for a report of `qinvert.simulate`."""
    if layer.program.is_inverse:
        return int(report.matrices)
    return int(report.tokens) // layer.chunk * max(1, len(report.head_sqnr_o_db))


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def next_steps(found: Evidence, plan_file: str) -> list[tuple[str, str]]:
    """Return what to do next: a reason, and the command to paste."""
    path = shlex.quote(plan_file)
    statuses = {layer_words(found, name).status for name in found.plan.layers}
    steps = []
    if Status.MISSED in statuses:
        steps.append(
            ("A goal is missed: plan again with what each layer asks for above.", _again(found, path))
        )
    if found.report is None:
        # The task of the embedded model makes its own data.
        source = "--model recall" if found.plan.provenance.get("source") == "recall" else "--data DATA"
        steps.append(("Nothing was simulated for this page: add data.", f"qinvert report {path} {source}"))
    elif found.evaluation is None and not found.of_steps:
        steps.append(
            ("No model ran for this page: see what the plan does to it.",
             f"qinvert report {path} --model MODEL --data DATA")
        )  # fmt: skip
    if Status.MISSED not in statuses:
        steps.append(("Write the graphs for the target's compiler.", f"qinvert export {path} -o graphs/"))
        steps.append(("Then compare every value with a runtime.", "qinvert verify graphs/"))
    return steps


def _again(found: Evidence, path: str) -> str:
    facts = found.plan.provenance
    fixes = " ".join(str(layer.provenance.get("fix", "")) for layer in found.plan.layers.values())
    source = shlex.quote(str(facts.get("source", "MODEL")))
    command = f"qinvert calibrate {source} -o {path}"
    if "data" in facts and facts.get("source") != "recall":
        command += " --data DATA"
    for bits, target in (("8x2", "int-ops"), ("16", "npu-qdq-int16")):
        if f"bits='{bits}'" in fixes or f"bits={bits}" in fixes:
            return f"{command} --bits {bits} --target {target} --min-sqnr {found.goal_db:g}"
    return command
