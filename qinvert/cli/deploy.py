"""The verb deploy: from a model folder to graphs that an NPU runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qinvert.cli.data_options import OF_DATA, DataOptions, data_options
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.profile_option import profile_option
from qinvert.cli.sources import check_exists, load_model, with_source
from qinvert.hardware import HARDWARE
from qinvert.plan.plan import Plan

if TYPE_CHECKING:
    from qinvert.export.deployment.manifest import Manifest


@click.command()
@click.argument("source", metavar="MODEL")
@click.option("-o", "--output", "path", required=True, type=click.Path(), help="Folder to write.")
@click.option(
    "--plan", "plan_path", help="Plan of chunk steps; without it, the model is calibrated on --data."
)
@click.option("--hardware", help=f"Chip to plan for: {', '.join(HARDWARE)}.")
@click.option("--chunks", default=1, show_default=True, help="Chunks of a call of the prefill graph.")
@click.option(
    "--cache", default=1024, show_default=True, help="Tokens that the caches of attention layers hold."
)
@click.option(
    "--weights",
    default="none",
    show_default=True,
    type=click.Choice(["none", "w8", "w4"]),
    help="Weights of projections, MLPs and the head: float32, int8 or int4.",
)
@click.option(
    "--activation-bits",
    default="16",
    show_default=True,
    type=click.Choice(["8", "16"]),
    help="Bits of the inputs and outputs of products with such weights.",
)
@click.option("--force", is_flag=True, help="Go on with another model than the plan was made for.")
@profile_option
@data_options
@output_options
def deploy(
    source: str,
    path: str,
    plan_path: str | None,
    hardware: str | None,
    chunks: int,
    cache: int,
    weights: str,
    activation_bits: str,
    force: bool,
    profile: str | None,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a model as a prefill graph and a decode graph that hand all states on.

    MODEL is a model folder with --data or --plan, or `recall`.  The folder has both
    graphs, the plan, encodings, and manifest.json, which says what a host passes to
    them.  `qinvert run` drives it on onnxruntime.  With --weights w8 or w4 and --plan,
    activations are calibrated on --data.

    \b
    Example: qinvert deploy recall -o out/
             qinvert deploy ./my-model --data book.txt --hardware hexagon-v81 -o out/
             qinvert deploy ./my-model --plan plan.json --chunks 4 --cache 4096 -o out/
             qinvert deploy ./my-model --data book.txt --weights w8 -o out/
    """
    from qinvert.export.deployment.deploy import deploy as write
    from qinvert.export.deployment.manifest import MANIFEST
    from qinvert.files import check_replaceable

    output = Output(as_json=as_json, quiet=quiet)
    check_exists(source)
    check_replaceable(path, MANIFEST)
    if plan_path is not None and weights == "none":
        given.refuse(OF_DATA, "--plan is a finished plan, which takes data for --weights w8 or w4 only")
    before = present(path)
    plan = _plan(output, source, plan_path, hardware, profile, given)
    with output.progress("writing graphs"):
        manifest = write(
            load_model(source, given),
            plan,
            path,
            hardware=hardware,
            chunks=chunks,
            cache=cache,
            profile=profile,
            weights=weights,
            activation_bits=int(activation_bits),
            data=None if weights == "none" else given.for_model(source),
            force=force,
        )
    show_manifest(output, wrote(path, before), manifest)
    output.result({"folder": path, "graphs": manifest.facts["graphs"], "layers": manifest.facts["layers"]})


def _plan(
    output: Output,
    source: str,
    plan_path: str | None,
    hardware: str | None,
    profile: str | None,
    given: DataOptions,
) -> Plan:
    if plan_path is not None:
        return Plan.load(plan_path)
    from qinvert.calibration.calibrate import calibrate

    with output.progress("calibrating") as progress:
        plan = calibrate(
            load_model(source, given),
            given.for_model(source),
            hardware=hardware,
            target=profile,
            scope="chunk",
            seed=given.seed,
            progress=progress,
        )
    return with_source(plan, source)


def show_manifest(output: Output, written: str, manifest: Manifest) -> None:
    """Print what was written, as ``written`` says: nodes, states, and what runs in which type."""
    rows = [[name, *map(str, _row(facts))] for name, facts in manifest.facts["graphs"].items()]
    output.table("Graphs", ["graph", "tokens", "nodes", "linear attention", "projections", "elsewhere"], rows)
    kept = f", caches of {manifest.cache} tokens" if manifest.cache else ""
    output.say(f"{written}: {len(manifest.states)} states, windows of {manifest.window} tokens{kept}")


def _row(facts: dict[str, Any]) -> list[Any]:
    weights, activations = (
        facts["projections"][name].partition(",")[0] for name in ("weights", "activations")
    )
    products = weights if weights == activations else f"{weights} weights, {activations} activations"
    return [facts["tokens"], facts["nodes"], facts["linear_attention"], products, facts["elsewhere"]]
