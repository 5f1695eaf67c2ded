"""Where onnxruntime spends the time of a graph, node by node."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from qinvert.export.runtimes.onnxruntime_cpu import session_options


def operator_seconds(
    content: bytes, feed: dict[str, npt.NDArray[np.float32]], threads: int = 1, runs: int = 20
) -> dict[str, tuple[int, float]]:
    """Return the number of nodes and their seconds by operator of the optimized graph.

    The least time of every node over ``runs`` counts.
    """
    import onnxruntime

    with TemporaryDirectory() as folder:
        options = session_options(threads=threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    least: dict[tuple[str, str], float] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            least[key] = min(least.get(key, np.inf), 1e-6 * event["dur"])
    counts, seconds = Counter(operator for operator, _ in least), Counter[str]()
    for (operator, _), value in least.items():
        seconds[operator] += value  # type: ignore[assignment]
    return {operator: (counts[operator], value) for operator, value in seconds.most_common()}
