"""The verb export, and the files of a folder of graphs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict, Unpack

import click

from qinvert.cli.common import Output, output_options
from qinvert.errors import InputError
from qinvert.export.encodings import STYLES, encodings, to_bytes
from qinvert.export.exporting import build, serialize
from qinvert.export.functions import build_layers
from qinvert.export.interface import GraphInput, GraphOutput
from qinvert.files import make_folder, write_together
from qinvert.plan.plan import Plan
from qinvert.profiles import PROFILES, find_profile

#: Name of the plan beside the graphs.
PLAN_FILE = "plan.json"
#: Name of the file that has a function for each layer.
ALL_LAYERS = "all_layers.onnx"


class Options(TypedDict, total=False):
    """What graphs take and return, as in `qinvert.export`."""

    batch: int
    input: str
    output: str
    key_size: int | None


@click.command()
@click.argument("plan_path", metavar="PLAN")
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(file_okay=False), help="Folder to write."
)
@click.option("--profile", help=f"{', '.join(PROFILES)}; the plan's target by default.")
@click.option("--layer", "layers", multiple=True, help="Layer to export, repeatable; all by default.")
@click.option("--batch", default=8, show_default=True, help="Matrices per call of the graph.")
@click.option(
    "--input",
    "source",
    default="L",
    show_default=True,
    type=click.Choice([kind.value for kind in GraphInput]),
    help="M takes -L; keys takes k, beta and g and builds L in float32.",
)
@click.option("--key-size", type=int, help="Length of a key, with --input keys.")
@click.option(
    "--output-type",
    "result",
    default="T",
    show_default=True,
    type=click.Choice([kind.value for kind in GraphOutput]),
    help="integers returns what T is made of, as it is stored; its scale is in the metadata.",
)
@click.option("--one-file", is_flag=True, help=f"One {ALL_LAYERS} with a local function a layer.")
@click.option(
    "--encodings", "style", type=click.Choice(tuple(STYLES)), help="Also write the scales as JSON, QDQ only."
)
@output_options
def export(
    plan_path: str,
    folder: str,
    profile: str | None,
    layers: tuple[str, ...],
    batch: int,
    source: str,
    key_size: int | None,
    result: str,
    one_file: bool,
    style: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write one ONNX file a layer, or one for all, and the plan beside them.

    \b
    Example: qinvert export plan.json -o graphs/ --profile npu-qdq-int8
             qinvert export plan.json -o graphs/ --encodings aimet-2.0.0
             qinvert export plan.json -o graphs/ --one-file --output-type integers
             qinvert export plan.json -o graphs/ --input keys --key-size 128
    """
    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(plan_path)
    find_profile(profile if profile is not None else plan.target)
    for name in layers:
        plan.layer(name)
    options: Options = {"batch": batch, "input": source, "output": result, "key_size": key_size}
    if one_file:
        if style is not None:
            raise InputError("--encodings describes one graph a layer; leave out --one-file")
        files = export_together(plan, folder, profile, layers, **options)
    else:
        files = export_all(plan, folder, profile, layers, style, **options)
    written = {name: encodings_file(file) for name, file in files.items()} if style is not None else {}
    for file in dict.fromkeys((*files.values(), *written.values())):
        output.say(f"wrote {file}")
    output.result({"files": files, **({"encodings": written} if written else {})})


def export_all(
    plan: Plan,
    folder: str,
    profile: str | None = None,
    layers: tuple[str, ...] = (),
    style: str | None = None,
    **options: Unpack[Options],
) -> dict[str, str]:
    """Export the named layers (all by default) into ``folder``; return the file of each.

    All graphs are built before the first is written, and all files appear
    together; with a ``style`` the scales of each graph are among them.
    """
    names, target = file_names(plan), Path(folder)
    contents: dict[Path, bytes] = {}
    for name in layers or plan.layers:
        model = build(plan, profile=profile, layer=name, **options)
        contents[target / names[name]] = serialize(model)
        if style is not None:
            contents[target / encodings_file(names[name])] = to_bytes(encodings(model, style))
    make_folder(folder)
    write_together({**contents, target / PLAN_FILE: plan.to_bytes()})
    return {name: str(target / names[name]) for name in layers or plan.layers}


def export_together(
    plan: Plan,
    folder: str,
    profile: str | None = None,
    layers: tuple[str, ...] = (),
    **options: Unpack[Options],
) -> dict[str, str]:
    """Export the named layers (all by default) into one file; return it for each."""
    names = layers or tuple(plan.layers)
    model, target = build_layers(plan, profile=profile, layers=names, **options), Path(folder)
    make_folder(folder)
    write_together({target / ALL_LAYERS: serialize(model), target / PLAN_FILE: plan.to_bytes()})
    return dict.fromkeys(names, str(target / ALL_LAYERS))


def file_names(plan: Plan) -> dict[str, str]:
    """Return a safe, unique file name for every layer."""
    names: dict[str, str] = {}
    taken = {ALL_LAYERS.removesuffix(".onnx")}
    for i, layer in enumerate(plan.layers):
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", layer).lstrip(".")[:100] or f"layer_{i}"
        tail = ""
        # Without regard to case: some file systems have none.
        while f"{stem}{tail}".casefold() in taken:
            tail = f"_{int(tail[1:] or i) + 1}"
        taken.add(f"{stem}{tail}".casefold())
        names[layer] = f"{stem}{tail}.onnx"
    return names


def encodings_file(graph: str) -> str:
    """Name of the encodings beside a graph."""
    return f"{graph.removesuffix('.onnx')}.encodings.json"
