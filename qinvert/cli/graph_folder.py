"""A folder of graphs and their plan: what its files are called, and how all of them are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Unpack

from qinvert.errors import InputError
from qinvert.files import make_folder, read_bytes, write_together
from qinvert.plan.plan import Plan
from qinvert.progress import track

if TYPE_CHECKING:
    from qinvert.export.interface import Options

#: Name of the plan beside the graphs.
PLAN_FILE: Final = "plan.json"
#: Name of the file that has a function for each layer.
ALL_LAYERS: Final = "all_layers.onnx"


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
    from qinvert.export.encodings import encodings, to_bytes
    from qinvert.export.exporting import build, serialize
    from qinvert.export.step_heads import graph_layers

    names, target = file_names(plan), Path(folder)
    contents: dict[Path, bytes] = {}
    chosen = layers or graph_layers(plan)
    for name in track(chosen, "graphs", len(chosen)):
        model = build(plan, profile=profile, layer=name, **options)
        contents[target / names[name]] = serialize(model)
        if style is not None:
            contents[target / encodings_file(names[name])] = to_bytes(encodings(model, style))
    make_folder(folder)
    write_together({**contents, target / PLAN_FILE: plan.to_bytes()})
    return {name: str(target / names[name]) for name in chosen}


def export_together(
    plan: Plan,
    folder: str,
    profile: str | None = None,
    layers: tuple[str, ...] = (),
    *,
    inline: bool = False,
    **options: Unpack[Options],
) -> dict[str, str]:
    """Export the named layers (all by default) into one file; return it for each."""
    from qinvert.export.exporting import serialize
    from qinvert.export.functions import build_layers

    names = layers or tuple(plan.layers)
    model, target = build_layers(plan, profile=profile, layers=names, inline=inline, **options), Path(folder)
    make_folder(folder)
    write_together({target / ALL_LAYERS: serialize(model), target / PLAN_FILE: plan.to_bytes()})
    return dict.fromkeys(names, str(target / ALL_LAYERS))


def file_names(plan: Plan) -> dict[str, str]:
    """Return a safe, unique file name for every entry of the plan, and for every layer of heads."""
    from qinvert.export.step_heads import graph_layers

    names: dict[str, str] = {}
    taken = {ALL_LAYERS.removesuffix(".onnx")}
    for i, layer in enumerate(dict.fromkeys((*plan.layers, *graph_layers(plan)))):
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", layer).lstrip(".")[:100] or f"layer_{i}"
        tail = ""
        # Names must differ in more than case, because some file systems ignore it.
        while f"{stem}{tail}".casefold() in taken:
            tail = f"_{int(tail[1:] or i) + 1}"
        taken.add(f"{stem}{tail}".casefold())
        names[layer] = f"{stem}{tail}.onnx"
    return names


def encodings_file(graph: str) -> str:
    """Name of the encodings beside a graph."""
    return f"{graph.removesuffix('.onnx')}.encodings.json"


def exported_graphs(plan: Plan, folder: Path) -> dict[str, tuple[str, Path]]:
    """Return layer and file of every graph in a folder, by a label for tables."""
    from qinvert.export.functions import called_layers

    files = {name: folder / file for name, file in file_names(plan).items()}
    found = {name: (name, file) for name, file in files.items() if file.is_file()}
    together = folder / ALL_LAYERS
    for name in called_layers(together) if together.is_file() else ():
        found[f"{name} ({ALL_LAYERS})" if name in found else name] = (name, together)
    return found


def check_same_plan(plan: Plan, folder: Path) -> None:
    """Refuse a folder with graphs of another plan than the one beside them.

    An earlier export of other layers leaves them, and so does an export that is
    killed: the plan is renamed into place after all graphs.

    Raises
    ------
    InputError
        With the first names.
    """
    from qinvert.export.reading import parse_model

    strange = []
    for file in sorted(folder.glob("*.onnx")):
        metadata = {entry.key: entry.value for entry in parse_model(read_bytes(file), file).metadata_props}
        if metadata.get("qinvert.plan_sha256", plan.sha256) != plan.sha256:
            strange.append(file.name)
    if strange:
        names = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if strange[4:] else "")
        raise InputError(
            f"{folder}: {names} {'was' if len(strange) == 1 else 'were'} exported from another plan than its "
            f"{PLAN_FILE}; delete what is old, and export again"
        )
