"""Runtimes in processes of their own hand a state from call to call: their programs, and real toolkits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from step_plans import small_plan

import qinvert
from qinvert.chunk_step.gated_delta_step import gated_delta_step
from qinvert.errors import VerificationError
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import RUNTIMES, execute_sequences, installed, onnxruntime_cpu, subprocesses
from qinvert.export.step_graph import step_interface
from qinvert.export.verification.step_samples import step_samples
from qinvert.export.verification.verify_step import own_tolerance
from qinvert.plan.plan import Plan

#: A program as toolkits have one, of onnx's own evaluator.
TOY = """
import sys
sys.path.insert(0, {programs!r})
import onnxruntime
from protocol import main, run_calls


def run(model, feeds, folder):
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    outputs = run_calls(lambda feed: dict(zip(names, session.run(None, feed))), feeds, folder)
    yield "toy", outputs, {{}}, []


main(run)
"""
ENDS = {"input_type": "integers", "output": "integers"}
SIZES = {"heads": 2, "layout": "channels_first", **ENDS}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A runtime whose program is written here."""
    text = TOY.format(programs=str(subprocesses.PROGRAMS))
    (tmp_path / "toy_program.py").write_text(text)
    monkeypatch.setattr(subprocesses, "PROGRAMS", tmp_path)
    runtime = subprocesses.separate("toy", "a toy", "onnxruntime", "onnxruntime", carries=True)
    monkeypatch.setitem(RUNTIMES, "toy", runtime)
    return runtime


def sequences_of(plan, calls=3, count=2):
    layer = plan.layer()
    interface = step_interface(layer, SIZES)
    rng = np.random.default_rng(0)

    def feed(first):
        names = interface.inputs(layer)
        made = {
            name: rng.integers(-40, 40, shape).astype(np.int8)
            for name, shape in names.items()
            if first or name != "state"
        }
        return made | {"g": -np.abs(made["g"])}

    return [[feed(i == 0) for i in range(calls)] for _ in range(count)]


def test_a_program_hands_on_what_the_runtime_in_this_process_does(toy):
    plan = small_plan("npu-qdq-int8", pow2=True)
    content = serialize(build(plan, **SIZES))
    sequences = sequences_of(plan)
    carried = {"state_out": "state"}
    (found,) = execute_sequences("toy", content, sequences, carried)
    *_, wanted = onnxruntime_cpu.carry(content, sequences, carried)
    assert [len(calls) for calls in found.sequences] == [3, 3]
    for calls, others in zip(found.sequences, wanted.sequences, strict=True):
        for call, other in zip(calls, others, strict=True):
            assert set(call) == {"o", "state_out"}
            assert all(np.array_equal(call[name], other[name]) for name in call)


def test_every_sequence_starts_from_its_own_state(toy):
    plan = small_plan("npu-qdq-int8", pow2=True)
    content = serialize(build(plan, **SIZES))
    sequences = sequences_of(plan)
    (both,) = execute_sequences("toy", content, sequences, {"state_out": "state"})
    (second,) = execute_sequences("toy", content, sequences[1:], {"state_out": "state"})
    assert np.array_equal(both.sequences[1][2]["o"], second.sequences[0][2]["o"])


def test_a_program_that_carries_nothing_returns_its_first_output(toy):
    plan = small_plan("npu-qdq-int8", pow2=True)
    content = serialize(build(plan, **SIZES))
    feed = sequences_of(plan, calls=1, count=1)[0]
    (found,) = toy.execute(content, feed)
    assert found.outputs[0].shape == (1, 2, 12, 16)


def planned(bits):
    """A plan whose widths Hexagon takes: equal ones where elements meet."""
    from qinvert.calibration.choices import RangeRule, ScaleRule
    from qinvert.calibration.chunk_steps.candidate import Layer, StepRules, exact_outputs, plan_layer
    from qinvert.calibration.chunk_steps.grids import RoomRules
    from qinvert.calibration.chunk_steps.observation import ChunkObserver
    from qinvert.calibration.chunk_steps.widths import width_groups
    from qinvert.delta_rule.chunks import DeltaChunks
    from qinvert.formats import INT8, INT16_WHOLE
    from qinvert.plan.quantization import Requantize

    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)

    shape = (1, 2, 8, 16)
    chunks = DeltaChunks(
        q=unit(*shape, 32) * 32**-0.5,
        k=unit(*shape, 32),
        v=torch.randn(*shape, 32, generator=generator),
        g=-0.1 * torch.rand(shape, generator=generator),
        beta=torch.rand(shape, generator=generator),
        state=torch.zeros(1, 2, 32, 32),
    )
    program = gated_delta_step(qinvert.residuals_as_sums(qinvert.elimination(16)), 32, 32)
    observer = ChunkObserver(program)
    observer.update(chunks, True)
    widths = width_groups(program)
    rules = StepRules(
        narrow=INT8,
        wide=INT16_WHOLE,
        equal_widths=True,
        scales=ScaleRule.FLOAT,
        requantize=Requantize.MULTIPLIER,
        room=RoomRules(),
    )
    layer = Layer(
        program=program,
        observed=observer.observed(),
        widths=widths,
        rules=rules,
        max_beta=1.0,
        truth=exact_outputs(chunks),
    )
    wide = tuple(widths.value_groups) if bits == 16 else ()
    return plan_layer(layer, wide, None, RangeRule.MAX), chunks


def given(chunks):
    flat = {name: getattr(chunks, name).flatten(2, 3) for name in ("q", "k", "v", "beta", "g")}
    turned = {name: flat[name].mT for name in ("q", "k", "v")}
    return {**flat, **turned, "state": chunks.state.mT}


@pytest.mark.parametrize("bits", [8, 16])
def test_qnn_runs_steps_on_every_architecture_with_native_products_alone(tmp_path, bits):
    if "qnn" not in installed():
        pytest.skip("pip install onnxruntime onnxruntime-qnn onnx, or set QINVERT_QNN_PYTHON")
    layer, chunks = planned(bits)
    plan = Plan(layers={"layer": layer}, target="hexagon-uint16")
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    results = qinvert.verify(tmp_path / "step.onnx", plan, given(chunks), runtimes=("qnn",))
    names = [f"qnn (Hexagon v{n}) {output}" for n in (73, 75, 79, 81) for output in ("o", "state_out")]
    assert [result.runtime for result in results] == names
    # All outputs of 8 chunks, and of every one the values that a processor's own rounding allows.
    assert {result.values for result in results} == {8 * 2 * 32 * 16, 8 * 2 * 32 * 32}
    kinds = {"uint8 x uint8", "uint16 x uint8"}
    assert all(set(result.products) <= kinds and not result.elsewhere for result in results)
    assert all(result.max_steps <= 4 * result.allowed_steps for result in results)


def test_openvino_runs_steps_and_differs_in_nothing_with_powers_of_two(tmp_path):
    if "openvino" not in installed():
        pytest.skip("pip install openvino, or set QINVERT_OPENVINO_PYTHON")
    plan = small_plan("npu-qdq-int8", pow2=True)
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    samples = step_samples(plan.layer(), step_interface(plan.layer(), SIZES), 8)
    results = qinvert.verify(tmp_path / "step.onnx", plan, samples, runtimes=("openvino",))
    assert [result.runtime for result in results] == ["openvino (CPU) o", "openvino (CPU) state_out"]
    assert all(result.exact and result.mismatches == 0 for result in results)


def test_a_processor_with_its_own_rounding_may_not_lose_the_state(toy, monkeypatch, tmp_path):
    own = replace(toy, own_steps=2)
    monkeypatch.setitem(RUNTIMES, "toy", own)
    layer, chunks = planned(8)
    plan = Plan(layers={"layer": layer}, target="hexagon-uint16")
    qinvert.export(plan, tmp_path / "step.onnx", **SIZES)
    assert len(qinvert.verify(tmp_path / "step.onnx", plan, given(chunks), runtimes=("toy",))) == 2

    def forgets(content, sequences, carried):
        yield from own.carry(content, [[{**calls[0], **c} for c in calls] for calls in sequences], {})

    monkeypatch.setitem(RUNTIMES, "toy", replace(own, carry=forgets))
    with pytest.raises(VerificationError, match="toy"):
        qinvert.verify(tmp_path / "step.onnx", plan, given(chunks), runtimes=("toy",))


def test_own_rounding_is_bounded_in_real_units_whatever_the_width():
    narrow, wide = own_tolerance(False), own_tolerance(True)
    assert wide.steps == 256 * narrow.steps
    assert not narrow.allows(values=1000, mismatches=1000, beyond=0, max_steps=100)
    assert not narrow.allows(values=1000, mismatches=1000, beyond=100, max_steps=20)
    assert narrow.allows(values=1000, mismatches=1000, beyond=50, max_steps=20)
