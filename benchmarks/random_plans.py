"""Random plans of any method, format, scales and profile, and adversarial L, against onnxruntime."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto, helper

import qinvert
from qinvert.errors import ExportError, PlanError, ProgramError, QInvertError
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.verification.reach import reach
from qinvert.export.verification.runs import feeds
from qinvert.export.verification.tolerance import NOISE, is_exact
from qinvert.formats import IntFormat
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.profiles import PROFILES, find_profile
from qinvert.program.ports import BETA
from qinvert.program.program import Program
from qinvert.program.steps import MOVES
from qinvert.systems import Systems


def multiplies_exactly() -> bool:
    """Whether this processor multiplies uint8 by int8 exactly.

    x86 without VNNI saturates sums of two such products at 16 bits.
    """
    values = {"a": np.full((4, 16), 255, np.uint8), "b": np.full((16, 4), 127, np.int8)}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in values.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.INT32, (4, 4))
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "product", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    (found,) = open_session(model.SerializeToString(), threads=1).run(None, values)
    return bool((found == 16 * 255 * 127).all())


#: Profile whose products are uint8 by int8.
MIXED: Final = "int-ops-x86"
#: Profiles whose formats are 8 bits: of 16 bits nothing is promised bit for bit.
NARROW: Final = tuple(
    name
    for name, profile in PROFILES.items()
    if profile.formats[0].container_bits == 8 and (name != MIXED or multiplies_exactly())
)
#: Matrices of one call, and calls of one session: opening a session costs more than a call.
BATCH: Final = 64
CALLS: Final = 4
#: Largest matrices of sequential methods: onnxruntime takes minutes to open their graphs beyond.
MAX_SEQUENTIAL: Final = 8


#: Largest graph in bytes: onnxruntime takes half a minute and more to open larger ones.
MAX_GRAPH: Final = 500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan, its profile, its graph for all systems, and these systems."""

    plan: Plan
    content: bytes
    profile: str
    systems: Systems


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What two runs of onnxruntime made of a case."""

    values: int
    mismatches: int
    fault: str


def random_case(seed: int) -> Case:
    """Return the first legal plan of a seed: some draws fit no profile."""
    rng = random.Random(seed)
    while True:
        profile = find_profile(rng.choice(NARROW))
        chunk = rng.choice((4, 8, 16, 32))
        try:
            program = _program(rng, chunk)
            layer = LayerPlan(
                program=program,
                tensors=_grids(rng, program, profile.formats, profile.power_of_two_scales),
                requantize=rng.choice(list(Requantize)),
            )
            plan = Plan(layers={"layer": layer}, target=profile.name)
            content = serialize(build(plan, batch=BATCH))
        except (PlanError, ProgramError, ExportError):
            continue
        if len(content) > MAX_GRAPH:
            continue
        return Case(plan=plan, content=content, profile=profile.name, systems=_systems(rng, layer))


def _program(rng: random.Random, chunk: int) -> Program:
    base = rng.choice([size for size in (1, 2, 4, 8, 16) if size <= chunk])
    short = min(chunk, MAX_SEQUENTIAL)
    return rng.choice(
        [
            lambda: qinvert.block_merge(chunk, base=base),
            lambda: qinvert.block_merge(chunk, base=base, layout="masked", corrections=1),
            lambda: qinvert.block_merge(chunk, base=base, factored=True),
            lambda: qinvert.elimination(chunk),
            lambda: qinvert.banded_residual(chunk, rng.choice((2, 3)), rng.choice((2, 4))),
            lambda: qinvert.neumann(chunk, rng.choice((1, 2, 3))),
            lambda: qinvert.neumann_doubling(chunk),
            lambda: qinvert.newton_schulz(chunk, 2),
            lambda: qinvert.column_sweep(short),
            lambda: qinvert.forward_substitution(short),
        ]
    )()


def joined_groups(program: Program) -> dict[str, str]:
    """Return for every tensor one of those that moves connect with it, which share its grid."""
    parents = {name: name for name in program.tensors}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    for step in program.steps:
        if isinstance(step, MOVES):
            for name in step.inputs:
                if name in parents:
                    parents[root(name)] = root(step.output)
    return {name: root(name) for name in parents}


def _grids(
    rng: random.Random, program: Program, formats: tuple[IntFormat, ...], power_of_two: bool
) -> dict[str, Quantization]:
    """One grid for every group of tensors that moves connect, with scales from close to far apart."""
    groups = joined_groups(program)
    spread = rng.choice((0.0, 0.3, 1.0, 3.0, 6.0))
    rounded = power_of_two or rng.random() < 0.3
    fmt = rng.choice(formats)
    # 1 / k means 1.0 exactly, as residual terms that join as integers need it.
    one = rng.choice((1 / 127, 1 / 128, 1 / 64, 1 / 100))
    found = {}
    for name in program.tensors:
        group = groups[name]
        if group not in found:
            scale = one if spread == 0 else one * 10 ** rng.uniform(-spread, spread)
            scale = 2.0 ** round(np.log2(scale)) if rounded else float32(scale)
            other = fmt if rng.random() < 0.8 else rng.choice(formats)
            found[group] = Quantization(format=other, scale=scale)
    return {name: found[groups[name]] for name in program.tensors}


def _systems(rng: random.Random, layer: LayerPlan) -> Systems:
    """L that is random, sits on ties, saturates, vanishes, or is denormal, with every sign."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    chunk, scale = layer.chunk, layer.input.scale
    steps = numbers.integers(-130, 131, (CALLS, BATCH, chunk, chunk)).astype(np.float64)
    steps[:, : BATCH // 4] += 0.5
    steps[:, BATCH // 4 : BATCH // 2] *= numbers.random((CALLS, BATCH // 4, 1, 1))
    steps[:, BATCH // 2] *= 1e6
    steps[:, BATCH // 2 + 1] = 0.0
    steps[:, BATCH // 2 + 2] *= 1e-42 / scale
    lower = torch.from_numpy(np.tril(steps * scale, -1).astype(np.float32)).flatten(0, 1)
    if not layer.program.inverse_ports.factored:
        return Systems(lower=lower)
    beta = torch.from_numpy(numbers.uniform(1e-3, 2.0, (CALLS * BATCH, chunk)).astype(np.float32))
    return Systems(lower=lower * beta.unsqueeze(-1), beta=beta)


def compare(case: Case) -> Found:
    """Run a case unoptimized and optimized, and compare every value with the simulator."""
    layer, systems = case.plan.layer(), case.systems
    try:
        expected = layer.inverse(systems.lower, systems.beta).numpy()
    except QInvertError as error:
        return Found(values=0, mismatches=0, fault=f"the simulator refuses L: {error}")
    inputs = {"L": systems.lower}
    if systems.beta is not None:
        inputs[BETA] = systems.beta[..., None]
    values, mismatches, fault = 0, 0, ""
    for optimized in (False, True):
        session = open_session(case.content, optimized=optimized, threads=1)
        found = np.concatenate([session.run(None, feed)[0][0] for feed in feeds(inputs, BATCH)])
        steps = np.abs(found.astype(np.float64) - expected) / _unit(layer, systems)
        counted = steps != 0 if is_exact(find_profile(case.profile), layer) else ~(steps < NOISE)
        values, mismatches = values + steps.size, mismatches + int(counted.sum())
        fault = fault or _fault(case, steps, counted, optimized)
    return Found(values=values, mismatches=mismatches, fault=fault)


def _unit(layer: LayerPlan, systems: Systems) -> npt.NDArray[np.float64]:
    unit = np.full((systems.count, 1, 1), layer.output.scale)
    return unit if systems.beta is None else unit * systems.beta.numpy()[..., None]


def _fault(
    case: Case, steps: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_], optimized: bool
) -> str:
    if not counted.any():
        return ""
    how = "optimized" if optimized else "unoptimized"
    said = f"{how}: {int(counted.sum())} of {steps.size} differ by up to {float(np.nanmax(steps)):.3g} steps"
    if is_exact(find_profile(case.profile), case.plan.layer()):
        return said
    rows = np.flatnonzero(counted.any(axis=(1, 2)))
    reached = reach(case.plan.layer(), case.systems[torch.from_numpy(rows)])
    beyond = counted[rows] & ~((reached > 0) & (steps[rows] < reached + 0.5))
    return f"{said}, {int(beyond.sum())} beyond reach" if beyond.any() else ""
