"""Compiles and runs a graph with OpenVINO's CPU plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openvino
from protocol import Array, Outcome, main, run_calls


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Outcome]:
    """Run on the CPU.

    ``INFERENCE_PRECISION_HINT=f32``: where a product stays in floating point,
    a CPU with matrix units would take it in bfloat16.
    """
    core = openvino.Core()
    compiled = core.compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    ends = {port.get_any_name(): port for port in compiled.outputs}

    def call(feed: dict[str, Array]) -> dict[str, Array]:
        found = request.infer(feed)
        return {name: found[port].copy() for name, port in ends.items()}

    yield "CPU", run_calls(call, feeds, folder), products(compiled.get_runtime_model()), []


def products(executed: Any) -> dict[str, str]:
    """Primitive of every product, ``brgemm_avx512_amx_i8`` for instance, by its name in the ONNX graph."""
    found = {}
    for op in executed.get_ordered_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in ("MatMul", "FullyConnected"):
            original = info["originalLayersNames"].astype(str).split(",")[0] or op.get_friendly_name()
            found[original] = info["primitiveType"].astype(str)
    return found


if __name__ == "__main__":
    main(run)
