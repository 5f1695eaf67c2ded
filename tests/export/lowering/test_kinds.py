"""Every kind of step of a chunk step under every profile, in onnxruntime, against the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

import qinvert
from qinvert.errors import ExportError
from qinvert.export.rules.lint import lint
from qinvert.formats import INT8, INT8X2, INT16, IntFormat
from qinvert.numerics.exponentials import near_ties, safe_scale
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.profiles import PROFILES
from qinvert.program.ports import Port
from qinvert.program.program import Program
from qinvert.program.steps import (
    MOVES,
    Add,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Shape,
    Step,
    Subtract,
    Transpose,
)

COUNT = 24
INPUTS = {"a": (8, 4), "b": (8, 4), "row": (1, 4), "column": (8, 1), "number": (1, 1)}
TRIANGLE = Constant(name="triangle", rows=4, columns=4, ones=tuple((0, i + 1) for i in range(4)))
WIDE = Constant(name="wide", rows=8, columns=4, ones=tuple((i % 3, 4) for i in range(8)))
STEPS = {
    "difference": Subtract(output="y", left="a", right="b"),
    "constant added": Add(output="y", left="a", right="wide"),
    "constant subtracted": Subtract(output="y", left="a", right="wide"),
    "constant factor": MatMul(output="y", left="a", right="triangle"),
    "products": Multiply(output="y", left="a", right="b"),
    "product with a row": Multiply(output="y", left="a", right="row"),
    "product of a column": Multiply(output="y", left="column", right="a"),
    "outer product": Multiply(output="y", left="column", right="row"),
    "product with a number": Multiply(output="y", left="a", right="number"),
    "transposed": Transpose(output="y", source="a"),
    "repeated row": Mask(output="y", source="row", constant="wide"),
    "repeated column": Mask(output="y", source="column", constant="wide"),
    "exponential": Exponential(output="y", source="a"),
}
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def port(name: str, shape, tensor: str = "") -> Port:
    return Port(name=name, shape=Shape(1, *shape), tensor=tensor)


def program(step: Step) -> Program:
    """One step on the inputs that it reads, as output ``o``."""
    used = [name for name in INPUTS if name in step.inputs]
    constants = tuple(c for c in (TRIANGLE, WIDE) if c.name in step.inputs)
    fields = {"name": "kind", "chunk": 4, "constants": constants, "steps": (step,)}
    inputs = tuple(port(name, INPUTS[name]) for name in used)
    shape = Program(inputs=inputs, outputs=(port(used[0], INPUTS[used[0]]),), **fields).shapes["y"]
    return Program(inputs=inputs, outputs=(port("o", shape[1:], "y"),), **fields)


def planned(step: Step, formats, requantize, seed: int, *, pow2: bool) -> LayerPlan:
    """A plan with random scales; the inputs have `formats` in turn, the result has the last."""
    tested, rng = program(step), np.random.default_rng(seed)
    tensors = {}
    for i, name in enumerate(tested.tensors):
        fmt = formats[-1] if name == "y" else formats[i % (len(formats) - 1)]
        scale = float(np.exp(rng.normal() / 2)) / fmt.largest
        scale = 2.0 ** np.round(np.log2(scale)) if pow2 else scale
        tensors[name] = Quantization(format=fmt, scale=float32(float(scale)))
    if isinstance(step, MOVES):
        tensors["y"] = tensors[step.source]
    if isinstance(step, Exponential):
        source, result = tensors["a"].format, tensors["y"].format
        scale = 2.0 ** -(result.largest.bit_length()) if pow2 else float32(1 / result.largest)
        wanted = float32(16 / (source.largest + 1))
        narrow = not result.is_wide and result.planes == 1
        safe = safe_scale(wanted, source, scale, result) if narrow and not pow2 else wanted
        tensors = {
            "a": Quantization(format=source, scale=safe),
            "y": Quantization(format=result, scale=scale),
        }
    return LayerPlan(program=tested, tensors=tensors, requantize=requantize)


def values(plan: LayerPlan, seed: int) -> dict[str, torch.Tensor]:
    """Values over the whole grid of every input, beyond its ends, too, and its zero."""
    rng, found = np.random.default_rng(seed), {}
    negative = any(isinstance(step, Exponential) for step in plan.program.steps)
    for given in plan.program.inputs:
        size = (COUNT, *given.shape[1:])
        value = (
            0.6 * plan.tensors[given.name].limit * rng.normal(size=size) * rng.choice([0, 1, 1, 1], size=size)
        )
        found[given.name] = torch.from_numpy(-np.abs(value) if negative else value).float()
    return found


def exported(plan: LayerPlan, profile: str, path, **options):
    return qinvert.export(Plan(layers={"x": plan}, target=profile), path, batch=COUNT, **options)


def differences(plan: LayerPlan, profile: str, path, seed: int, **options) -> list[np.ndarray]:
    """Steps between graph and simulator, in an unoptimized and in an optimized session."""
    given_values = values(plan, seed)
    model = exported(plan, profile, path, **options)
    assert not lint(model, profile)
    expected = plan.execute(given_values)
    feeds = {name: value.numpy()[None] for name, value in given_values.items()}
    found = []
    for level in LEVELS:
        session_options = onnxruntime.SessionOptions()
        session_options.graph_optimization_level = level
        session_options.intra_op_num_threads = 1
        results = onnxruntime.InferenceSession(path, session_options).run(None, feeds)
        for port_, result in zip(plan.program.outputs, results, strict=True):
            scale = plan.tensors[port_.tensor].scale
            found.append(np.abs(result[0] - expected[port_.name].numpy()) / scale)
    return found


def format_choices(profile: str) -> list[tuple[IntFormat, ...]]:
    """Formats of the inputs and of the result: one for all, and mixed ones."""
    formats = PROFILES[profile].formats
    alone = [(fmt, fmt) for fmt in formats]
    if len(formats) == 1:
        return alone
    first, *_, last = formats
    return [*alone, (first, last, last), (last, first, first)]


CASES = [
    pytest.param(profile, kind, formats, id=f"{profile}-{kind}-{'+'.join(f.name for f in formats)}")
    for profile in PROFILES
    for kind, step in STEPS.items()
    for formats in format_choices(profile)
    if len(set(formats)) == 1 or not isinstance(step, MOVES)
]


@pytest.mark.parametrize(("profile", "kind", "formats"), CASES)
def test_graphs_with_powers_of_two_are_the_simulator_bit_for_bit(profile, kind, formats, tmp_path):
    rules, step = PROFILES[profile], STEPS[kind]
    plan = planned(step, formats, rules.requantize, 0, pow2=True)
    if isinstance(step, Exponential) and formats[-1].is_wide:
        pytest.skip("16-bit results of an exponential depend on the library")
    for found in differences(plan, profile, tmp_path / "x.onnx", 1):
        assert not found.any()


@pytest.mark.parametrize(
    ("profile", "kind", "formats"), [c for c in CASES if not PROFILES[c.values[0]].power_of_two_scales]
)
def test_graphs_with_any_scales_are_a_step_off_at_ties_of_16_bits_only(profile, kind, formats, tmp_path):
    rules = PROFILES[profile]
    plan = planned(STEPS[kind], formats, rules.requantize, 2, pow2=False)
    wide = any(fmt.is_wide for fmt in formats) and not rules.exact
    for found in differences(plan, profile, tmp_path / "x.onnx", 3):
        assert (found > 0.5).mean() <= (0.01 if wide else 0)
        assert found.max() < (1.5 if wide else 1e-3)


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-uint8", "int-ops", "qlinear", "qlinear-uint8"])
@pytest.mark.parametrize("kind", ["products", "difference", "constant added", "outer product"])
@pytest.mark.parametrize("spread", [1e4, 1e8])
def test_grids_far_from_each_other_stay_right(profile, kind, spread, tmp_path):
    """Kernels that fold zero points or leave int32 would be wrong by the whole grid."""
    plan = planned(STEPS[kind], (INT8, INT8), PROFILES[profile].requantize, 4, pow2=False)
    fine = plan.tensors["y"]
    plan = replace(plan, tensors={**plan.tensors, "y": replace(fine, scale=float32(fine.scale / spread))})
    for found in differences(plan, profile, tmp_path / "x.onnx", 5):
        assert found.max() < 1e-3


@pytest.mark.parametrize("profile", [name for name, p in PROFILES.items() if INT8 in p.formats])
@pytest.mark.parametrize("kind", ["constant added", "constant subtracted"])
@pytest.mark.parametrize("scale", [float32(1 / 127), 2.0**-6])
def test_a_constant_on_the_grid_of_its_partner_needs_no_product(profile, kind, scale, tmp_path):
    """As T = I + S has it: the constant is stored as the integer of 1.0."""
    if PROFILES[profile].power_of_two_scales and scale != 2.0**-6:
        pytest.skip("the profile takes powers of two only")
    plan = planned(STEPS[kind], (INT8, INT8), PROFILES[profile].requantize, 0, pow2=True)
    grid = Quantization(format=INT8, scale=scale)
    plan = replace(plan, tensors=dict.fromkeys(plan.tensors, grid))
    for found in differences(plan, profile, tmp_path / "x.onnx", 1):
        assert not found.any()
    kinds = {node.op_type for node in exported(plan, profile, tmp_path / "y.onnx").graph.node}
    assert "MatMul" not in kinds


@pytest.mark.parametrize("scales", [(2.0**-14, 2.0**-7), (float32(1 / 30000), float32(1 / 101))])
def test_a_narrower_format_survives_the_optimizer(scales, tmp_path):
    """Int16 to int8 is one pair of QuantizeLinear and DequantizeLinear, which nothing may merge."""
    step = Rescale(output="y", source="a")
    tensors = {
        "a": Quantization(format=INT16, scale=scales[0]),
        "y": Quantization(format=INT8, scale=scales[1]),
    }
    plan = LayerPlan(program=program(step), tensors=tensors, requantize=Requantize.MULTIPLIER)
    found = differences(plan, "npu-qdq-int16", tmp_path / "x.onnx", 6)
    assert not any(differences_.any() for differences_ in found)
    # Without it, values would stay on the grid of 16 bits.
    given_values = values(plan, 6)
    assert (plan.execute(given_values)["o"] - given_values["a"].clamp(-1, 1)).abs().max() > 4 * scales[0]


def test_a_wider_format_keeps_every_value(tmp_path):
    step = Rescale(output="y", source="a")
    tensors = {
        "a": Quantization(format=INT8, scale=2.0**-7),
        "y": Quantization(format=INT16, scale=2.0**-14),
    }
    plan = LayerPlan(program=program(step), tensors=tensors, requantize=Requantize.MULTIPLIER)
    for found in differences(plan, "npu-qdq-int16", tmp_path / "x.onnx", 7):
        assert not found.any()


def test_an_exponential_next_to_a_tie_is_what_the_grid_check_warns_of():
    unsafe = float32(0.0003735632635653019)
    assert near_ties(unsafe, INT16, float32(1 / 127), INT8)


def test_operators_that_a_profile_lacks_are_refused(tmp_path, monkeypatch):
    rules = PROFILES["npu-qdq-int8"]
    monkeypatch.setitem(PROFILES, rules.name, replace(rules, operators=rules.operators - {"Exp"}))
    plan = planned(STEPS["exponential"], (INT8, INT8), rules.requantize, 0, pow2=True)
    with pytest.raises(ExportError, match="is Exp, which profile 'npu-qdq-int8' does not allow"):
        exported(plan, rules.name, tmp_path / "x.onnx")


def test_two_planes_pass_through_integer_graphs(tmp_path):
    for i, step in enumerate(STEPS.values()):
        plan = planned(step, (INT8X2, INT8X2), Requantize.DIVIDE, i, pow2=False)
        if isinstance(step, Exponential):
            continue
        for found in differences(plan, "int-ops", tmp_path / f"{i}.onnx", 9):
            assert found.max() < 1e-2
