"""Compiles a graph with Apache TVM for this machine's CPU and runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import tvm
from protocol import Array, Outcome, main
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Outcome]:
    """Run on the CPU that this process has."""
    module = from_onnx(onnx.load(model), keep_params_in_input=False)
    types = products(module)
    machine = relax.VirtualMachine(relax.build(module, target="llvm"), tvm.cpu())
    names = [parameter.name for parameter in module["main"].params]
    outputs = [machine["main"](*(tvm.runtime.tensor(feed[name]) for name in names)).numpy() for feed in feeds]
    yield "llvm", outputs, types, []


def products(module: Any) -> dict[str, str]:
    """Types of the operands of every product in the imported module, by the variable it defines."""
    found = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.matmul":
                types = [str(operand.ty.dtype) for operand in call.args]
                found[binding.var.name] = " x ".join(types)
    return found


if __name__ == "__main__":
    main(run)
