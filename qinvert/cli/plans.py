"""Verbs about plans: inspect, simulate, evaluate."""

from __future__ import annotations

import sys
from typing import Any

import click

from qinvert import recall
from qinvert.calibration.evaluation import Evaluation, LayerErrors
from qinvert.calibration.evaluation import compare as run_comparison
from qinvert.calibration.growth import RangeGrowth, range_growth
from qinvert.calibration.reports import Report
from qinvert.calibration.reports import simulate as run_simulation
from qinvert.calibration.sources import open_source
from qinvert.calibration.surveying import survey
from qinvert.cli.common import (
    DECIBELS,
    DataOptions,
    Output,
    data_options,
    decibels,
    is_matrix_file,
    load_model,
    open_for_plan,
    open_pair,
    output_options,
)
from qinvert.cli.planning import layer_to_dict, show_candidates
from qinvert.errors import InputError
from qinvert.plan import Plan

#: What an error of T becomes inside its layer, in the order of `LayerErrors`.
LAYER_COLUMNS = ("T", "U = T (beta v)", "W = T (beta k e^G)", "output", "final state")
LAYER_TITLE = "Error inside each layer, sqnr_db for the same inputs"


@click.command()
@click.argument("source", required=False)
@click.option("--stress", is_flag=True, help="Every method and format over the stress set; takes no SOURCE.")
@click.option("--chunk", default=64, show_default=True, help="Size of the stress matrices.")
@data_options
@output_options
def inspect(
    source: str | None,
    stress: bool,
    chunk: int,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show how far powers of M outgrow the inverse, or what is in a plan.

    SOURCE is a model folder, `recall`, a file of matrices L, or a plan.

    \b
    Example: qinvert inspect recall
             qinvert inspect plan.json
             qinvert inspect --stress
    """
    output = Output(as_json=as_json, quiet=quiet)
    if stress == (source is not None):
        raise InputError("name one thing to inspect: a model, matrices, a plan, or --stress alone")
    if source is None:
        show_survey(output, chunk)
    elif source.endswith(".json"):
        if given.data is not None:
            raise InputError("a plan holds its numbers; leave out --data")
        show_plan(output, Plan.load(source))
    else:
        with output.progress("measuring"):
            growth = range_growth(open_source(*open_pair(source, given)))
        show_growth(output, growth)
        output.result({"layers": {name: growth_to_dict(g) for name, g in growth.items()}})


def show_survey(output: Output, chunk: int) -> None:
    """Print sqnr of every method and format on every stress set, one table a format."""
    with output.progress("surveying") as progress:
        rows = list(survey(chunk, progress=progress))
    methods = list(dict.fromkeys(row.method for row in rows))
    for i, method in enumerate(methods, start=1):
        output.say(f"{i}: {method}")
    for bits in dict.fromkeys(row.bits for row in rows):
        found = {(row.name, row.method): row for row in rows if row.bits == bits}
        cells = [
            [
                name,
                *(decibels(found[name, method].sqnr_db) for method in methods),
                decibels(found[name, methods[-1]].floor_db),
            ]
            for name in dict.fromkeys(row.name for row in rows)
        ]
        columns = ["set", *map(str, range(1, len(methods))), "auto", "floor"]
        output.table(f"sqnr_db of T on unseen matrices, bits={bits}", columns, cells)
    output.result({"chunk": chunk, "rows": rows})


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
        show_candidates(output, layer)
        output.say(f"{proofs[name]}\n")
    layers = {name: layer_to_dict(layer, proofs[name]) for name, layer in plan.layers.items()}
    output.result({"target": plan.target, "layers": layers})


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option("--model", help="Model folder or `recall`; the plan's own by default.")
@click.option("--min-sqnr", type=DECIBELS, help="Exit with code 1 if a layer stays below, dB.")
@click.option("--rounding", default="onnx", help="`onnx`, or `hexagon`: as Qualcomm's NPU rounds int8 plans.")
@data_options
@output_options
def simulate(
    plan_path: str,
    model: str | None,
    min_sqnr: float | None,
    rounding: str,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the integer programs bit-exactly and measure the error of T.

    \b
    Example: qinvert simulate plan.json --min-sqnr 20
             qinvert simulate plan.json --data L.npz --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    with output.progress("simulating") as progress:
        source = open_for_plan(plan, model, given)
        report = run_simulation(plan, *source, rounding=rounding, progress=progress)
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
@click.argument("plan_paths", metavar="PLAN...", nargs=-1, required=True)
@click.option("--compare", is_flag=True, help="Take several plans and show them side by side.")
@click.option("--model", help="Model folder or `recall`; the first plan's own by default.")
@data_options
@output_options
def evaluate(
    plan_paths: tuple[str, ...],
    compare: bool,
    model: str | None,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the model under the plan with the model under the exact inverse.

    \b
    Example: qinvert evaluate plan.json
             qinvert evaluate plan.json --model ./my-model --data book.txt --num-samples 32
             qinvert evaluate --compare int8.json int4.json
    """
    output = Output(as_json=as_json, quiet=quiet)
    if len(plan_paths) > 1 and not compare:
        raise InputError(f"{len(plan_paths)} plans were given; add --compare to evaluate them side by side")
    plans = {path: Plan.load(path) for path in plan_paths}
    name = model if model is not None else plans[plan_paths[0]].provenance.get("source")
    if not isinstance(name, str) or is_matrix_file(name):
        raise InputError("the plan does not name a model; pass --model FOLDER")
    tokens = given.for_model(name)
    score = recall.accuracy if name == recall.NAME else None
    with output.progress("evaluating") as progress:
        found = run_comparison(load_model(name), plans, tokens, score=score, progress=progress)
    if compare:
        show_comparison(output, found)
        output.result({"plans": {path: evaluation.to_dict() for path, evaluation in found.items()}})
    else:
        show_evaluation(output, found[plan_paths[0]])
        output.result(found[plan_paths[0]].to_dict())


def show_evaluation(output: Output, evaluation: Evaluation) -> None:
    """Print the tables of one plan: the model, and every layer."""
    facts = [*model_facts(evaluation).items(), ("tokens", str(evaluation.tokens))]
    output.table("Model under the plan", ["metric", "value"], [list(fact) for fact in facts])
    rows = [[layer, *layer_facts(errors).values()] for layer, errors in evaluation.layers.items()]
    output.table(LAYER_TITLE, ["layer", *LAYER_COLUMNS], rows)


def show_comparison(output: Output, found: dict[str, Evaluation]) -> None:
    """Print the tables of several plans, a row for each."""
    facts = {path: model_facts(evaluation) for path, evaluation in found.items()}
    columns = list(next(iter(facts.values())))
    rows = [[path, *cells.values()] for path, cells in facts.items()]
    output.table("Model under each plan", ["plan", *columns], rows)
    layers = dict.fromkeys(layer for evaluation in found.values() for layer in evaluation.layers)
    rows = [
        [layer, path, *layer_facts(evaluation.layers[layer]).values()]
        for layer in layers
        for path, evaluation in found.items()
    ]
    output.table(LAYER_TITLE, ["layer", "plan", *LAYER_COLUMNS], rows)


def model_facts(evaluation: Evaluation) -> dict[str, str]:
    """Return the metrics of the model by name; those of its task only where it has one."""
    facts = {
        "KL to the exact inverse, nats": f"{evaluation.kl:.3g}",
        "top-1 agreement": f"{evaluation.top1_agreement:.4f}",
        "loss, nats": f"{evaluation.loss:.4f}",
        "loss delta, nats": f"{evaluation.loss_delta:+.3g}",
    }
    if evaluation.score is not None and evaluation.exact_score is not None:
        facts["task accuracy"] = f"{evaluation.score:.4f}"
        facts["with the exact inverse"] = f"{evaluation.exact_score:.4f}"
    return facts


def layer_facts(errors: LayerErrors) -> dict[str, str]:
    """Return the errors of a layer, in the order of `LAYER_COLUMNS`."""
    parts = (errors.t, errors.u, errors.w, errors.out, errors.state)
    return dict(zip(LAYER_COLUMNS, map(decibels, parts), strict=True))
