"""Sections on errors: more bits, other data, and where the error goes inside the model."""

from __future__ import annotations

from qinvert import plot
from qinvert.plot.error_path import STAGES, harm
from qinvert.report_page.evidence import EVALUATED, Evidence
from qinvert.report_page.figure import Figure, Section, table
from qinvert.report_page.ranges import NEEDS_MATRICES
from qinvert.report_page.svg import svg
from qinvert.report_page.words import decibels

#: Entries in the figure of drift: it gets longer with each.
DRAWN = 40


def bits_section(found: Evidence) -> Section:
    """Error against bits, predicted against simulated, seen against unseen."""
    figures = (
        [_drift(found)] if any(found.figures(n).judged_db is not None for n in found.plan.layers) else []
    )
    figures += [_widths(found, n, f"bits-{i}") for i, n in enumerate(found.detailed) if found.widths.get(n)]
    lacks = []
    if not found.widths:
        lacks.append(
            "Other widths are tried on programs of inverses."
            if found.of_steps
            else f"Other widths: {NEEDS_MATRICES}"
        )
    return Section(
        ident="bits",
        title="More bits, and other data",
        intro="Whether predictions hold, whether the figures of the calibration hold on other data, "
        "and what the "
        "same program would reach with another width of every tensor.",
        figures=tuple(figures),
        lacks=tuple(lacks),
    )


def _drift(found: Evidence) -> Figure:
    names = [*found.detailed, *(n for n in found.plan.layers if n not in found.detailed)]
    figures = {name: found.figures(name) for name in names}
    pairs = [(f.sample_db, f.now_db or f.held_out_db) for f in figures.values()]
    losses = [sample - now for sample, now in pairs if sample is not None and now is not None]
    finite = [loss for loss in losses if abs(loss) < 1e3]
    says = (
        f"On data that it was not chosen on, the plan loses at most {max(0.0, *finite):.1f} dB against its "
        "calibration sample."
        if finite
        else "There are no figures of unseen data to compare with."
    )
    drawn = plot.drift(dict(list(figures.items())[:DRAWN]), found.goal_db)
    rows = [
        [name, *map(decibels, (f.floor_db, f.predicted_db, f.sample_db, f.held_out_db, f.held_out_low_db,
                               f.held_out_high_db, f.now_db))]
        for name, f in figures.items()
    ]  # fmt: skip
    columns = [
        "layer",
        "floor",
        "predicted",
        "calibration sample",
        "held out",
        "from",
        "to",
        "this report's data",
    ]
    return Figure(
        ident="drift",
        title="Predicted, seen and unseen",
        says=says,
        alternative=f"Sqnr of every layer as predicted, on seen and on unseen data. {says}",
        svg=svg(drawn, "drift", f"Sqnr of every layer as predicted, on seen and on unseen data. {says}"),
        table=table("Sqnr by layer, dB", columns, rows),
        wide=True,
    )


def _widths(found: Evidence, name: str, ident: str) -> Figure:
    rows = found.widths[name]
    gaps = [abs(r.predicted_sqnr_db - r.seen_sqnr_db) for r in rows if abs(r.predicted_sqnr_db) < 1e3]
    says = ", ".join(f"{r.bits} bits reach {decibels(r.unseen_sqnr_db, ' dB')}" for r in rows)
    gap = f" Predictions are off by at most {max(gaps):.1f} dB." if gaps else ""
    cells = [
        [r.bits, *map(decibels, (r.floor_db, r.predicted_sqnr_db, r.seen_sqnr_db, r.unseen_sqnr_db))]
        for r in rows
    ]
    columns = ["bits", "floor", "predicted", "seen", "unseen"]
    words = f"Error against bits of {name}. {says}."
    return Figure(
        ident=ident,
        title=f"Error against bits of {name}",
        says=f"{says} on unseen matrices, {found.systems[name].count // 2} of them.{gap}",
        alternative=words,
        svg=svg(plot.error_against_bits(rows, found.goal_db), ident, words),
        table=table(f"Sqnr of T of {name} by the width of every tensor, dB", columns, cells),
    )


def path_section(found: Evidence) -> Section:
    """Where the error goes: T, U and W, state, output, and the logits."""
    evaluation = found.evaluation
    if evaluation is None or not evaluation.layers:
        return Section(
            ident="path",
            title="Where the error goes",
            intro="What an error of T becomes in the layer's output, in the state and in the logits.",
            lacks=("Pass a model with data to see this: matrices alone have no outputs.",),
        )
    intro = (
        f"On {evaluation.tokens:,} tokens (at most {EVALUATED} sequences, or one batch) the logits "
        "differ by a KL "
        f"divergence of {evaluation.kl:.3g} nats, {evaluation.top1_agreement:.2%} of the most likely "
        "tokens agree, "
        f"and the loss changes by {evaluation.loss_delta:+.3g} nats."
    )
    if evaluation.score is not None and evaluation.exact_score is not None:
        exact = evaluation.exact_score
        intro += f" The task's score is {evaluation.score:.4f}, and {exact:.4f} with the exact inverse."
    return Section(
        ident="path", title="Where the error goes", intro=intro, figures=(_path(found), _harm(found))
    )


def _path(found: Evidence) -> Figure:
    assert found.evaluation is not None
    layers = found.evaluation.layers
    worst = min(layers, key=lambda name: layers[name].out)
    says = f"The output of {worst} is hit the most, {decibels(layers[worst].out, ' dB')}."
    rows = [[n, *(decibels(getattr(errors, field)) for field, _ in STAGES)] for n, errors in layers.items()]
    words = f"Sqnr from T to the output, by layer. {says}"
    return Figure(
        ident="error-path",
        title="From T to the output",
        says=f"{says} Both sides have the same inputs, so that layers are compared one by one.",
        alternative=words,
        svg=svg(plot.error_path(found.evaluation), "error-path", words),
        table=table("Sqnr inside each layer, dB", ["layer", *(name for _, name in STAGES)], rows),
    )


def _harm(found: Evidence) -> Figure:
    assert found.evaluation is not None
    shares = harm(found.evaluation)
    first = next(iter(shares))
    says = (
        f"{first} causes {shares[first]:.0%} of the relative noise of all outputs: it gains the most by bits."
    )
    words = f"Layers ranked by harm. {says}"
    return Figure(
        ident="harm",
        title="Layers by harm",
        says=says,
        alternative=words,
        svg=svg(plot.layer_harm(found.evaluation), "harm", words),
        table=table(
            "Share of the relative noise of all outputs",
            ["layer", "share"],
            [[n, f"{s:.1%}"] for n, s in shares.items()],
        ),
    )
