"""The verb report: a plan, and what is measured of it, as one page."""

from __future__ import annotations

from typing import Any

import click

from qinvert.cli.data_options import ALL, DataOptions, data_options
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.sources import open_for_plan
from qinvert.files import check_writable
from qinvert.plan.plan import Plan


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option(
    "-o", "--output", "path", default="report.html", show_default=True, type=click.Path(dir_okay=False),
    help="Page to write.",
)  # fmt: skip
@click.option("--model", help="Model folder or `recall`; with --data the plan's own by default.")
@click.option("--layer", "layers", multiple=True, help="Entry to draw in detail; repeatable.")
@click.option("--force", is_flag=True, help="Go on with another model than the plan was made for.")
@data_options
@output_options
def report(
    plan_path: str,
    path: str,
    model: str | None,
    layers: tuple[str, ...],
    force: bool,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show a plan as one HTML page: verdicts, figures, tables, what to do next.

    Without --data and --model the page shows what the plan itself holds.  With
    matrices L (.npz, .safetensors) or a model and its data it also shows what
    is measured on them.  The page needs no network.

    \b
    Example: qinvert report plan.json -o report.html
             qinvert report plan.json --data L.npz
             qinvert report plan.json --model recall
    """
    from qinvert import recall
    from qinvert.report_page.report import report as write_report

    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    check_writable(path)
    source, data = _measured(plan, model, given)
    options: dict[str, Any] = {"layers": layers or None, "plan_file": plan_path, "force": force}
    if data is not None and recall.NAME in (model, plan.provenance.get("source")) and given.data is None:
        options["score"] = recall.accuracy
    before = present(path)
    with output.progress("measuring") as progress:
        page = write_report(plan, source, path, data=data, progress=progress, **options)
    output.say(wrote(path, before))
    output.result({"report": path, "bytes": len(page.encode())})


def _measured(plan: Plan, model: str | None, given: DataOptions) -> tuple[Any, Any]:
    """Return what the plan is measured on, if anything is named."""
    if given.data is not None or model is not None:
        return open_for_plan(plan, model, given)
    given.refuse(ALL, "nothing is measured without --data or --model")
    return None, None
