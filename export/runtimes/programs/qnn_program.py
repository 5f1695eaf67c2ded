"""Compiles a graph for Hexagon, with the CPU forbidden, and runs it in the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_qnn
from protocol import Array, Outcome, main

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
#: Chip by Hexagon architecture, as onnxruntime numbers them.
CHIPS = {"73": "60", "75": "57", "79": "69"}


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Outcome]:
    """Compile a context binary for every architecture, then run it."""
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    for architecture in CHIPS:
        dump = folder / f"v{architecture}"
        dump.mkdir()
        context = compiled(model, architecture, dump)
        session = onnxruntime.InferenceSession(context, options(architecture, {}))
        outputs = [session.run(None, feed)[0] for feed in feeds]
        yield f"Hexagon v{architecture}", outputs, products(dump), others(context)


def options(architecture: str, extra: dict[str, str], **entries: str) -> Any:
    """Session options of one architecture; a node that Hexagon refuses is an error."""
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == PROVIDER][:1]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for key, value in entries.items():
        settings.add_session_config_entry(key.replace("__", "."), value)
    chip = {"backend_type": "htp", "soc_model": CHIPS[architecture], "htp_arch": architecture}
    settings.add_provider_for_devices(devices, {**chip, **extra})
    return settings


def compiled(model: Path, architecture: str, folder: Path) -> bytes:
    """Return an ONNX file that wraps the context binary."""
    target = folder / "context.onnx"
    extra = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(folder)}
    entries = {"ep__context_enable": "1", "ep__context_file_path": str(target), "ep__context_embed_mode": "1"}
    onnxruntime.InferenceSession(str(model), options(architecture, extra, **entries))
    return target.read_bytes()


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


def others(context: bytes) -> list[str]:
    """Nodes outside the context binary."""
    import onnx

    nodes = onnx.load_from_string(context).graph.node
    return [node.name for node in nodes if node.op_type != "EPContext"]


if __name__ == "__main__":
    main(run)
