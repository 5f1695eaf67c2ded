"""The verb export-model: a whole decoder as one graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qinvert.cli.diagnosis import check_chip, examined
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.profile_option import profile_option
from qinvert.cli.sources import load_model
from qinvert.errors import InputError
from qinvert.files import check_target
from qinvert.plan.plan import Plan

if TYPE_CHECKING:
    import onnx


@click.command("export-model")
@click.argument("plan_path", metavar="PLAN")
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="File to write.")
@click.option("--model", "name", help="Model folder or `recall`; the plan's own by default.")
@click.option("--length", type=click.IntRange(1), help="Fix one sequence of that length; open by default.")
@click.option("--opset", type=int, help="Operator set; the profile's, but at least 18, by default.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Run the graph in onnxruntime first; refuse it if it is not the model.",
)
@click.option("--force", is_flag=True, help="Go on with another model than the plan was made for.")
@click.option(
    "--hardware", help="Chip for the verdict at the end; the plan's own, or the profile's, by default."
)
@profile_option
@output_options
def export_model(
    plan_path: str,
    path: str,
    name: str | None,
    length: int | None,
    opset: int | None,
    check: bool,
    profile: str | None,
    force: bool,
    hardware: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a whole decoder as ONNX, with a local function for each layer's inverse.

    The graph is run in onnxruntime; if its length is open, at lengths that it
    was not traced with.  It is compared twice: with the model that uses the
    inverses of the graph, where any difference is an error, and with the
    simulated plan, where a rounding may fall on the other side.  The last lines
    say what of it the compiler of a chip will not take, see `qinvert doctor`.

    \b
    Example: qinvert export-model plan.json -o model.onnx
             qinvert export-model plan.json -o model.onnx --length 512
    """
    output = Output(as_json=as_json, quiet=quiet)
    check_target(path)
    before = present(path)
    check_chip(hardware)
    plan = Plan.load(plan_path)
    source = name if name is not None else plan.provenance.get("source")
    if not isinstance(source, str):
        raise InputError("the plan does not name its model; pass --model")
    model = load_model(source)
    with output.progress("exporting"):
        written = write_model(
            model, plan, path, length, profile=profile, opset=opset, check=check, force=force
        )
    with output.progress("comparing"):
        errors = differences(model, plan, path, length) if check else {}
    output.say(f"{wrote(path, before)}: {len(written.graph.node)} nodes, {len(written.functions)} layers")
    for n, error in errors.items():
        output.say(f"{n} tokens: logits differ from the simulated plan by {error:.1e} of their norm")
    diagnosis = examined(output, path, plan, hardware)
    document = {"file": path, "nodes": len(written.graph.node), "differences": errors}
    output.result({**document, **({"doctor": diagnosis.to_dict()} if diagnosis is not None else {})})


def write_model(model: Any, plan: Plan, path: str, length: int | None, **options: Any) -> onnx.ModelProto:
    """Write the graph for sequences of one length, or of any where it is None."""
    import torch

    from qinvert.export.whole_models.export_model import export_model

    example = torch.zeros(1, length or 1, dtype=torch.int64)
    return export_model(model, plan, example, path, dynamic=length is None, **options)


def differences(model: Any, plan: Plan, path: str, length: int | None) -> dict[str, float]:
    """Return how far the logits are from those of the simulated plan, by length; empty without a runtime."""
    from qinvert.export.whole_models.check import can_run, difference
    from qinvert.export.whole_models.export_model import untraced_lengths

    lengths = untraced_lengths(plan) if length is None else (length,)
    return {str(n): difference(path, model, plan, n) for n in lengths if can_run()}
