"""A program with three inputs and two outputs, some rectangular, through every interpreter."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import qinvert
from qinvert.calibration.observation.ranges import RangeObserver
from qinvert.errors import ExportError, InputError, PlanError, ProgramError
from qinvert.formats import INT8, INT8X2, INT16
from qinvert.kernels.generator import integer_kernel
from qinvert.kernels.tiles import UnsupportedError
from qinvert.numerics.scales import float32
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import Meaning, Port
from qinvert.program.program import Program
from qinvert.program.steps import Add, MatMul, Rescale, Shape, Slice

ROWS, WIDTH = 8, 4
NAMES = ("a", "b", "state")


def port(name: str, rows: int, columns: int, tensor: str = "") -> Port:
    return Port(name=name, shape=Shape(1, rows, columns), tensor=tensor)


def step_like(**changes) -> Program:
    """``o = P P + P`` of ``P = a b``, and ``state <- o state + 0.3183 state``: two ports share a name."""
    fields = {
        "name": "step_like",
        "chunk": ROWS,
        "inputs": (port("a", ROWS, WIDTH), port("b", WIDTH, ROWS), port("state", ROWS, WIDTH)),
        "outputs": (port("o", ROWS, ROWS), port("state", ROWS, WIDTH, "state/new")),
        "steps": (
            MatMul(output="P", left="a", right="b", bound=1.0),
            MatMul(output="o", left="P", right="P", add=("P",)),
            MatMul(output="read", left="o", right="state"),
            Rescale(output="kept", source="state", factor=float32(0.3183)),
            Add(output="state/new", left="read", right="kept"),
        ),
    }
    return Program(**fields | changes)


def inputs(count: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (ROWS, WIDTH), "b": (WIDTH, ROWS), "state": (ROWS, WIDTH)}
    return {n: 0.8 * (torch.rand(2, count, *s, generator=generator) - 0.5) for n, s in shapes.items()}


def planned(requantize: Requantize, fmt=INT8, program: Program | None = None) -> LayerPlan:
    program = step_like() if program is None else program
    # 1.0 is an integer of P's grid, so that its residual term can be one of the accumulator.
    scales = {name: float32(1 / (0.75 * fmt.largest)) for name in program.tensors}
    if "P" in scales:
        scales["P"] = scales["o"] = float32(1 / (fmt.largest // 2))
    tensors = {n: Quantization(format=fmt, scale=s) for n, s in scales.items()}
    return LayerPlan(program=program, tensors=tensors, requantize=requantize)


FORMS = [
    (Requantize.MULTIPLIER, INT8),
    (Requantize.MULTIPLIER, INT16),
    (Requantize.DIVIDE, INT8),
    (Requantize.DIVIDE, INT8X2),
]
forms = pytest.mark.parametrize(("requantize", "fmt"), FORMS, ids=lambda v: str(v))


def test_floating_execution_and_observation():
    given, seen = inputs(), {}
    found = step_like().execute(given, dtype=torch.float64, observe=seen.__setitem__)
    a, b, state = (given[name].double() for name in NAMES)
    product = a @ b
    o = product @ product + product
    assert torch.allclose(found["o"], o)
    assert torch.allclose(found["state"], o @ state + float32(0.3183) * state)
    assert list(seen) == list(step_like().tensors)
    observer = RangeObserver(step_like())
    observer.update({name: x.reshape(-1, *x.shape[-2:]) for name, x in given.items()})
    assert observer.ranges["o"] == pytest.approx(float(o.abs().max()), rel=1e-5)
    assert observer.ranges["state"] == float(given["state"].abs().max())


@forms
def test_integer_simulation_is_near_the_real_values(requantize, fmt):
    plan, given = planned(requantize, fmt), inputs()
    exact = step_like().execute(given, dtype=torch.float64)
    found = plan.execute(given)
    for name, values in exact.items():
        assert found[name].shape == values.shape
        error = float((found[name] - values).abs().max())
        assert 0 < error <= 8 * plan.output.scale


@forms
def test_no_integer_leaves_its_interval(requantize, fmt):
    from qinvert.execution.simulator import evaluate
    from qinvert.proof.intervals import propagate

    plan, given = planned(requantize, fmt), inputs(200)
    flat = {name: x.reshape(-1, *x.shape[-2:]) for name, x in given.items()}
    ends, seen = {}, {}
    propagate(plan, {"a": 0.4, "b": 0.4}, lambda name, low, high: ends.update({name: (low, high)}))
    evaluate(plan, flat, seen.__setitem__)
    assert set(ends) == set(seen) == set(plan.program.tensors)
    for name, (low, high) in ends.items():
        assert (seen[name] >= low).all()
        assert (seen[name] <= high).all()
    # Nothing was promised of the state: its whole grid is propagated.
    assert ends["state"][1].max() == fmt.maximum
    assert ends["a"][1].max() < fmt.maximum


def test_the_proof_counts_every_tensor_and_refuses_unknown_limits():
    plan = planned(Requantize.MULTIPLIER)
    proof = plan.proof({"a": 0.5})
    groups = (proof.cannot_saturate, proof.covered, proof.may_saturate, proof.partial, proof.unproved)
    assert sorted(name for group in groups for name in group) == sorted(plan.program.tensors)
    assert "|a| <= 0.5" in str(proof)
    with pytest.raises(PlanError, match="limit of 'c', which is not an input; the program takes a, b, state"):
        plan.proof({"c": 1.0})


def test_cost_and_table():
    program = step_like()
    cost = program.cost()
    assert (cost.macs, cost.matmuls, cost.depth) == (8 * 4 * 8 + 8**3 + 8 * 8 * 4, 3, 3)
    assert str(program).endswith(f"o = o, state = state/new: {cost}")
    assert planned(Requantize.MULTIPLIER).cost() > cost.macs


@forms
def test_plans_are_saved_and_loaded(requantize, fmt, tmp_path):
    layer = planned(requantize, fmt)
    plan = Plan(layers={"step": layer}, target="int-ops")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert '"schema_version": 2' in (tmp_path / "plan.json").read_text()
    for name, values in again.layer().execute(inputs()).items():
        assert torch.equal(values, layer.execute(inputs())[name])


EXPORTS = [
    ("npu-qdq-int8", Requantize.MULTIPLIER, INT8),
    ("npu-qdq-uint8", Requantize.MULTIPLIER, INT8),
    ("qlinear", Requantize.MULTIPLIER, INT8),
    ("int-ops", Requantize.MULTIPLIER, INT8),
    ("int-ops", Requantize.DIVIDE, INT8X2),
    ("int-ops", Requantize.DIVIDE, INT8),
]


def feeds(given: dict[str, torch.Tensor], batch: int) -> dict[str, np.ndarray]:
    return {n: x.reshape(-1, *x.shape[-2:])[:batch][None].numpy() for n, x in given.items()}


@pytest.mark.parametrize(("profile", "requantize", "fmt"), EXPORTS)
def test_graphs_return_what_the_simulator_says(profile, requantize, fmt, tmp_path):
    plan, batch = planned(requantize, fmt), 10
    model = qinvert.export(Plan(layers={"x": plan}, target=profile), tmp_path / "x.onnx", batch=batch)
    assert [value.name for value in model.graph.input] == list(NAMES)
    assert [value.name for value in model.graph.output] == ["o", "state_out"]
    given = feeds(inputs(), batch)
    if profile.startswith("npu"):
        found = onnxruntime.InferenceSession(tmp_path / "x.onnx").run(None, given)
        share = 1e-3  # float scales: a tie may fall on the other side
    else:
        found, share = ReferenceEvaluator(model).run(None, given), 0.0
    expected = plan.execute(inputs())
    for values, name in zip(found, expected, strict=True):
        wanted = expected[name].reshape(-1, *expected[name].shape[-2:])[:batch].numpy()
        assert (values[0] != wanted).mean() <= share


def test_a_graph_returns_integers_with_the_scale_of_every_output(tmp_path):
    plan = planned(Requantize.MULTIPLIER)
    path = tmp_path / "x.onnx"
    model = qinvert.export(Plan(layers={"x": plan}, target="qlinear"), path, batch=10, output="integers")
    found = ReferenceEvaluator(model).run(None, feeds(inputs(), 10))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    for values, name, port in zip(found, ("o", "state_out"), plan.program.outputs, strict=True):
        scale = float(facts[f"qinvert.output_scale/{name}"])
        assert scale == plan.tensors[port.tensor].scale
        wanted = plan.execute(inputs())[port.name].reshape(10, *port.shape[1:]).numpy()
        assert values.dtype == np.int8
        assert np.array_equal(values[0] * np.float32(scale), wanted)


def test_functions_take_any_batch(tmp_path):
    plan = Plan(layers={"x": planned(Requantize.MULTIPLIER)}, target="npu-qdq-int8")
    model = qinvert.export_layers(plan, tmp_path / "x.onnx", batch=None)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.output] == ["x/o", "x/state_out"]
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for batch in (1, 7):
        given = {f"x/{name}": values for name, values in feeds(inputs(), batch).items()}
        o, state = session.run(None, given)
        assert (o.shape, state.shape) == ((1, batch, ROWS, ROWS), (1, batch, ROWS, WIDTH))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("b"), "takes the inputs a, b, state, got a, state"),
        (lambda given: given.update(c=given["a"]), "got a, b, state, c"),
        (lambda given: given.update(a=given["a"].mT), r"a has shape \[2, 5, 4, 8\]; pass \(..., 8, 4\)"),
        (lambda given: given.update(a=given["a"][0]), "all axes but the last two must be the same"),
        (lambda given: given.update(a=given["a"] * torch.nan), "a holds NaN or Inf"),
        (lambda given: given.update(a="text"), "a is not a real numeric array"),
    ],
)
@pytest.mark.parametrize("run", [step_like().execute, planned(Requantize.MULTIPLIER).execute])
def test_inputs_that_do_not_fit_are_refused(run, change, words):
    given = inputs()
    change(given)
    with pytest.raises(InputError, match=words):
        run(given)


def test_what_needs_an_inverse_says_so_in_one_line(tmp_path):
    plan = planned(Requantize.MULTIPLIER)
    words = r"step_like\(chunk=8\) is not an inverse: it maps a \[8, 4\], b \[4, 8\], state \[8, 4\] to o"
    lower = torch.zeros(8, 8)
    for call in (lambda: step_like().run(lower), lambda: plan.inverse(lower)):
        with pytest.raises(ProgramError, match=words):
            call()
    wide = step_like(chunk=16)
    with pytest.raises(UnsupportedError, match="kernels compute inverses, and the program has other ports"):
        integer_kernel(planned(Requantize.MULTIPLIER, program=wide))
    with pytest.raises(
        ExportError, match="does not compute an inverse, so that input 'L' does not fit; use ports"
    ):
        qinvert.export(
            Plan(layers={"x": plan}, target="npu-qdq-int8"), tmp_path / "x.onnx", input="L", output="T"
        )
    assert not list(tmp_path.iterdir())


def test_an_inverse_has_no_other_ports(tmp_path):
    lower = torch.tril(torch.rand(4, 16, 16), -1)
    plan = qinvert.calibrate(lower, method=qinvert.block_merge(16))
    assert plan.layer().program.inverse_ports.matrix == "M"
    with pytest.raises(ExportError, match="so that input 'ports' does not fit; use L or M"):
        qinvert.export(plan, tmp_path / "x.onnx", input="ports", output="ports")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": ()}, "0 inputs; a program has 1 to 64"),
        ({"outputs": ()}, "0 outputs; use 1 to 64"),
        (
            {"outputs": (port("o", ROWS, ROWS), port("o", ROWS, ROWS))},
            "2 outputs; use 1 to 64",
        ),
        (
            {"outputs": (port("o", ROWS, WIDTH),)},
            r"must be a tensor of shape \[1,8,4\], got \[1,8,8\]",
        ),
        ({"outputs": (port("o", ROWS, ROWS, "nothing"),)}, "output 'nothing' must be .* got None"),
        ({"inputs": (port("a", ROWS, WIDTH),) * 3}, "two inputs or constants share a name"),
    ],
)
def test_ports_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ProgramError, match=words):
        step_like(**changes)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 0, 8), (1, 8, -1), (1, 2048, 1024)])
def test_a_port_is_one_block_of_bounded_size(shape):
    with pytest.raises(ProgramError, match="a port is one block of at most 1048576 elements"):
        Port(name="x", shape=Shape(*shape))


def test_a_strictly_lower_port_is_zero_above_its_diagonal():
    matrix = Port(name="M", shape=Shape(1, 4, 4), meaning=Meaning.MATRIX)
    steps = (Slice(output="corner", source="M", rows=(2, 4), columns=(0, 2)),)
    program = Program(name="x", chunk=4, inputs=(matrix,), outputs=(port("corner", 2, 2),), steps=steps)
    lower = torch.tril(torch.rand(4, 4), -1)
    assert torch.equal(program.execute({"M": lower})["corner"], lower[2:, :2])
    with pytest.raises(InputError, match="M is not strictly lower triangular"):
        program.execute({"M": lower + torch.eye(4)})
