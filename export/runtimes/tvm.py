"""Apache TVM on the CPU."""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

RUNTIME = separate(
    "tvm",
    summary="the CPU, through LLVM; float32 products of QDQ graphs, int32 ones of MatMulInteger",
    module="tvm",
    requirement="apache-tvm onnx",
)
