"""What `runtimes.py` times, by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import onnx
import torch
from float_graphs import float_graph, row_loop
from timing import Call

import qinvert
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.formats import INT4, INT8, INT16
from qinvert.profiles import PROFILES
from qinvert.program.ports import MATRIX
from qinvert.stress import stress_matrices

#: Matrices to calibrate on.
CALIBRATION = 64
#: Contenders whose ratios the page quotes.
DOUBLING, MASKED, ROWS = "fp32 doubling, dense", "fp32 masked merge, dense", "fp32 row loop"
SOLVE, COPY = "torch.linalg.solve_triangular fp32", "copy of the data"
#: What follows a profile's name where its graph has the other program.
ELIMINATION = ", elimination"
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting that all contenders are timed in."""

    chunk: int
    batch: int
    #: Threads of one call.
    threads: int
    #: Calls at the same time, each on its share of the batch.
    calls: int = 1

    @property
    def workers(self) -> str:
        """Threads, as a column's title."""
        return f"{self.calls} x {self.threads}" if self.calls > 1 else str(self.threads)

    def __str__(self) -> str:
        return f"C = {self.chunk}, {self.batch} matrices, threads: {self.workers}"


def onnxruntime_call(content: bytes, lower: Array, threads: int) -> Call:
    """Return a call of a graph in onnxruntime, input and output bound."""
    import onnxruntime

    session = open_session(content, threads=threads)
    binding = session.io_binding()
    given, result = (onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in (lower, np.empty_like(lower)))
    binding.bind_ortvalue_input(session.get_inputs()[0].name, given)
    binding.bind_ortvalue_output("T", result)
    return lambda: session.run_with_iobinding(binding)


def openvino_call(content: bytes, lower: Array, threads: int) -> Call:
    """Return a call of a graph in OpenVINO's CPU plugin, float32 where it does not run on integers."""
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        # Two calls at a time would be pinned to one core.
        "ENABLE_CPU_PINNING": threads > 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(content), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(lower, shared_memory=True))
    return request.infer


#: Every runtime by the module it needs.
RUNTIMES: dict[str, Callable[[bytes, Array, int], Call]] = {
    "onnxruntime": onnxruntime_call,
    "openvino": openvino_call,
}


def torch_calls(lower: torch.Tensor) -> dict[tuple[str, str], Call]:
    """Return what runs in torch, into memory that is there already."""
    eye, result = torch.eye(lower.shape[-1]).expand(lower.shape), torch.empty_like(lower)
    return {
        (COPY, "torch"): lambda: result.copy_(lower),
        (SOLVE, "torch"): lambda: torch.linalg.solve_triangular(
            lower, eye, upper=False, unitriangular=True, out=result
        ),
    }


def split(name: str) -> tuple[str, str]:
    """Return the profile of a graph's name and the suffix that stands for its program."""
    profile, comma, program = name.partition(", ")
    return profile, f"{comma}{program}"


@cache
def programs(chunk: int) -> dict[str, qinvert.Program]:
    """Return the programs that every profile exports, by the suffix of the graphs' names."""
    return {
        "": qinvert.block_merge(chunk, base=2, tile=16),
        ELIMINATION: qinvert.elimination(chunk, tile=16),
    }


@cache
def plan(chunk: int, name: str) -> qinvert.Plan:
    """Return a plan of a program for a profile."""
    profile, suffix = split(name)
    scales = "pow2" if PROFILES[profile].power_of_two_scales else "float"
    bits = next(bits for bits, fmt in ((16, INT16), (8, INT8), (4, INT4)) if fmt in PROFILES[profile].formats)
    lower, method = stress_matrices("correlated_keys", CALIBRATION, chunk), programs(chunk)[suffix]
    # What is timed is a program, whatever it reaches.
    return qinvert.calibrate(lower, method=method, bits=bits, scales=scales, target=profile, min_sqnr_db=0)


def graph(chunk: int, batch: int, name: str) -> onnx.ModelProto:
    """Return a profile's graph, or the float32 one of that name."""
    if name == DOUBLING:
        return float_graph(qinvert.neumann_doubling(chunk), batch)
    if name == MASKED:
        return float_graph(qinvert.block_merge(chunk, layout="masked"), batch)
    if name == ROWS:
        return row_loop(chunk, batch)
    return build(plan(chunk, name), profile=split(name)[0], batch=batch, input=MATRIX)


@cache
def serialized(chunk: int, batch: int, name: str) -> bytes:
    """Return the file of a graph."""
    return serialize(graph(chunk, batch, name))


def contenders(case: Case, profiles: list[str]) -> dict[tuple[str, str], Call]:
    """Return every call of a case by what computes on what."""
    if case.calls == 1:
        return _contenders(case, profiles)
    share = replace(case, batch=case.batch // case.calls, calls=1)
    shares = [_contenders(share, profiles) for _ in range(case.calls)]
    pool = ThreadPoolExecutor(case.calls)
    return {name: _together(pool, [calls[name] for calls in shares]) for name in shares[0]}


def _together(pool: ThreadPoolExecutor, calls: list[Call]) -> Call:
    return lambda: [future.result() for future in [pool.submit(call) for call in calls]]


def _contenders(case: Case, profiles: list[str]) -> dict[tuple[str, str], Call]:
    lower = stress_matrices("correlated_keys", case.batch, case.chunk, seed=1)
    calls = torch_calls(lower)
    for name in (DOUBLING, MASKED, ROWS, *(p + suffix for p in profiles for suffix in ("", ELIMINATION))):
        content = serialized(case.chunk, case.batch, name)
        for runtime, opened in RUNTIMES.items():
            # OpenVINO's compiler takes minutes for the row loop's thousand nodes.
            if find_spec(runtime) and not (name == ROWS and runtime == "openvino"):
                calls[name, runtime] = opened(content, -lower[None].numpy(), case.threads)
    return calls
