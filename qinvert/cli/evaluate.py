"""The verb evaluate: what a plan does to the model around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from qinvert.cli.data_options import DataOptions, data_options
from qinvert.cli.decibels import decibels
from qinvert.cli.output import Output, output_options
from qinvert.cli.plan_tables import head_cell
from qinvert.cli.sources import is_matrix_file, load_model
from qinvert.documents import to_document
from qinvert.errors import InputError
from qinvert.plan.plan import Plan

if TYPE_CHECKING:
    from qinvert.calibration.evaluate import Evaluation, LayerErrors

#: What an error of T becomes inside its layer, in the order of `LayerErrors`, and its worst head.
LAYER_COLUMNS = ("T", "U = T (beta v)", "W = T (beta k e^G)", "output", "final state", "worst head of T")
#: Title of the table of layers.
LAYER_TITLE = "Error inside each layer, sqnr in dB for the same inputs"


@click.command()
@click.argument("plan_paths", metavar="PLAN...", nargs=-1, required=True)
@click.option("--compare", is_flag=True, help="Take several plans and show them side by side.")
@click.option("--model", help="Model folder or `recall`; the first plan's own by default.")
@click.option("--force", is_flag=True, help="Go on with another model than the plan was made for.")
@data_options
@output_options
def evaluate(
    plan_paths: tuple[str, ...],
    compare: bool,
    model: str | None,
    given: DataOptions,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the model under the plan with the model under the exact inverse.

    \b
    Example: qinvert evaluate plan.json
             qinvert evaluate plan.json --model ./my-model --data book.txt --num-samples 32
             qinvert evaluate --compare int8.json int4.json
    """
    from qinvert import recall
    from qinvert.calibration.evaluate import compare as run_comparison

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
        found = run_comparison(
            load_model(name, given), plans, tokens, score=score, progress=progress, force=force
        )
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
    columns = layer_columns(evaluation.layers.values())
    rows = [[layer, *_cells(errors, columns)] for layer, errors in evaluation.layers.items()]
    output.table(LAYER_TITLE, ["layer", *columns], rows)


def show_comparison(output: Output, found: dict[str, Evaluation]) -> None:
    """Print the tables of several plans, one row per plan."""
    facts = {path: model_facts(evaluation) for path, evaluation in found.items()}
    names = list(next(iter(facts.values())))
    rows = [[path, *cells.values()] for path, cells in facts.items()]
    output.table("Model under each plan", ["plan", *names], rows)
    layers = dict.fromkeys(layer for evaluation in found.values() for layer in evaluation.layers)
    columns = layer_columns([e for evaluation in found.values() for e in evaluation.layers.values()])
    rows = [
        [layer, path, *_cells(evaluation.layers[layer], columns)]
        for layer in layers
        for path, evaluation in found.items()
    ]
    output.table(LAYER_TITLE, ["layer", "plan", *columns], rows)


def layer_columns(layers: Iterable[LayerErrors]) -> list[str]:
    """Return the columns that any layer has a number for: whole chunk steps form neither U nor W."""
    known = {name for errors in layers for name, cell in layer_facts(errors).items() if cell != "-"}
    return [name for name in LAYER_COLUMNS if name in known]


def _cells(errors: LayerErrors, columns: Sequence[str]) -> list[str]:
    facts = layer_facts(errors)
    return [facts[name] for name in columns]


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
    cells = ["-" if part is None else decibels(part) for part in parts]
    cells.append(head_cell(to_document(errors.heads)))
    return dict(zip(LAYER_COLUMNS, cells, strict=True))
