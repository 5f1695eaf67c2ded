"""Compiles a graph with IREE for this machine's CPU and runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import iree.runtime
from iree.compiler import tools
from protocol import Array, Outcome, main

#: After this phase of the compiler quantized products are fused; later ones tile them.
PHASE = "global-optimization"
OPTIONS = (
    "--iree-hal-target-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
    "--iree-input-type=onnx",
)
#: What contracts two tensors: a named operation, or a generic one with a reduction.
PRODUCT = re.compile(
    r"(%\S+) = linalg\.(?:\w*matmul\w*|generic \{[^}]*\"reduction\"[^}]*\})"
    r" ins\(%\S+, %\S+ : (tensor<[^>]*>), (tensor<[^>]*>)\)"
)
ELEMENTS = {"i8": "int8", "i16": "int16", "i32": "int32", "f32": "float32"}


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Outcome]:
    """Run on the CPU that this process has."""
    imported, compiled, phases = folder / "model.mlir", folder / "model.vmfb", folder / "phases"
    subprocess.run(
        [sys.executable, "-m", "iree.compiler.tools.import_onnx", model, "-o", imported], check=True
    )
    options = [*OPTIONS, f"--dump-compilation-phases-to={phases}"]
    try:
        tools.compile_file(str(imported), output_file=str(compiled), extra_args=options)
    except tools.CompilerToolError as error:
        # The last lines are the command and a hint; the reason stands above them.
        raise SystemExit(next(line for line in str(error).splitlines() if "error:" in line)) from None
    module = iree.runtime.load_vm_flatbuffer_file(str(compiled), driver="local-task")
    (name,) = [name for name in module.vm_module.function_names if not name.endswith(("$async", "__init"))]
    outputs = [module[name](*feed.values()).to_host() for feed in feeds]
    (optimized,) = phases.glob(f"*.{PHASE}.mlir")
    yield "llvm-cpu", outputs, products(optimized.read_text(encoding="utf-8")), []


def products(code: str) -> dict[str, str]:
    """Types of the operands of every product in the compiler's code, by the value it defines."""
    return {name: f"{element(left)} x {element(right)}" for name, left, right in PRODUCT.findall(code)}


def element(tensor: str) -> str:
    """Element type of ``tensor<128x4x4xi8>``."""
    kind = tensor.removeprefix("tensor<").removesuffix(">").rsplit("x", 1)[-1]
    return ELEMENTS.get(kind, kind)


if __name__ == "__main__":
    main(run)
