"""onnxruntime on the CPU, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qinvert.export.runtimes.runtime import Execution, Feed, Runtime

if TYPE_CHECKING:
    import onnx

#: Places of the two zero points, which tell the types of a product.
ZERO_POINTS = {"MatMulInteger": (2, 3), "QLinearMatMul": (2, 5), "MatMulIntegerToFloat": (4, 5)}


def execute(content: bytes, feeds: Sequence[Feed]) -> Iterator[Execution]:
    """Run the graph unoptimized and optimized."""
    for setting, session, products in _sessions(content):
        outputs = [session.run(None, dict(feed))[0] for feed in feeds]
        yield Execution(setting=setting, outputs=outputs, products=products)


def carry(
    content: bytes, sequences: Sequence[Sequence[Feed]], carried: Mapping[str, str]
) -> Iterator[Execution]:
    """Run sequences of calls unoptimized and optimized, each call on what the one before it returned."""
    for setting, session, products in _sessions(content):
        results = [_sequence(session, calls, carried) for calls in sequences]
        yield Execution(setting=setting, outputs=(), sequences=results, products=products)


def _sequence(session: Any, calls: Sequence[Feed], carried: Mapping[str, str]) -> list[Feed]:
    names = [value.name for value in session.get_outputs()]
    results: list[Feed] = []
    state: Feed = {}
    for feed in calls:
        results.append(dict(zip(names, session.run(None, {**feed, **state}), strict=True)))
        state = {name: results[-1][output] for output, name in carried.items()}
    return results


def _sessions(content: bytes) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yield each setting, its session, and the types of its products."""
    import onnx

    for setting in ("unoptimized", "optimized"):
        with TemporaryDirectory() as folder:
            written = Path(folder) / "optimized.onnx"
            session = open_session(content, optimized=setting == "optimized", written=written)
            yield setting, session, product_types(onnx.load(written))


def open_session(
    model: bytes | str, *, optimized: bool = True, threads: int = 0, written: Path | None = None
) -> Any:
    """Open an InferenceSession on the CPU.

    ``session.qdqisint8allowed`` keeps int8 as int8: by default an x64 session
    turns int8 QDQ into uint8 for single nodes and leaves chains unfused, in
    float MatMuls.

    Parameters
    ----------
    model : bytes or str
        The serialized model, or its path; external data are found beside a file only.
    optimized : bool
        Whether the graph is optimized.
    threads : int
        Number of threads; 0 leaves it to onnxruntime.
    written : Path, optional
        File for the graph that is executed.
    """
    import onnxruntime

    options = session_options(optimized=optimized, threads=threads)
    if written is not None:
        options.optimized_model_filepath = str(written)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_options(*, optimized: bool = True, threads: int = 0) -> Any:
    """Return the SessionOptions of `open_session`."""
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def product_types(model: onnx.ModelProto) -> dict[str, str]:
    """Types of the operands of every product in a graph, by node name."""
    from onnx import numpy_helper

    elements = {tensor.name: numpy_helper.to_array(tensor).dtype.name for tensor in model.graph.initializer}
    types = {}
    for node in model.graph.node:
        if node.op_type in ZERO_POINTS:
            operands = [elements.get(node.input[at], "?") for at in ZERO_POINTS[node.op_type]]
            types[node.name] = " x ".join(operands)
        elif node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            types[node.name] = "float32"
    return types


RUNTIME = Runtime(
    name="onnxruntime",
    execute=execute,
    carry=carry,
    summary="the CPU, graph optimization off and on",
    module="onnxruntime",
    requirement="onnxruntime",
)
