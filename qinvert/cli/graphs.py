"""Verbs about ONNX graphs: export, verify, profiles."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, TypedDict, Unpack

import click
import torch

from qinvert import plan_io
from qinvert.calibration.sources import DEFAULT_LAYER, check_size, open_with_beta
from qinvert.cli.common import DECIBELS, DataOptions, Output, decibels, open_for_plan, output_options
from qinvert.errors import InputError
from qinvert.execute import needed_beta
from qinvert.export.comparing import Verification
from qinvert.export.encodings import STYLES, encodings, to_bytes
from qinvert.export.exporting import build, serialize
from qinvert.export.interface import GraphInput, GraphOutput
from qinvert.export.layers import build_layers, called_layers
from qinvert.export.linting import lint
from qinvert.export.runtimes import RUNTIMES, Runtime, installed
from qinvert.export.verifying import read_interface
from qinvert.export.verifying import verify as verify_layer
from qinvert.files import make_folder, write_together
from qinvert.plan import Plan
from qinvert.profiles import PROFILES, Profile, find_profile
from qinvert.steps import MAX_BETA
from qinvert.stress import STRESS, stress_keys, stress_matrices

#: Sequences of the embedded model's task that a goal is measured on.
GATE_SEQUENCES = 4
#: Name of the plan beside the graphs.
PLAN_FILE = "plan.json"
#: Name of the file that has a function for each layer.
ALL_LAYERS = "all_layers.onnx"
#: Keys of each kind that graphs from keys are verified with.
STRESS_KEYS = 8


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
    write_together({**contents, target / PLAN_FILE: plan_io.to_bytes(plan)})
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
    write_together({target / ALL_LAYERS: serialize(model), target / PLAN_FILE: plan_io.to_bytes(plan)})
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


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option(
    "--data", type=click.Path(), help="Matrices L, .npz or .safetensors; stress matrices by default."
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help=f"{', '.join(RUNTIMES)}; repeatable. `qinvert profiles` says which are installed.",
)
@click.option(
    "--min-sqnr",
    type=DECIBELS,
    help="Exit with code 1 if a runtime's T stays below, dB, on --data or on what the plan was made from.",
)
@output_options
def verify(
    folder: str,
    data: str | None,
    runtimes: tuple[str, ...],
    min_sqnr: float | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run exported graphs and compare every value with the simulator.

    FOLDER is what `qinvert export` wrote.  A difference that the profile does
    not allow is an error, exit code 2; where a graph breaks a rule of its
    profile, the node and the remedy are printed.

    \b
    Example: qinvert verify graphs/
             qinvert verify graphs/ --data L.npz --min-sqnr 20
             qinvert verify graphs/ --runtime openvino --runtime qnn
    """
    output = Output(as_json=as_json, quiet=quiet)
    plan = Plan.load(Path(folder) / PLAN_FILE)
    found = exported_graphs(plan, Path(folder))
    if not found:
        raise InputError(f"{folder} holds no exported layer of its plan; run: qinvert export")
    own = None if data is None else (data, None)
    if own is None and min_sqnr is not None:
        # A goal is about the data that the plan is for, not about stress matrices.
        own = open_for_plan(plan, None, DataOptions(sequences=GATE_SEQUENCES))
    results: dict[str, list[Verification]] = {}
    for label, (name, file) in found.items():
        given, beta = inputs_for(file, plan, name, own)
        with output.progress(f"verifying {label}"):
            results[label] = verify_layer(file, plan, given, runtimes=runtimes, layer=name, beta=beta)
    for file in dict.fromkeys(file for _, file in found.values()):
        for finding in lint(file):
            output.say(f"{file.name}: {finding}")
    show_verifications(output, results, own_data=own is not None)
    output.result(results)
    worst = min(r.sqnr_db for rows in results.values() for r in rows)
    if min_sqnr is not None and worst < min_sqnr:
        output.say(f"missed: the worst runtime has {worst:.1f} dB, wanted {min_sqnr:.1f}")
        sys.exit(1)


def exported_graphs(plan: Plan, folder: Path) -> dict[str, tuple[str, Path]]:
    """Return layer and file of every graph in a folder, by a label for tables."""
    files = {name: folder / file for name, file in file_names(plan).items()}
    found = {name: (name, file) for name, file in files.items() if file.is_file()}
    together = folder / ALL_LAYERS
    for name in called_layers(together) if together.is_file() else ():
        found[f"{name} ({ALL_LAYERS})" if name in found else name] = (name, together)
    return found


def inputs_for(file: Path, plan: Plan, layer: str, own: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """Return what to verify a graph with: matrices, or keys if it builds L from them, and beta."""
    interface = read_interface(file, plan, layer)
    if interface.key_size is None:
        return matrices_for(plan, layer, own)
    if own is not None:
        raise InputError(f"{file} takes keys, the data has matrices; verify a graph of --input L with them")
    return stress_keys(STRESS_KEYS, plan.layer(layer).chunk, interface.key_size), None


def matrices_for(
    plan: Plan, layer: str, own: tuple[Any, Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices to verify a layer with, of a source or the stress sets, and beta if it takes it."""
    program = plan.layer(layer).program
    if own is None:
        lower = torch.cat([stress_matrices(name, 4, program.chunk) for name in STRESS])
        # Any beta that a row can have does, for the same T: the smallest one keeps |K| at 1.
        return lower, lower.abs().amax(-1).clamp(max=MAX_BETA) if program.vectors else None
    parts = []
    for name, lower, beta in open_with_beta(*own):
        if name in (layer, DEFAULT_LAYER):
            check_size(lower.shape[-1], program.chunk, layer)
            rows = needed_beta(program, lower, beta, f"beta of layer {layer!r}")
            parts.append((lower, rows))
    if not parts:
        raise InputError(f"the data has no matrices for layer {layer!r}; name an array after the layer")
    betas = [rows.reshape(-1, program.chunk) for _, rows in parts if rows is not None]
    matrices = [lower.reshape(-1, *lower.shape[-2:]) for lower, _ in parts]
    return torch.cat(matrices), torch.cat(betas) if betas else None


def show_verifications(output: Output, results: dict[str, list[Verification]], own_data: bool) -> None:
    """Print how many values agree; sqnr says something of the caller's own data only."""
    rows = [
        [
            name,
            r.runtime,
            f"{r.values - r.mismatches} of {r.values}",
            f"{r.max_steps:.3g}",
            decibels(r.sqnr_db) if own_data else "-",
            "yes" if r.exact else "no",
            ", ".join(f"{count} {types}" for types, count in r.products.items()),
        ]
        for name, verifications in results.items()
        for r in verifications
    ]
    columns = [
        "layer",
        "runtime",
        "values equal to the simulator",
        "largest difference, steps",
        "sqnr_db",
        "must be exact",
        "products",
    ]
    output.table("Verification", columns, rows)


@click.command()
@output_options
def profiles(as_json: bool, quiet: bool) -> None:
    """List the export profiles, and the runtimes that graphs can be verified on.

    \b
    Example: qinvert profiles
    """
    output = Output(as_json=as_json, quiet=quiet)
    rows = [
        [
            p.name,
            ", ".join(map(str, p.formats)),
            types_of(p),
            str(p.opset),
            ", ".join(p.proved),
            p.summary,
            p.caveats,
        ]
        for p in PROFILES.values()
    ]
    output.table("Profiles", ["profile", "formats", "types", "opset", "proved on", "form", "caveats"], rows)
    found = installed()
    runtimes = [[r.name, "installed" if r.name in found else remedy(r), r.summary] for r in RUNTIMES.values()]
    output.table("Runtimes", ["runtime", "here", "what"], runtimes)
    output.result({p.name: profile_to_dict(p) for p in PROFILES.values()})


def remedy(runtime: Runtime) -> str:
    """How to get a runtime."""
    return f"pip install {runtime.requirement}, or QINVERT_{runtime.name.upper()}_PYTHON"


def types_of(profile: Profile) -> str:
    """``int8``, or ``int8, uint8 x int8`` where products take another type from the left."""
    left = profile.left_operand
    stored = ", ".join(profile.stored)
    return stored if left is None else f"{stored}, {left.element} x {profile.storage.element}"


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """Return JSON types."""
    return {
        "formats": [fmt.name for fmt in profile.formats],
        "types": types_of(profile),
        "scales": "pow2" if profile.power_of_two_scales else "float",
        "opset": profile.opset,
        "proved": list(profile.proved),
        "summary": profile.summary,
        "caveats": profile.caveats,
    }
