"""Random plans of whole chunk steps, and adversarial inputs, states and masks, against onnxruntime."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from random_plans import NARROW, Found, joined_groups

import qinvert
from qinvert.chunk_step.form import Decay, Form
from qinvert.chunk_step.ports import BETA, INPUTS, KEY, LOG_DECAY, OUTPUT, QUERY, STATE, VALUE, step_sizes
from qinvert.errors import ExportError, InputError, PlanError, ProgramError, QInvertError, VerificationError
from qinvert.export.exporting import build, serialize
from qinvert.export.interface import GraphOutput, InputType
from qinvert.export.step_graph import step_interface
from qinvert.export.step_interface import STATE_OUT, VALID, Layout, States, StepInterface
from qinvert.export.verification.step_inputs import step_data
from qinvert.export.verification.step_reference import step_reference
from qinvert.export.verification.tolerance import is_exact
from qinvert.export.verification.verify_step import verify_step
from qinvert.formats import IntFormat
from qinvert.numerics.exponentials import near_ties
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization
from qinvert.plan.value_channels import ValueChannels
from qinvert.profiles import Profile, find_profile
from qinvert.program.program import Program
from qinvert.program.serialization import OPERATIONS
from qinvert.program.steps import MAX_BETA

Array: TypeAlias = npt.NDArray[np.float32]
#: Calls whose state the runtime hands on.
CALLS: Final = 3
#: Numbers at the ends of float32, and zeros of both signs.
EXTREMES: Final = (0.0, -0.0, 1e-42, -1e-42, 1e-38, 1e30, -1e30, 3e38, -3e38)
#: Log decays of tokens that forget nothing, and of tokens that forget everything.
LOGS: Final = (0.0, -0.0, -1e-42, -1e-3, -0.5, -8.0, -16.0, -17.0, -1e4, -3e38)
#: Gates at their ends and between them.
GATES: Final = (0.0, 1e-42, 0.5, 1.0, 1.0000001, 1.9999999, 2.0)
SHARP: Final = {BETA: GATES, LOG_DECAY: LOGS}
#: Largest magnitude of an input.
LARGEST: Final = 3e38


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """A plan of a chunk step, its graph, and what it is run on."""

    plan: Plan
    profile: str
    interface: StepInterface
    model: onnx.ModelProto
    given: dict[str, Array]


def random_step(seed: int) -> StepCase:
    """Return the first legal case of a seed whose exponentials no library decides."""
    rng = random.Random(seed)
    while True:
        profile = find_profile(rng.choice(NARROW))
        try:
            layer = random_layer(rng, profile)
            options: Any = _options(rng)
            plan = Plan(layers={"layer": layer}, target=profile.name)
            model = build(plan, **options)
        except (PlanError, ProgramError, ExportError):
            continue
        interface = step_interface(layer, options)
        given = _inputs(rng, layer, interface)
        return StepCase(plan=plan, profile=profile.name, interface=interface, model=model, given=given)


def random_layer(rng: random.Random, profile: Profile) -> LayerPlan:
    """Return a random plan of a chunk step on the formats of a profile.

    Raises
    ------
    PlanError, ProgramError
        If what was drawn does not fit together.
    """
    program = _program(rng)
    powers = profile.power_of_two_scales or rng.random() < 0.5
    channels = None
    if rng.random() < 0.3:
        size = step_sizes(program).value_size
        largest = rng.choice((3, 20, 60))
        row = tuple(rng.randint(-largest, largest) for _ in range(size))
        channels = ValueChannels(exponents=(row,))
    layer = LayerPlan(
        program=program,
        tensors=_grids(rng, program, profile.formats, powers),
        requantize=profile.requantize,
        channels=channels,
    )
    if _depends_on_libraries(layer):
        raise PlanError("an exponential of this plan lies on a tie; draw another one")
    return layer


def _program(rng: random.Random) -> Program:
    chunk = rng.choice((4, 8, 16))
    halves = rng.random() < 0.25
    size = chunk // 2 if halves else chunk
    inverse = rng.choice(
        [
            lambda: qinvert.elimination(size),
            lambda: qinvert.elimination(size, "right"),
            lambda: qinvert.block_merge(size, base=1),
            lambda: qinvert.block_merge(size, base=2, layout="masked"),
            lambda: qinvert.neumann(size, 2),
            lambda: qinvert.column_sweep(size),
            lambda: qinvert.forward_substitution(size),
        ]
    )()
    return qinvert.gated_delta_step(
        inverse,
        rng.choice((1, 4, 8)),
        rng.choice((1, 3, 8)),
        rng.choice(list(Decay)),
        rng.choice(list(Form)),
        values_first=rng.random() < 0.5,
        keys_first=rng.choice((None, True, False)),
        halves=halves,
        max_beta=rng.choice((1.0, 2.0)),
    )


def _grids(
    rng: random.Random, program: Program, formats: tuple[IntFormat, ...], power_of_two: bool
) -> dict[str, Quantization]:
    """One grid for every group, near the range of a run in floating point or far from it."""
    ranges, groups = _ranges(rng, program), joined_groups(program)
    ends = {port.name: port.tensor for port in program.outputs}
    same = {groups[ends[STATE]]: groups[STATE]}
    groups = {name: same.get(group, group) for name, group in groups.items()}
    spread, fmt = rng.choice((0.0, 0.3, 1.0, 4.0)), rng.choice(formats)
    found: dict[str, Quantization] = {}
    for group in sorted(set(groups.values())):
        largest = max(1e-6, *(ranges[name] for name, own in groups.items() if own == group))
        other = fmt if rng.random() < 0.8 else rng.choice(formats)
        scale = largest / other.largest * 10 ** rng.uniform(-spread, spread)
        scale = 2.0 ** round(np.log2(scale)) if power_of_two else float32(scale)
        found[group] = Quantization(format=other, scale=scale)
    return {name: found[groups[name]] for name in program.tensors}


def _ranges(rng: random.Random, program: Program) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)

    def observe(name: str, value: torch.Tensor) -> None:
        found[name] = max(found[name], float(value.abs().max()))

    numbers = np.random.default_rng(rng.randrange(2**32))
    values = {}
    for port in program.inputs:
        x = numbers.uniform(-1, 1, (4, *port.shape[1:]))
        x = np.abs(x) * (-0.1 if port.name == LOG_DECAY else 1) if port.name in (BETA, LOG_DECAY) else x
        values[port.name] = torch.from_numpy(x)
    program.execute(values, torch.float64, observe)
    return found


def _depends_on_libraries(layer: LayerPlan) -> bool:
    for step in layer.program.steps:
        if isinstance(step, OPERATIONS["exponential"]):
            source, result = layer.tensors[step.source], layer.tensors[step.output]
            if near_ties(source.scale, source.format, result.scale, result.format):
                return True
    return False


def _options(rng: random.Random) -> dict[str, Any]:
    return {
        "heads": rng.choice((1, 2, 3)),
        "batch": rng.choice((1, 4, 8)),
        "chunks": rng.choice((1, 1, 2, 3)),
        "layout": rng.choice(list(Layout)),
        "states": rng.choice(list(States)),
        "input_type": rng.choice(list(InputType)),
        "output": rng.choice((GraphOutput.PORTS, GraphOutput.INTEGERS)),
        "chains": 1,
    }


def _inputs(rng: random.Random, layer: LayerPlan, interface: StepInterface) -> dict[str, Array]:
    """Inputs on ties, at the ends of float32, zero, denormal, repeated, and ordinary ones."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    # The last chunk need not be whole.
    calls = CALLS if interface.hands_on else 1
    tokens = calls * interface.tokens(layer) - rng.randrange(layer.chunk)
    shapes = {name: list(shape) for name, shape in interface.inputs(layer).items()}
    shapes[VALID] = [interface.batch, tokens]
    for name in set(shapes) - {STATE, VALID}:
        shapes[name][interface.token_axis(name, layer)] = tokens
    return {name: _draw(rng, numbers, name, shapes[name], layer) for name in (*INPUTS, VALID)}


def _draw(
    rng: random.Random, numbers: np.random.Generator, name: str, shape: list[int], layer: LayerPlan
) -> Array:
    if name == VALID:
        share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0, 1.0))
        return (numbers.random(shape) < share).astype(np.float32)
    grid = layer.tensors[name]
    ties = numbers.random(shape) < rng.choice((0.0, 0.5, 1.0))
    steps = numbers.integers(grid.format.minimum - 2, grid.format.maximum + 3, shape) + 0.5 * ties
    values = steps * grid.scale * (1.0 if rng.random() < 0.6 else numbers.random(shape))
    sharp = numbers.random(shape) < rng.choice((0.0, 0.0, 0.05, 0.5, 1.0))
    values = np.where(sharp, numbers.choice(SHARP.get(name, EXTREMES), shape), values)
    low, high = {BETA: (0.0, MAX_BETA), LOG_DECAY: (-LARGEST, 0.0)}.get(name, (-LARGEST, LARGEST))
    found: Array = np.clip(values, low, high).astype(np.float32)
    return found


def compare_step(case: StepCase) -> Found:
    """Run a case call after call in onnxruntime, and compare every output with the simulation."""
    layer, profile, content = case.plan.layer(), find_profile(case.profile), serialize(case.model)
    runtimes, hint = ("onnxruntime",), "see its seed"
    try:
        results = verify_step(
            case.model, content, (layer,), case.interface, profile, case.given, runtimes, hint
        )
    except VerificationError as error:
        # Nothing is promised of float products: what they may do here is an estimate.
        promised = is_exact(profile, layer)
        return Found(values=0, mismatches=0, fault=str(error) if promised else "")
    except QInvertError as error:
        return Found(values=0, mismatches=0, fault=f"refused: {error}")
    values, mismatches = (sum(getattr(r, name) for r in results) for name in ("values", "mismatches"))
    return Found(values=values, mismatches=mismatches, fault=_simulators(case))


def _simulators(case: StepCase) -> str:
    """How `LayerPlan.step` differs from the simulation that follows calls; empty if it does not."""
    layer, ends = case.plan.layer(), case.interface
    # Between calls, integers of two planes are read as real numbers and rounded again.
    split = layer.tensors[STATE].format.planes > 1
    if ends.returns_integers or ends.takes_integers or split:
        return ""
    data = step_data(layer, ends, case.given)
    expected = step_reference(data, find_profile(case.profile), {})
    turned = {VALUE, STATE} if ends.values_first else set()
    turned |= set(step_sizes(layer.program).key_ports) if ends.keys_first else set()
    given = {name: _turned(x) if name in turned else x for name, x in data.arrays.items()}
    order = (QUERY, KEY, VALUE, LOG_DECAY, BETA, STATE)
    try:
        o, state = layer.step(*(given[name] for name in order), valid=given[VALID])
    except InputError:
        # It refuses a beta beyond the plan's grid, which a graph lets saturate.
        return "" if given[BETA].max() > layer.tensors[BETA].limit else "LayerPlan.step refuses the inputs"
    back = _turned if ends.values_first else np.asarray
    whole = np.concatenate([back(call) for call in expected.expected(OUTPUT)], axis=2)
    last = back(expected.expected(STATE_OUT)[-1])
    same = np.array_equal(o, whole) and np.array_equal(state, last)
    return "" if same else "LayerPlan.step differs from the simulation of calls"


def _turned(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(-1, -2))
