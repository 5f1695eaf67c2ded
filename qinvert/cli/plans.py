"""Verbs about plans: inspect, calibrate, simulate, evaluate."""

from __future__ import annotations

import sys
from typing import Any

import click

from qinvert import recall
from qinvert.calibration.calibrate import MAX_LOSS_DB
from qinvert.calibration.calibrate import calibrate as run_calibration
from qinvert.calibration.evaluation import Evaluation
from qinvert.calibration.evaluation import evaluate as run_evaluation
from qinvert.calibration.growth import RangeGrowth, range_growth
from qinvert.calibration.reports import Report
from qinvert.calibration.reports import simulate as run_simulation
from qinvert.calibration.sources import open_source
from qinvert.cli.common import (
    DECIBELS,
    Output,
    data_options,
    decibels,
    is_matrix_file,
    load_model,
    open_for_plan,
    open_pair,
    output_options,
    with_source,
)
from qinvert.errors import InputError
from qinvert.methods import METHODS
from qinvert.plan import LayerPlan, Plan
from qinvert.profiles import PROFILES
from qinvert.proof import Proof

BITS_CHOICES = ("auto", "8", "4")


@click.command()
@click.argument("source")
@data_options
@output_options
def inspect(source: str, data: str | None, sequences: int, seed: int, as_json: bool, quiet: bool) -> None:
    r"""Show how far powers of M outgrow the inverse, or what is in a plan.

    SOURCE is a model folder, `recall`, a file of matrices L, or a plan.

    \b
    Example: qinvert inspect recall
             qinvert inspect plan.json
    """
    output = Output(as_json=as_json, quiet=quiet)
    if source.endswith(".json"):
        if data is not None:
            raise InputError("a plan holds its numbers; leave out --data")
        show_plan(output, Plan.load(source))
        return
    with output.progress("measuring"):
        growth = range_growth(open_source(*open_pair(source, data, sequences, seed)))
    show_growth(output, growth)
    output.result({"layers": {name: growth_to_dict(g) for name, g in growth.items()}})


def show_growth(output: Output, growth: dict[str, RangeGrowth]) -> None:
    """Print the range-growth table."""
    powers = sorted({k for g in growth.values() for k in g.powers})
    columns = ["layer", "matrices", *(f"max|M^{k}|" for k in powers), "max|T - I|"]
    rows = [
        [
            name,
            str(g.matrices),
            *(f"{g.powers[k]:.3g}" if k in g.powers else "-" for k in powers),
            f"{g.inverse:.3g}",
        ]
        for name, g in growth.items()
    ]
    output.table("Range growth: powers of M against the inverse", columns, rows)


def growth_to_dict(growth: RangeGrowth) -> dict[str, Any]:
    """Return JSON types."""
    powers = {str(k): min(v, 3.4e38) for k, v in growth.powers.items()}
    return {"matrices": growth.matrices, "powers": powers, "inverse": growth.inverse}


def show_plan(output: Output, plan: Plan) -> None:
    """Print every layer's program, grids and proof."""
    proofs = {name: layer.proof() for name, layer in plan.layers.items()}
    for name, layer in plan.layers.items():
        rows = [[tensor, str(q.format), f"{q.scale:.6g}", f"{layer.ranges.get(tensor, 0):.4g}"]
                for tensor, q in layer.tensors.items()]  # fmt: skip
        output.table(f"{name}: {layer}", ["tensor", "format", "scale", "calibrated max"], rows)
        output.say(f"{proofs[name]}\n")
    layers = {name: layer_to_dict(layer, proofs[name]) for name, layer in plan.layers.items()}
    output.result({"target": plan.target, "layers": layers})


def layer_to_dict(layer: LayerPlan, proof: Proof) -> dict[str, Any]:
    """Return JSON types of what a plan says of a layer."""
    return {
        **layer.provenance,
        "program": layer.program.title,
        "formats": layer.formats,
        "requantize": str(layer.requantize),
        "accumulator_bound": proof.accumulator_bound,
        "headroom_bits": proof.headroom_bits,
        "cannot_saturate": proof.cannot_saturate,
        "may_saturate": proof.may_saturate,
        "unproved": proof.unproved,
    }


@click.command()
@click.argument("source")
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="Plan to write.")
@click.option("--method", default="auto", show_default=True, help=f"auto, {', '.join(METHODS)}.")
@click.option("--bits", default="auto", show_default=True, type=click.Choice(BITS_CHOICES))
@click.option("--target", default="npu-qdq-int8", show_default=True, help=f"{', '.join(PROFILES)}.")
@click.option("--scales", default="auto", show_default=True, type=click.Choice(("auto", "float", "pow2")))
@click.option("--min-sqnr", default=20.0, type=DECIBELS, show_default=True, help="Goal for each layer, dB.")
@click.option(
    "--max-loss",
    default=MAX_LOSS_DB,
    type=DECIBELS,
    show_default=True,
    help="Goal for the distance to the floor, dB.",
)
@data_options
@output_options
def calibrate(
    source: str,
    path: str,
    method: str,
    bits: str,
    target: str,
    scales: str,
    min_sqnr: float,
    max_loss: float,
    data: str | None,
    sequences: int,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    r"""Measure ranges and write an integer plan for every layer.

    SOURCE is a model folder with --data, `recall`, or a file of matrices L
    (.npz or .safetensors, one array a layer).  Exit code 1 if a layer misses
    a goal; the plan is written all the same.

    \b
    Example: qinvert calibrate recall -o plan.json
             qinvert calibrate ./my-model --data tokens.npz -o plan.json
    """
    output = Output(as_json=as_json, quiet=quiet)
    with output.progress("calibrating") as progress:
        plan = run_calibration(
            *open_pair(source, data, sequences, seed),
            method=method,
            bits=bits,
            target=target,
            min_sqnr_db=min_sqnr,
            max_loss_db=max_loss,
            scales=scales,
            seed=seed,
            progress=progress,
        )
    plan = with_source(plan, source)
    plan.save(path)
    show_choices(output, plan)
    output.say(f"wrote {path}")
    output.result({"plan": path, "layers": {n: layer_to_dict(p, p.proof()) for n, p in plan.layers.items()}})
    if not all(layer.provenance["meets_goal"] for layer in plan.layers.values()):
        sys.exit(1)


def show_choices(output: Output, plan: Plan) -> None:
    """Print what calibration chose for each layer, and why not something simpler."""
    rows = [
        [name, p.program.title, p.formats, f"{p.provenance['expected_sqnr_db']:.1f}",
         f"{p.provenance['expected_floor_db']:.1f}", "yes" if p.provenance["meets_goal"] else "NO"]
        for name, p in plan.layers.items()
    ]  # fmt: skip
    output.table("Plan", ["layer", "program", "format", "sqnr_db", "floor_db", "meets goal"], rows)
    for name, layer in plan.layers.items():
        for rejected in layer.provenance["rejected"]:
            output.say(f"  {name}: not {rejected}")


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option("--model", help="Model folder or `recall`; the plan's own by default.")
@click.option("--min-sqnr", type=DECIBELS, help="Exit with code 1 if a layer stays below, dB.")
@data_options
@output_options
def simulate(
    plan_path: str,
    model: str | None,
    min_sqnr: float | None,
    data: str | None,
    sequences: int,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    r"""Run the integer programs bit-exactly and measure the error of T.

    \b
    Example: qinvert simulate plan.json --min-sqnr 20
             qinvert simulate plan.json --data L.npz --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    with output.progress("simulating") as progress:
        report = run_simulation(plan, *open_for_plan(plan, model, data, sequences, seed), progress=progress)
    show_report(output, report)
    output.result(report.to_dict())
    if min_sqnr is not None and report.worst_sqnr_db < min_sqnr:
        output.say(f"missed: the worst layer has {report.worst_sqnr_db:.1f} dB, wanted {min_sqnr:.1f}")
        sys.exit(1)


def show_report(output: Output, report: Report) -> None:
    """Print the error table."""
    columns = ["layer", "format", "sqnr_db", "floor_db", "worst_rel", "max_abs", "saturated", "matrices"]
    rows = [
        [name, r.formats, decibels(r.sqnr_db), decibels(r.floor_db), f"{r.worst_rel:.2e}", f"{r.max_abs:.2e}",
         str(sum(r.saturations.values())), str(r.matrices)]
        for name, r in report.layers.items()
    ]  # fmt: skip
    output.table("Simulated integer inverse", columns, rows)


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option("--model", help="Model folder or `recall`; the plan's own by default.")
@data_options
@output_options
def evaluate(
    plan_path: str,
    model: str | None,
    data: str | None,
    sequences: int,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    r"""Compare the model under the plan with the model under the exact inverse.

    \b
    Example: qinvert evaluate plan.json
             qinvert evaluate plan.json --model ./my-model --data tokens.npz
    """
    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    name = model if model is not None else plan.provenance.get("source")
    if not isinstance(name, str) or is_matrix_file(name):
        raise InputError("the plan does not name a model; pass --model FOLDER")
    if data is None and name != recall.NAME:
        raise InputError("a model needs --data FILE with token ids (.npz or .safetensors, array input_ids)")
    tokens = recall.sequences(sequences, seed) if data is None else data
    score = recall.accuracy if name == recall.NAME else None
    with output.progress("evaluating") as progress:
        evaluation = run_evaluation(load_model(name), plan, tokens, score=score, progress=progress)
    show_evaluation(output, evaluation)
    output.result(evaluation.to_dict())


def show_evaluation(output: Output, evaluation: Evaluation) -> None:
    """Print the model-level table."""
    rows = [
        ["KL to the exact inverse, nats", f"{evaluation.kl:.3g}"],
        ["top-1 agreement", f"{evaluation.top1_agreement:.4f}"],
        ["loss, nats", f"{evaluation.loss:.4f}"],
        ["loss delta, nats", f"{evaluation.loss_delta:+.3g}"],
        ["tokens", str(evaluation.tokens)],
    ]
    if evaluation.score is not None and evaluation.exact_score is not None:
        rows += [
            ["task accuracy", f"{evaluation.score:.4f}"],
            ["with the exact inverse", f"{evaluation.exact_score:.4f}"],
        ]
    output.table("Model under the plan", ["metric", "value"], rows)
