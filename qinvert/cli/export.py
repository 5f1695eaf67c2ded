"""The verb export."""

from __future__ import annotations

from typing import Any

import click

from qinvert.cli.graph_folder import ALL_LAYERS, encodings_file, export_all, export_together
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.profile_option import profile_option
from qinvert.errors import InputError
from qinvert.export.encodings import STYLES
from qinvert.export.interface import AUTO, GraphInput, GraphOutput, InputType, Options
from qinvert.export.step_heads import layer_plans
from qinvert.export.step_interface import Layout, States
from qinvert.files import check_folder
from qinvert.plan.plan import Plan
from qinvert.profiles import find_profile


class AutoCount(click.ParamType["int | str"]):
    """A number, or ``auto``."""

    name = "number or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return an int, or ``"auto"``."""
        return AUTO if value == AUTO else int(click.INT.convert(value, param, ctx))


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(file_okay=False), help="Folder to write."
)
@profile_option
@click.option("--layer", "layers", multiple=True, help="Layer to export, repeatable; all by default.")
@click.option(
    "--batch",
    default=AUTO,
    show_default=True,
    type=AutoCount(),
    help="Matrices per call of the graph, or sequences per call of a chunk step; auto is 8 or 1.",
)
@click.option(
    "--input",
    "source",
    default=AUTO,
    show_default=True,
    type=click.Choice([AUTO, *(kind.value for kind in GraphInput)]),
    help="M takes -L; keys takes k, beta and g and builds L in float32.",
)
@click.option("--key-size", type=int, help="Length of a key, with --input keys.")
@click.option(
    "--output-type",
    "result",
    default=AUTO,
    show_default=True,
    type=click.Choice([AUTO, *(kind.value for kind in GraphOutput)]),
    help="integers returns what T is made of, as it is stored; its scale is in the metadata.",
)
@click.option(
    "--input-type",
    default=InputType.FLOAT32.value,
    show_default=True,
    type=click.Choice([kind.value for kind in InputType]),
    help="integers takes M on the plan's grid, with --input M; its scale is in the metadata.",
)
@click.option(
    "--chains",
    default=AUTO,
    show_default=True,
    type=AutoCount(),
    help="Parts into which the graph cuts the batch; auto takes what costs the least on the plan's chip.",
)
@click.option("--heads", type=int, help="Heads of the layer, for chunk steps whose plan does not say it.")
@click.option("--chunks", type=int, help="Chunks per call of a chunk step; 1 by default.")
@click.option(
    "--layout",
    type=click.Choice([kind.value for kind in Layout]),
    help="Order of the last two axes of v, o and the state of a chunk step.",
)
@click.option("--normalize", is_flag=True, help="Take raw q and k of a chunk step, and normalize them.")
@click.option(
    "--states",
    type=click.Choice([kind.value for kind in States]),
    help="every returns the state behind each chunk, too, to cache prefixes.",
)
@click.option("--one-file", is_flag=True, help=f"Write one {ALL_LAYERS} with a local function per layer.")
@click.option("--inline", is_flag=True, help="With --one-file: plain nodes in the place of functions.")
@click.option("--opset", type=int, help="Operator set, to fit a host's; the profile's by default.")
@click.option("--ir-version", type=int, help="IR version, to fit a host's; 9 or 10 by default.")
@click.option(
    "--encodings", "style", type=click.Choice(tuple(STYLES)), help="Also write the scales as JSON, QDQ only."
)
@output_options
def export(
    plan_path: str,
    folder: str,
    profile: str | None,
    layers: tuple[str, ...],
    batch: int | str,
    source: str,
    key_size: int | None,
    result: str,
    input_type: str,
    chains: int | str,
    heads: int | None,
    chunks: int | None,
    layout: str | None,
    normalize: bool,
    states: str | None,
    one_file: bool,
    inline: bool,
    opset: int | None,
    ir_version: int | None,
    style: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write one ONNX file per layer, or one for all, and the plan beside them.

    \b
    Example: qinvert export plan.json -o graphs/ --profile npu-qdq-int8
             qinvert export plan.json -o graphs/ --encodings aimet-2.0.0
             qinvert export plan.json -o graphs/ --one-file --output-type integers
             qinvert export plan.json -o graphs/ --input keys --key-size 128
             qinvert export plan.json -o graphs/ --input M --input-type integers --output-type integers
             qinvert export plan.json -o graphs/ --heads 16 --chunks 4 --normalize --states every
    """
    output = Output(as_json=as_json, quiet=quiet)
    check_folder(folder)
    before = present(folder)
    plan = Plan.load(plan_path)
    find_profile(profile if profile is not None else plan.target)
    for name in layers:
        layer_plans(plan, name)
    options: Options = {
        "batch": batch,
        "input": source,
        "output": result,
        "key_size": key_size,
        "input_type": input_type,
        "chains": chains,
        "heads": heads,
        "chunks": chunks,
        "layout": layout,
        "normalize": normalize or None,
        "states": states,
        "opset": opset,
        "ir_version": ir_version,
    }
    if inline and not one_file:
        raise InputError("--inline is about the functions of --one-file; pass both, or neither")
    if one_file:
        if style is not None:
            raise InputError("--encodings describes one graph per layer; leave out --one-file")
        files = export_together(plan, folder, profile, layers, inline=inline, **options)
    else:
        files = export_all(plan, folder, profile, layers, style, **options)
    written = {name: encodings_file(file) for name, file in files.items()} if style is not None else {}
    for file in dict.fromkeys((*files.values(), *written.values())):
        output.say(wrote(file, before))
    output.result({"files": files, **({"encodings": written} if written else {})})
