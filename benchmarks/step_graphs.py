"""What `step.py` compiles: whole chunk steps with one inverse or another in them, and parts of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import onnx
import torch
from float_graphs import OPSET, FloatLowering
from npu_graphs import FLOAT16

import qinvert
from qinvert.calibration.choices import RangeRule, ScaleRule
from qinvert.calibration.chunk_steps.candidate import Layer, StepRules, exact_outputs, plan_layer
from qinvert.calibration.chunk_steps.grids import RoomRules
from qinvert.calibration.chunk_steps.observation import ChunkObserver
from qinvert.calibration.chunk_steps.widths import width_groups
from qinvert.delta_rule.chunks import DeltaChunks
from qinvert.execution.chunk_steps import run_float, run_integers
from qinvert.export.exporting import build
from qinvert.export.graph import GraphBuilder
from qinvert.formats import INT8, INT16_WHOLE
from qinvert.methods._blocks import PROVED
from qinvert.methods._builder import Builder
from qinvert.metrics import NoiseStatistics
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.profiles import find_profile
from qinvert.program.ports import Port
from qinvert.program.program import Program
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.program.steps import Axis, Constant

#: Returns a program of the inverse for chunks of some size.
Inverse: TypeAlias = Callable[[int], Program]
#: Widths of a step: all tensors have 8 bits; values and what meets them have 16.
INT8_STEP, MIXED_STEP = "8", "8/16"
#: Heads, chunks of a sequence, and the likeness of keys that plans are calibrated and measured on.
HEADS, CHUNKS, LIKENESS = 4, 8, 0.5
#: Sizes of a head of Qwen3.5.
SIZE = 128
#: Axis of heads in graphs.
HEADS_AXIS = 1
#: Layout of the graphs of tables that do not compare layouts.
LAYOUT = "channels_first"


def masked_columns(chunk: int) -> Program:
    """``S <- S + mask_j (S M)`` from the last column to the first: the cheapest forward substitution on NPUs.

    Columns that the mask drops hold partial sums, which saturate without harm.
    """
    builder = Builder(chunk)
    total = builder.rescale("column/S", builder.matrix, bound=PROVED)
    for j in range(chunk - 3, -1, -1):
        product = builder.matmul(f"column_{j}/product", total, builder.matrix, bound=PROVED)
        mask = Constant(name=f"column_mask_{j}", rows=chunk, columns=chunk, ones=((j, j + 1),) * chunk)
        column = builder.mask(f"column_{j}/new", product, mask, bound=PROVED)
        total = builder.add(f"column_{j}/S", total, column, bound=PROVED)
    return builder.program("masked_columns", {}, total)


def growing_columns(chunk: int) -> Program:
    """``S[:, j] = M[:, j] + S[:, j + 1:] M[j + 1:, j]`` from the last column to the first, at full height.

    Steps hold matrices transposed, so that S grows by a row at a time there.
    """
    builder = Builder(chunk)
    last = builder.slice("columns/M", builder.matrix, columns=(chunk - 2, chunk), bound=PROVED)
    total = builder.rescale("columns/S", last, bound=PROVED)
    for j in range(chunk - 3, -1, -1):
        column = builder.slice(f"column_{j}/M", builder.matrix, columns=(j, j + 1), bound=PROVED)
        below = builder.slice(
            f"column_{j}/below", builder.matrix, rows=(j + 1, chunk), columns=(j, j + 1), bound=PROVED
        )
        new = builder.matmul(f"column_{j}/new", total, below, add=(column,), bound=PROVED)
        total = builder.concat(f"column_{j}/S", [new, total], Axis.COLUMNS, bound=PROVED)
    return builder.program("growing_columns", {}, total)


def no_inverse(chunk: int) -> Program:
    """``S = M``: what is left of a step without an inverse. It computes another rule."""
    builder = Builder(chunk)
    lower = Constant(
        name=f"strictly_lower_{chunk}", rows=chunk, columns=chunk, ones=tuple((0, i) for i in range(chunk))
    )
    # M is strictly lower triangular: a copy would be a conversion for which there is no cost.
    return builder.program("no_inverse", {}, builder.mask("S", builder.matrix, lower, bound=PROVED))


#: Name of the inverse without which costs are known as well.
WITHOUT = "none: S = M"
ROWS, COLUMNS = "forward substitution, rows of T", "forward substitution, masked columns"
GROWING = "forward substitution, rows as stored"
OURS = "elimination"
INVERSES: dict[str, Inverse] = {
    OURS: qinvert.elimination,
    "elimination, right, radix 4": partial(qinvert.elimination, side="right", radix=4),
    "merges from 1": partial(qinvert.block_merge, base=2, layout="masked"),
    "banded, order 4, C / 4 steps": lambda chunk: qinvert.banded_residual(chunk, order=4, steps=chunk // 4),
    "Neumann doubling": qinvert.neumann_doubling,
    COLUMNS: masked_columns,
    GROWING: growing_columns,
    ROWS: qinvert.forward_substitution,
    WITHOUT: no_inverse,
}
SEQUENTIAL = (COLUMNS, GROWING, ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One graph of a chunk step for one chip."""

    chip: str
    inverse: str = OURS
    #: `INT8_STEP`, `MIXED_STEP` or float16.
    width: str = INT8_STEP
    chunk: int = 64
    heads: int = 16
    chains: int = 16
    chunks: int = 1
    layout: str = LAYOUT
    #: Whether the ends are integers.
    integers: bool = True
    #: Outputs of a part of the step; empty for all of it.
    part: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name for people who read the cache."""
        ends = "integers" if self.integers else "float32"
        sizes = f"C={self.chunk} heads={self.heads} chains={self.chains} chunks={self.chunks}"
        part = f" part={'+'.join(self.part)}" if self.part else ""
        return f"step, {self.inverse}: {self.width} {sizes} {self.layout} {ends}{part}"

    @property
    def batch(self) -> int:
        """What decides how many graphs one process compiles."""
        return self.heads

    @property
    def profile(self) -> str:
        """Export profile of the chip's vendor and of the width."""
        if self.chip.startswith("ethos"):
            return "ethos-int8"
        return "hexagon-uint16"


@cache
def program_of(inverse: str, chunk: int) -> Program:
    """Return the step with an inverse."""
    return qinvert.gated_delta_step(residuals_as_sums(INVERSES[inverse](chunk)), SIZE, SIZE)


@cache
def chunks_of(chunk: int, seed: int) -> DeltaChunks:
    """Return chunks of a few heads: keys of norm 1, half of which all tokens share, and slow decays."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, CHUNKS, chunk)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x, dim=-1)

    shared = LIKENESS**0.5 * unit(draw(1, HEADS, 1, 1, SIZE))
    k, q = (unit(shared + (1 - LIKENESS) ** 0.5 * unit(draw(*shape, SIZE))) for _ in range(2))
    return DeltaChunks(
        q=q * SIZE**-0.5,
        k=k,
        v=draw(*shape, SIZE),
        g=-0.1 * torch.rand(shape, generator=generator),
        beta=torch.rand(shape, generator=generator),
        state=torch.zeros(1, HEADS, SIZE, SIZE),
    )


@cache
def plan_of(inverse: str, chunk: int, width: str, chip: str = "hexagon-v81") -> LayerPlan:
    """Return a plan with one width of keys and one of values, whatever sqnr it has."""
    ethos = chip.startswith("ethos")
    profile = find_profile("ethos-int8" if ethos else "hexagon-uint16")
    program = program_of(inverse, chunk)
    observer = ChunkObserver(program)
    observer.update(chunks_of(chunk, 0), True)
    widths = width_groups(program)
    rules = StepRules(
        narrow=INT8,
        wide=INT16_WHOLE if not ethos else None,
        equal_widths=True,
        scales=ScaleRule.FLOAT,
        requantize=profile.requantize,
        room=RoomRules(),
    )
    layer = Layer(
        program=program,
        observed=observer.observed(),
        widths=widths,
        rules=rules,
        max_beta=1.0,
        truth=exact_outputs(chunks_of(chunk, 0)),
    )
    return plan_layer(layer, tuple(widths.value_groups) if width == MIXED_STEP else (), None, RangeRule.MAX)


@cache
def decibels(inverse: str, chunk: int, width: str) -> tuple[float, float]:
    """Sqnr of o and of the last state against the rule in float64, free-running over `CHUNKS` chunks."""
    given, exact = chunks_of(chunk, 1), program_of(OURS, chunk)
    truth = run_float(exact, given, torch.float64)
    if width == FLOAT16:
        found = run_float(program_of(inverse, chunk), given, torch.float16)
    else:
        found = run_integers(plan_of(inverse, chunk, width), given)
    values = []
    for name in ("out", "state"):
        noise = NoiseStatistics()
        noise.update(getattr(found, name).double(), getattr(truth, name))
        values.append(noise.sqnr_db)
    return values[0], values[1]


def model_of(case: Case) -> onnx.ModelProto:
    """Build the graph of a case.

    Raises
    ------
    QInvertError
        If the target cannot express it.
    """
    if case.width == FLOAT16:
        return half_step(program_of(case.inverse, case.chunk), case.heads, case.chains)
    layer = plan_of(case.inverse, case.chunk, case.width, case.chip)
    if case.part:
        part = LayerPlan(
            program=part_of(layer.program, case.part), tensors=_read(layer, case), requantize=layer.requantize
        )
        plan = Plan(layers={"step": part}, target=case.profile)
        ends = {"input": "ports", "input_type": "integers", "output": "integers"}
        return build(plan, batch=case.heads, chains=case.chains, **ends)
    plan = Plan(layers={"step": layer}, target=case.profile)
    ends = {"input_type": "integers", "output": "integers"} if case.integers else {}
    sizes = {"heads": case.heads, "chunks": case.chunks, "chains": case.chains}
    return build(plan, layout=case.layout, **sizes, **ends)


def _read(layer: LayerPlan, case: Case) -> Mapping[str, object]:
    tensors = part_of(layer.program, case.part).tensors
    return {name: layer.tensors[name] for name in tensors}


def part_of(program: Program, outputs: Sequence[str]) -> Program:
    """Return what makes some tensors of a program, and nothing else."""
    wanted = set(outputs)
    for step in reversed(program.steps):
        if step.output in wanted:
            wanted.update(step.inputs)
    return Program(
        name="part_of_a_step",
        chunk=program.chunk,
        parameters={},
        inputs=tuple(port for port in program.inputs if port.name in wanted),
        outputs=tuple(Port(name=name, shape=program.shapes[name], tensor=name) for name in outputs),
        constants=tuple(constant for constant in program.constants if constant.name in wanted),
        steps=tuple(step for step in program.steps if step.output in wanted),
    )


def half_step(program: Program, heads: int, chains: int = 1) -> onnx.ModelProto:
    """Return a chunk step in float16, all ends ``[1, heads, rows, columns]``, heads in independent parts."""
    size = heads // chains
    each, graph = GraphBuilder(), GraphBuilder()
    inputs = {port.name: [size, *port.shape[1:]] for port in program.inputs}
    given = {name: each.input(name, [1, *sizes], "float16") for name, sizes in inputs.items()}
    results = program.evaluate(FloatLowering(program, size, each, "float16"), given)
    for name, (_, *sizes) in inputs.items():
        graph.input(name, [1, heads, *sizes], "float16")
    parts: dict[str, list[str]] = {name: [] for name in results}
    for i in range(chains):
        cuts = {name: _cut(graph, name, i, [1, *sizes]) for name, sizes in inputs.items()}
        graph.inline(each, f"chain_{i}/", cuts)
        for name, tensor in results.items():
            parts[name].append(f"chain_{i}/{tensor}")
    for port in program.outputs:
        shape = [1, heads, *port.shape[1:]]
        name = f"{port.name}_out"
        graph.output(graph.node("Concat", parts[port.name], name, shape, "float16", axis=HEADS_AXIS))
    return graph.model(program.name, OPSET, {}, program.title)


def _cut(graph: GraphBuilder, name: str, index: int, shape: Sequence[int]) -> str:
    import numpy as np

    edges = [index * shape[HEADS_AXIS], (index + 1) * shape[HEADS_AXIS], HEADS_AXIS]
    indices = [graph.initializer(f"indices/{edge}", np.array([edge], dtype=np.int64)) for edge in edges]
    return graph.node("Slice", [name, *indices], f"{name}/chain_{index}", list(shape), "float16")
