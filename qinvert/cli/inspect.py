"""The verb inspect: how ranges grow, what is in a plan, and what methods make of the stress set."""

from __future__ import annotations

import click

from qinvert.chunk_step.ports import find_step_sizes
from qinvert.cli.data_options import ALL, DataOptions, data_options
from qinvert.cli.decibels import decibels
from qinvert.cli.growth_table import growth_to_dict, show_growth
from qinvert.cli.output import Output, output_options
from qinvert.cli.plan_tables import layer_to_dict, show_candidates
from qinvert.cli.sources import open_pair
from qinvert.cli.step_tables import show_step_candidates, show_step_plan
from qinvert.errors import InputError
from qinvert.plan.plan import Plan


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
        given.refuse(ALL, "--stress generates its matrices, and no model runs")
        show_survey(output, chunk)
    elif source.endswith(".json"):
        given.refuse(ALL, "a plan already holds its numbers")
        show_plan(output, Plan.load(source))
    else:
        measure_growth(output, source, given)


def measure_growth(output: Output, source: str, given: DataOptions) -> None:
    """Print how far powers of M outgrow the inverse, for every layer of a model or file."""
    from qinvert.calibration.growth import range_growth
    from qinvert.calibration.sources import open_source

    with output.progress("measuring"):
        growth = range_growth(open_source(*open_pair(source, given)))
    show_growth(output, growth)
    output.result({"layers": {name: growth_to_dict(g) for name, g in growth.items()}})


def show_survey(output: Output, chunk: int) -> None:
    """Print sqnr of every method and format on every stress set, one table per format."""
    from qinvert.calibration.survey import survey

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
        output.table(f"sqnr of T in dB on unseen matrices, bits={bits}", columns, cells)
    output.result({"chunk": chunk, "rows": rows})


def show_plan(output: Output, plan: Plan) -> None:
    """Print every layer's program, grids and proof."""
    proofs = {name: layer.proof() for name, layer in plan.layers.items()}
    for name, layer in plan.layers.items():
        if find_step_sizes(layer.program) is not None:
            show_step_plan(output, name, layer, proofs[name])
            show_step_candidates(output, layer)
            output.say(f"{proofs[name]}\n")
            continue
        rows = [[tensor, str(q.format), f"{q.scale:.6g}", f"{layer.ranges.get(tensor, 0):.4g}"]
                for tensor, q in layer.tensors.items()]  # fmt: skip
        output.table(f"{name}: {layer}", ["tensor", "format", "scale", "calibrated max"], rows)
        show_candidates(output, layer)
        output.say(f"{proofs[name]}\n")
    layers = {name: layer_to_dict(layer, proofs[name]) for name, layer in plan.layers.items()}
    output.result({"target": plan.target, "layers": layers})
