"""Compiles a graph for Hexagon, with the CPU forbidden, runs it in the emulator, and reads its cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime
import onnxruntime_qnn
from protocol import Answer, Array, main, request, run_calls

PROVIDER = "QNNExecutionProvider"
#: Element types of QNN, as its dumped graphs number them.
ELEMENTS = {
    0x0216: "float16",
    0x0232: "float32",
    0x0308: "int8",
    0x0316: "int16",
    0x0408: "uint8",
    0x0416: "uint16",
}
#: Number and name of a chip by Hexagon architecture, as onnxruntime numbers them.  Of v73 and v81 these
#: are chips whose cycles the compiler simulates.
CHIPS = {"73": ("52", "SA8255"), "75": ("57", "SM8650"), "79": ("69", "SM8750"), "81": ("72", "SA8797")}
#: How hard the compiler tries: the most.
MODE = "3"
#: What the profile calls the cycles and the ends of their range.
CYCLES = {
    "cycles": "Simulated (Accelerator exec cycles)",
    "lower": "Simulated (Accelerator exec cycles (lower estimate))",
    "upper": "Simulated (Accelerator exec cycles (upper estimate))",
}
#: What the profile calls the time of one call, at the clock that the compiler assumes.
TIME = "Simulated (Accelerator exec time us)"
#: What onnxruntime says where the CPU is forbidden and needed.
FALLBACK = "assigned to the default CPU EP"
#: What the profile calls operators without a cost.
UNCOSTED = "Missing Ops (Number of Ops with no Costs associated)"
#: Unit of what moves between the chip and its memory.
TRAFFIC_UNIT = "BYTES"


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Answer]:
    """Compile a context binary for every architecture, then run it; without feeds only what is asked for."""
    register()
    asked, keep = request(folder)
    for architecture in CHIPS:
        hardware = f"hexagon-v{architecture}"
        if not feeds and hardware not in asked:
            continue
        dump = folder / f"v{architecture}"
        dump.mkdir()
        file = folder / f"{hardware}.onnx"
        compiled(model, architecture, file, dump)
        answer: dict[str, Any] = {"kept": [file.name] if keep else []}
        if hardware in asked:
            answer["estimate"] = {"hardware": hardware, **cost(dump / "profile.csv", architecture)}
        outputs = executed(file, architecture, feeds, folder) if feeds else []
        yield f"Hexagon v{architecture}", outputs, products(dump), others(file), answer


@cache
def register() -> None:
    """Make the provider known, once for the process."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())


def options(architecture: str, extra: dict[str, str], *, whole: bool = True, **entries: str) -> Any:
    """Session options of one architecture; for a ``whole`` graph a node that Hexagon refuses is an error."""
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER][:1]
    settings = onnxruntime.SessionOptions()
    # What it would print on an error stands in the way of the one line that says why.
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(whole)))
    for key, value in entries.items():
        settings.add_session_config_entry(key.replace("__", "."), value)
    chip = {"backend_type": "htp", "soc_model": CHIPS[architecture][0], "htp_arch": architecture}
    settings.add_provider_for_devices(devices, {**chip, **extra})
    return settings


def compiled(model: Path, architecture: str, target: Path, folder: Path) -> None:
    """Write an ONNX file that wraps the context binary, and the dumped graph and profile beside it."""
    extra = {
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": str(folder),
        "htp_graph_finalization_optimization_mode": MODE,
        "profiling_level": "detailed",
        # Profiles are appended to, so that each needs a new file.
        "profiling_file_path": str(folder / "profile.csv"),
    }
    try:
        open_compiled(model, target, architecture, extra)
    except Exception as error:
        if FALLBACK not in str(error):
            raise
        refuse(model, architecture, folder)


def open_compiled(
    model: Path, target: Path, architecture: str, extra: dict[str, str], *, whole: bool = True
) -> None:
    """Compile a graph, and write the file that wraps its context binary."""
    entries = {"ep__context_enable": "1", "ep__context_file_path": str(target), "ep__context_embed_mode": "1"}
    onnxruntime.InferenceSession(str(model), options(architecture, extra, whole=whole, **entries))


def refuse(model: Path, architecture: str, folder: Path) -> NoReturn:
    """End with the names of all nodes that are left to the CPU."""
    target = folder / "parts.onnx"
    open_compiled(model, target, architecture, {}, whole=False)
    names = others(target)
    raise SystemExit(f"Hexagon v{architecture} leaves {len(names)} nodes to the CPU: {', '.join(names)}")


def executed(
    context: Path, architecture: str, feeds: list[dict[str, Array]], folder: Path
) -> list[dict[str, Array]]:
    """Return every output of every call in the emulator."""
    session = onnxruntime.InferenceSession(str(context), options(architecture, {}))
    names = [value.name for value in session.get_outputs()]
    return run_calls(lambda feed: dict(zip(names, session.run(None, feed), strict=True)), feeds, folder)


def cost(profile: Path, architecture: str) -> dict[str, Any]:
    """What the compiler's profile says of the graph, with the names of the protocol."""
    with profile.open(encoding="utf-8", newline="") as stream:
        events = list(csv.DictReader(stream))
    rows = {row["Event Identifier"]: row for row in events}
    graphs = sum(row["Event Identifier"] == CYCLES["cycles"] for row in events)
    if graphs != 1:
        raise RuntimeError(f"the compiler estimated cycles {graphs} times, for as many parts of the graph")
    chip = CHIPS[architecture][1]
    numbers = {name: int(rows[event]["Time"]) for name, event in CYCLES.items()}
    traffic = {
        event: int(row["Time"]) for event, row in rows.items() if row["Unit of Measurement"] == TRAFFIC_UNIT
    }
    source = (
        f"simulated by Qualcomm's compiler for {chip} (Hexagon v{architecture}), onnxruntime-qnn "
        f"{version('onnxruntime-qnn')}, optimization mode {MODE}; not measured"
    )
    time = {"microseconds": int(rows[TIME]["Time"])} if TIME in rows else {}
    uncosted = int(rows[UNCOSTED]["Time"])
    return {**numbers, **time, "traffic": traffic, "uncosted": uncosted, "source": source}


def products(folder: Path) -> dict[str, str]:
    """Types of every product in the dumped graph, by node."""
    found = {}
    for file in folder.glob("*.json"):
        graph = json.loads(file.read_text(encoding="utf-8")).get("graph", {"nodes": {}})
        for name, node in graph["nodes"].items():
            if node["type"] in ("MatMul", "FullyConnected"):
                types = [graph["tensors"][tensor]["data_type"] for tensor in node["input_names"][:2]]
                found[name] = " x ".join(ELEMENTS.get(number, hex(number)) for number in types)
    return found


def others(context: Path) -> list[str]:
    """Nodes outside the context binary."""
    import onnx

    nodes = onnx.load(context).graph.node
    return [node.name for node in nodes if node.op_type != "EPContext"]


if __name__ == "__main__":
    main(run)
