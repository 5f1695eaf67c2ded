"""IREE on the CPU."""

from __future__ import annotations

from qinvert.export.runtimes.subprocesses import separate

RUNTIME = separate(
    "iree",
    summary="the CPU; int8 products of QDQ graphs, int32 ones of MatMulInteger",
    module="iree",
    requirement="iree-base-compiler[onnx] iree-base-runtime",
)
