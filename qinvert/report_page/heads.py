"""Section on heads: a head that is dead or far below its layer is seen at once."""

from __future__ import annotations

from collections.abc import Sequence

from qinvert import plot
from qinvert.calibration.head_errors import CARRIES, HeadErrors
from qinvert.calibration.head_names import head_number, layer_name
from qinvert.report_page.evidence import Evidence
from qinvert.report_page.figure import Figure, Section, table
from qinvert.report_page.svg import svg
from qinvert.report_page.words import counted, decibels


def heads_section(found: Evidence) -> Section:
    """Sqnr, floor and share of the signal of every head."""
    heads = layer_heads(found)
    figures = (_figure(found, heads),) if heads else ()
    hatched = (
        ""
        if found.of_steps
        else " A hatched head has next to no share of its layer's signal: its T is the identity, and its "
        "figure matters little."
    )
    lacks = (
        "Neither the plan nor the data have heads: bare matrices count heads only with an axis of them.",
    )
    return Section(
        ident="heads",
        title="Every layer and head",
        intro="The figure of a layer is the sum over its heads, so that one large head may hide a "
        f"small one that is wrong.{hatched}",
        figures=figures,
        lacks=() if figures else lacks,
    )


def layer_heads(found: Evidence) -> dict[str, tuple[HeadErrors, ...]]:
    """Return the heads of every layer, of this report's data if there are any, else those of the plan."""
    heads: dict[str, list[HeadErrors]] = {}
    for name in found.plan.layers:
        heads.setdefault(layer_name(name), []).extend(_of_entry(found, name))
    return {layer: tuple(sorted(each, key=lambda head: head.head)) for layer, each in heads.items() if each}


def _of_entry(found: Evidence, name: str) -> Sequence[HeadErrors]:
    if found.report is not None and name in found.report.layers:
        return found.report.layers[name].heads
    if found.report is not None and name in found.report.steps:
        # A step has no shares of T; its outputs count.
        values = found.report.steps[name].head_sqnr_o_db
        first = head_number(name) or 0
        return [
            HeadErrors(head=first + i, sqnr_db=v, signal_share=1 / len(values)) for i, v in enumerate(values)
        ]
    facts = found.plan.layers[name].provenance
    rows = facts.get("output_heads") or (facts.get("unseen") or {}).get("heads", ())
    return [HeadErrors(**row) for row in rows]


def _figure(found: Evidence, heads: dict[str, tuple[HeadErrors, ...]]) -> Figure:
    worst = min(
        ((layer, head) for layer, each in heads.items() for head in each if head.carries_signal),
        key=lambda pair: pair[1].sqnr_db,
        default=None,
    )
    silent = sum(not head.carries_signal for each in heads.values() for head in each)
    says = "" if worst is None else _worst(*worst)
    if silent:
        has = "has" if silent == 1 else "have"
        says += f"{counted(silent, 'head')} {has} less than {CARRIES:.1%} of the layer's signal."
    columns = [
        "layer, head",
        "sqnr, dB",
        "floor of the entry, dB",
        "share of T",
        "share of o",
        "o, dB",
    ]
    rows = [
        [f"{layer}, {head.head}", decibels(head.sqnr_db), _floor(found, layer, head),
         f"{head.signal_share:.2%}",
         "-" if head.output_share is None else f"{head.output_share:.1%}", decibels(head.output_sqnr_db)]
        for layer, each in _with_outputs(found, heads).items()
        for head in each
    ]  # fmt: skip
    what = "output" if found.of_steps else "T"
    return Figure(
        ident="heads-figure",
        title=f"Sqnr of {what} by layer and head",
        says=says,
        alternative=f"Map of the sqnr of {what}, layers by heads. {says}",
        svg=svg(
            plot.head_errors(heads, what), "heads", f"Map of the sqnr of {what}, layers by heads. {says}"
        ),
        table=table(f"Heads: sqnr of {what}, floor and shares", columns, rows),
        wide=True,
    )


def _worst(layer: str, head: HeadErrors) -> str:
    return f"The worst head is {head.head} of {layer}, {decibels(head.sqnr_db, ' dB')}. "


def _with_outputs(
    found: Evidence, heads: dict[str, tuple[HeadErrors, ...]]
) -> dict[str, tuple[HeadErrors, ...]]:
    """Return the heads with what was evaluated of their outputs, on the same model."""
    if found.evaluation is None:
        return heads
    known = {
        (layer, head.head): head for layer, errors in found.evaluation.layers.items() for head in errors.heads
    }

    def joined(layer: str, head: HeadErrors) -> HeadErrors:
        other = known.get((layer, head.head))
        if other is None:
            return head
        return HeadErrors(
            head=head.head,
            sqnr_db=head.sqnr_db,
            signal_share=head.signal_share,
            output_share=other.output_share,
            output_sqnr_db=other.output_sqnr_db,
        )

    return {layer: tuple(joined(layer, head) for head in each) for layer, each in heads.items()}


def _floor(found: Evidence, layer: str, head: HeadErrors) -> str:
    for name in (f"{layer}/head_{head.head}", layer):
        if name in found.plan.layers:
            report = found.report.layers.get(name) if found.report else None
            return decibels(found.figures(name).floor_db if report is None else report.floor_db)
    return "-"
