"""The verb simulate: what the integers of a plan cost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qinvert.cli.data_options import DataOptions, data_options
from qinvert.cli.decibels import DECIBELS, decibels
from qinvert.cli.output import Output, output_options
from qinvert.cli.plan_tables import head_cell
from qinvert.cli.sources import open_for_plan
from qinvert.cli.step_tables import show_step_report
from qinvert.documents import to_document
from qinvert.plan.plan import Plan

if TYPE_CHECKING:
    from qinvert.calibration.simulate import Report


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option("--model", help="Model folder or `recall`; the plan's own by default.")
@click.option(
    "--min-sqnr",
    "--min-sqnr-db",
    "min_sqnr",
    type=DECIBELS,
    help="Exit with code 1 if a layer stays below this sqnr, dB.",
)
@click.option("--rounding", default="onnx", help="`onnx`, or how NPUs round int8 plans: `hexagon`, `tflite`.")
@click.option("--force", is_flag=True, help="Go on with another model than the plan was made for.")
@data_options
@output_options
def simulate(
    plan_path: str,
    model: str | None,
    min_sqnr: float | None,
    rounding: str,
    given: DataOptions,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the integer programs bit-exactly and measure the error of T.

    With matrices L as --data (.npz, .safetensors) no model runs.  Of plans of
    whole chunk steps it measures output and state, too, with the state carried
    by the integers, and one step at a time.

    \b
    Example: qinvert simulate plan.json --min-sqnr 20
             qinvert simulate plan.json --data L.npz --json
    """
    from qinvert.calibration.simulate import check_rounding
    from qinvert.calibration.simulate import simulate as run_simulation

    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    check_rounding(plan, rounding)
    with output.progress("simulating") as progress:
        source = open_for_plan(plan, model, given)
        report = run_simulation(plan, *source, rounding=rounding, progress=progress, force=force)
    if report.steps:
        show_step_report(output, report.steps)
    else:
        show_report(output, report)
    output.result(report.to_dict())
    if min_sqnr is not None and report.worst_sqnr_db < min_sqnr:
        output.say(f"missed: the worst layer has {report.worst_sqnr_db:.1f} dB, the goal is {min_sqnr:.1f}")
        sys.exit(1)


def show_report(output: Output, report: Report) -> None:
    """Print the error table."""
    columns = [
        "layer",
        "format",
        "sqnr, dB",
        "floor, dB",
        "worst head, dB",
        "largest error of a matrix, relative",
        "largest error of a value",
        "saturated values",
        "matrices",
    ]
    rows = [
        [name, r.formats, decibels(r.sqnr_db), decibels(r.floor_db), head_cell(to_document(r.heads)),
         f"{r.worst_rel:.2e}", f"{r.max_abs:.2e}", str(sum(r.saturations.values())), str(r.matrices)]
        for name, r in report.layers.items()
    ]  # fmt: skip
    output.table("Simulated integer inverse", columns, rows)
