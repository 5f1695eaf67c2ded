"""The verb graft: integer programs for the LinearAttention nodes of a model that others exported."""

from __future__ import annotations

import math

import click

from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.profile_option import profile_option
from qinvert.errors import InputError, MissingDependencyError
from qinvert.files import check_target
from qinvert.plan.plan import Plan


@click.command()
@click.argument("source", metavar="MODEL", type=click.Path(dir_okay=False))
@click.argument("plan_path", metavar="PLAN")
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="File to write.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NODE=LAYER",
    help="Layer of a node, repeatable; by default in order.",
)
@profile_option
@output_options
def graft(
    source: str,
    plan_path: str,
    path: str,
    layers: tuple[str, ...],
    profile: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Replace LinearAttention nodes by chunks with integer inverses.

    MODEL is an ONNX file that others exported, with LinearAttention nodes of
    onnxruntime (com.microsoft) or of ONNX 27.  The last line says how far outputs
    are from those of MODEL on drawn inputs, if onnxruntime can run it.

    \b
    Example: qinvert graft model.onnx plan.json -o out.onnx
             qinvert graft model.onnx plan.json -o out.onnx --layer /layers.0/attn=model.layers.0.linear_attn
    """
    from qinvert.export.whole_models.graft import graft as graft_plan

    output = Output(as_json=as_json, quiet=quiet)
    check_target(path)
    before = present(path)
    plan = Plan.load(plan_path)
    pairs = [layer.rpartition("=") for layer in layers]
    for given, (node, _, layer) in zip(layers, pairs, strict=True):
        if not node or not layer:
            raise InputError(f"--layer {given!r} is not of the form NODE=LAYER")
    chosen = {node: layer for node, _, layer in pairs} or None
    with output.progress("grafting"):
        written = graft_plan(source, plan, path, profile=profile, layers=chosen)
    names = [function.name for function in written.functions]
    output.say(f"{wrote(path, before)}: {len(written.graph.node)} nodes, {', '.join(names)}")
    with output.progress("comparing"):
        differences, line = compared(source, path)
    output.say(line)
    document = {"file": path, "nodes": len(written.graph.node), "functions": names}
    output.result({**document, "differences": differences})


def compared(source: str, path: str) -> tuple[dict[str, float], str]:
    """Return how far each output is from that of the host, and one line that says so."""
    from qinvert.export.whole_models.graft_check import TOKENS, compare_graft

    try:
        found = compare_graft(source, path)
    except (InputError, MissingDependencyError) as error:
        # The host may need inputs that nobody can draw; the graph is written all the same.
        return {}, f"not compared with {source}: {error}"
    # NaN is the worst.
    worst = max(found, key=lambda name: (math.isnan(found[name]), found[name]))
    return found, (
        f"{TOKENS} random tokens: outputs differ from those of {source} by at most {found[worst]:.1e} of "
        f"their norm ({worst})"
    )
