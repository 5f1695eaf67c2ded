import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import qinvert
from qinvert.errors import ExportError, VerificationError
from qinvert.execution.simulator import simulate_integers
from qinvert.export.runtimes import RUNTIMES, Execution, Runtime, execute, installed, subprocesses
from qinvert.methods import elimination
from qinvert.numerics.law import Rounding
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.stress import STRESS, from_keys, stress_matrices
from qinvert.systems import Systems

SEPARATE = [name for name in RUNTIMES if name != "onnxruntime"]
#: How each runtime names the products of a quantized graph.
INTEGER = {
    "openvino": lambda types: types.endswith("i8"),
    "qnn": lambda types: types == "int8 x int8",
    "iree": lambda types: types == "int8 x int8",
    "rknn": lambda types: types == "exMatMul INT8 NPU",
    "vela": lambda types: types == "int8 x int8",
    # Its importer keeps QDQ graphs as they are written.
    "tvm": lambda types: types == "float32 x float32",
}
METHODS = {
    "packed": lambda chunk: qinvert.block_merge(chunk, base=4),
    "tiled": lambda chunk: qinvert.block_merge(chunk, base=1, tile=16),
    "corrected": lambda chunk: qinvert.block_merge(chunk, base=4, corrections=1),
}
CASES = [(16, "packed"), (32, "tiled"), (64, "packed"), (64, "corrected"), (128, "packed")]
#: Compilers that take long see one plan; float scales where grids are an NPU's own.
SLOW = {name: (64, "packed", "float" if name in ("qnn", "rknn", "vela") else "pow2") for name in SEPARATE}
del SLOW["openvino"]


def needed(name):
    if name not in installed():
        pytest.skip(f"pip install {RUNTIMES[name].requirement}, or set QINVERT_{name.upper()}_PYTHON")
    return name


def amx_or_vnni():
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and any(flag in cpu.read_text() for flag in ("amx_int8", "avx512_vnni", "avx_vnni"))


def exported(folder, chunk, method, scales, count, *, batch=8):
    lower = torch.cat([stress_matrices(name, count, chunk, seed=7) for name in STRESS])
    plan = qinvert.calibrate(lower, method=METHODS[method](chunk), target="npu-qdq-int8", scales=scales)
    qinvert.export(plan, folder / "t.onnx", batch=batch)
    return folder / "t.onnx", plan, lower


@pytest.mark.parametrize("scales", ["pow2", "float"])
@pytest.mark.parametrize(("chunk", "method"), CASES)
@pytest.mark.parametrize("name", SEPARATE)
def test_every_product_runs_as_expected_and_every_value_agrees(name, chunk, method, scales, tmp_path):
    needed(name)
    if SLOW.get(name, (chunk, method, scales)) != (chunk, method, scales):
        pytest.skip("one plan is enough for a slow compiler")
    if name == "openvino" and scales == "float" and not amx_or_vnni():
        pytest.skip("without AMX and VNNI OpenVINO's int8 products are not exact")
    path, plan, lower = exported(tmp_path, chunk, method, scales, 2)
    results = qinvert.verify(path, plan, lower, runtimes=(name,))
    count = sum(node.op_type == "MatMul" for node in onnx.load(path).graph.node)
    for result in results:
        assert sum(result.products.values()) == count
        if name != "openvino" or amx_or_vnni():
            assert all(INTEGER[name](types) for types in result.products), result.products
        # Some Transposes of the smaller Rockchip NPUs run on their CPU.
        assert result.elsewhere == () or ("rk3588" not in result.runtime and name == "rknn")
        # Its int8 products and its sums on one scale are exact.
        if result.exact or (name == "rknn" and method == "packed"):
            assert result.mismatches == 0


@pytest.mark.parametrize("scales", ["pow2", "float"])
@pytest.mark.parametrize("name", ["onnxruntime", *SEPARATE])
def test_int4_values_saturate_after_integer_products(name, scales, tmp_path):
    needed(name)
    # On grids that hold 1.0: residual terms are integers, too.
    lower = stress_matrices("independent_keys", 16, 32, seed=7)
    method = qinvert.block_merge(32, base=4)
    plan = qinvert.calibrate(lower, method=method, bits=4, target="npu-qdq-int4", scales=scales)
    result = simulate_integers(plan.layer(), Systems(lower=lower))
    assert int((result.abs() == 7).sum()) > 0
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    result = qinvert.verify(tmp_path / "t.onnx", plan, lower, runtimes=(name,))[-1]
    if name != "openvino" or amx_or_vnni():
        expected = INTEGER.get(name, INTEGER["qnn"])
        assert all(expected(types) for types in result.products), result.products
    assert result.mismatches <= 1e-4 * result.values or RUNTIMES[name].own_steps


@pytest.mark.parametrize("name", ["openvino", "qnn", "rknn", "vela"])
def test_graphs_that_build_l_from_keys_agree(name, tmp_path):
    needed(name)
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(8, 64, 32, generator=generator), dim=-1)
    beta = torch.rand(8, 64, generator=generator)
    g = torch.nn.functional.logsigmoid(torch.randn(8, 64, generator=generator) + 3)
    lower = from_keys(k.double(), beta.double(), g.double())
    plan = qinvert.calibrate(lower, method=METHODS["packed"](64), bits=8, target="npu-qdq-int8")
    qinvert.export(plan, tmp_path / "t.onnx", batch=8, input="keys", key_size=32)
    given = {"k": k, "beta": beta, "g": g}
    for result in qinvert.verify(tmp_path / "t.onnx", plan, given, runtimes=(name,)):
        assert result.mismatches == 0 or (name == "openvino" and not amx_or_vnni())


@pytest.mark.parametrize("entry", [0.5, 0.1])
def test_qnn_multiplies_int16_by_int8_whatever_the_powers(entry, tmp_path):
    needed("qnn")
    # The square of M is zero: its grid must have room for the partial products of its planes.
    lower = torch.zeros(8, 64, 64, dtype=torch.float64)
    lower[:, 1::2, ::2] = torch.tril(torch.full((32, 32), entry))
    plan = qinvert.calibrate(lower, method=qinvert.block_merge(64, base=4), bits=16, target="npu-qdq-int16")
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, runtimes=("qnn",)):
        assert result.products == {"int16 x int8": 20}


@pytest.mark.parametrize(
    ("target", "bits", "method"),
    [
        ("npu-qdq-int8", 8, "packed"),
        ("npu-qdq-int8", 8, "tiled"),
        ("npu-qdq-int8", 8, "corrected"),
        ("npu-qdq-uint8", 8, "packed"),
        ("npu-qdq-int4", 4, "packed"),
    ],
)
@pytest.mark.parametrize("scales", ["float", "pow2"])
def test_hexagon_equals_its_simulation(target, bits, method, scales, tmp_path):
    needed("qnn")
    names = [name for name in STRESS if bits > 4 or name == "independent_keys"]
    lower = torch.cat([stress_matrices(name, 4, 64, seed=7) for name in names])
    plan = qinvert.calibrate(lower, method=METHODS[method](64), bits=bits, target=target, scales=scales)
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    # Sums of two scales are known where they are powers of two.
    known = method != "corrected" or scales == "pow2"
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, runtimes=("qnn",)):
        assert (result.rounding == "hexagon") is known
        if not known:
            continue
        assert result.mismatches == 0
        assert result.exact


@pytest.mark.parametrize("side", ["left", "right"])
def test_hexagon_equals_its_simulation_of_16_bits(side, tmp_path):
    needed("qnn")
    lower = torch.cat([stress_matrices(name, 8, 16, seed=7) for name in STRESS])
    method = residuals_as_sums(elimination(16, side=side))
    plan = qinvert.calibrate(lower, method=method, bits=16, target="hexagon-int16", min_sqnr_db=0)
    ends = {"input": "M", "input_type": "integers", "output": "integers"}
    qinvert.export(plan, tmp_path / "t.onnx", batch=8, **ends)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, runtimes=("qnn",)):
        assert (result.rounding, result.exact, result.mismatches) == ("hexagon", True, 0)
        assert set(result.products) == {"int16 x int16"}


def test_qualcomms_compiler_says_what_a_graph_costs(tmp_path):
    needed("qnn")
    path, plan, lower = exported(tmp_path, 16, "packed", "pow2", 1)
    found = {chip: qinvert.estimate(path, chip) for chip in RUNTIMES["qnn"].hardware}
    assert set(found) == {"hexagon-v81", "hexagon-v73"}
    for chip, cost in found.items():
        assert cost.hardware == chip
        assert 1000 < cost.lower <= cost.cycles <= cost.upper < 1_000_000
        assert set(cost.products.values()) == {"int8 x int8"}
        assert "not measured" in cost.source
    # The same whenever it is asked; and what is kept is the model that a device loads.
    again = qinvert.estimate(path, "hexagon-v81", keep=tmp_path / "kept")
    assert again.cycles == found["hexagon-v81"].cycles
    (file,) = again.kept
    (node,) = onnx.load(file).graph.node
    assert node.op_type == "EPContext"
    results = qinvert.verify(path, plan, lower, runtimes=("qnn",), keep=tmp_path / "all")
    assert [result.runtime for result in results] == [f"qnn (Hexagon v{n})" for n in (73, 75, 79, 81)]
    assert all(Path(file).is_file() for result in results for file in result.kept)


@pytest.mark.parametrize(
    ("target", "method"),
    [("npu-qdq-int8", "tiled"), ("npu-qdq-int8", "corrected"), ("npu-qdq-uint8", "packed")],
)
@pytest.mark.parametrize("scales", ["float", "pow2"])
def test_ethos_equals_its_simulation(target, method, scales, tmp_path):
    needed("vela")
    lower = torch.cat([stress_matrices(name, 4, 64, seed=7) for name in STRESS])
    plan = qinvert.calibrate(lower, method=METHODS[method](64), bits=8, target=target, scales=scales)
    qinvert.export(plan, tmp_path / "t.onnx", batch=8)
    for result in qinvert.verify(tmp_path / "t.onnx", plan, lower, runtimes=("vela",)):
        assert (result.rounding, result.exact, result.elsewhere) == ("tflite", True, ())
        assert result.mismatches == 0


def test_openvino_equals_the_simulator_on_a_million_values(tmp_path):
    needed("openvino")
    if not amx_or_vnni():
        pytest.skip("needs VNNI or AMX")
    path, plan, lower = exported(tmp_path, 64, "packed", "pow2", 20, batch=64)
    assert lower.numel() > 1e6
    (result,) = qinvert.verify(path, plan, lower, runtimes=("openvino",))
    assert result.values >= lower.numel()
    assert result.mismatches == 0


@pytest.mark.parametrize("name", SEPARATE)
def test_a_wrong_graph_fails(name, tmp_path):
    needed(name)
    path, plan, lower = exported(tmp_path, 16, "packed", "pow2", 1)
    model = onnx.load(path)
    (flip,) = (tensor for tensor in model.graph.initializer if tensor.name == "minus_one")
    flip.CopyFrom(onnx.numpy_helper.from_array(np.float32(-0.5).reshape(()), flip.name))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=f"{name} .* differs from the simulator"):
        qinvert.verify(path, plan, lower, runtimes=(name,))


FAKES = {
    "hangs": "import time; time.sleep(60)",
    "raises": "raise RuntimeError('no kernel for MatMul')",
    "crashes": "import os; print('assertion in the optimizer', flush=True); os.abort()",
    "says nothing": "pass",
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a runtime ``abacus`` whose program has the given text."""
    monkeypatch.setattr(subprocesses, "PROGRAMS", tmp_path)

    def runtime(text, seconds=20.0, module="json"):
        (tmp_path / "abacus_program.py").write_text(text)
        made = subprocesses.separate("abacus", "a fake", module, "abacus-toolkit", seconds=seconds)
        monkeypatch.setitem(RUNTIMES, "abacus", made)
        return made

    return runtime


def run_fake():
    return list(execute("abacus", b"", [{"L": np.zeros((1, 1, 2, 2), dtype=np.float32)}]))


def test_a_program_that_hangs_hits_the_time_limit(fake):
    fake(FAKES["hangs"], seconds=0.5)
    with pytest.raises(ExportError, match=r"abacus took longer than 0\.5 s; export a smaller batch"):
        run_fake()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", r"exit code 1\): .*RuntimeError: no kernel for MatMul"),
        ("crashes", r"exit code -6\): assertion in the optimizer"),
        ("says nothing", r"exit code 0\)"),
    ],
)
def test_a_program_that_fails_is_one_line(fake, kind, said):
    fake(FAKES[kind])
    with pytest.raises(ExportError, match=said) as caught:
        run_fake()
    assert "\n" not in str(caught.value)


def test_a_missing_interpreter_is_one_line(fake, monkeypatch):
    fake("pass")
    monkeypatch.setenv("QINVERT_ABACUS_PYTHON", "/nowhere/python")
    with pytest.raises(ExportError, match=r"cannot run /nowhere/python: .*; check QINVERT_ABACUS_PYTHON"):
        run_fake()


def test_what_is_not_installed_says_how_to_install_it(fake):
    fake("pass", module="no_such_toolkit")
    assert "abacus" not in installed()
    with pytest.raises(ExportError, match=r"pip install abacus-toolkit, or set QINVERT_ABACUS_PYTHON"):
        run_fake()


def test_a_variable_names_the_interpreter(fake, monkeypatch):
    fake("pass", module="no_such_toolkit")
    monkeypatch.setenv("QINVERT_ABACUS_PYTHON", sys.executable)
    assert "abacus" in installed()


def test_what_a_program_reports_arrives(fake, tmp_path):
    (tmp_path / "protocol.py").write_text(
        (Path(subprocesses.__file__).parent / "programs/protocol.py").read_text()
    )
    fake(
        "from protocol import main\n"
        "def run(model, feeds, folder):\n"
        "    yield 'chip', [feed['L'] + 1 for feed in feeds], {'p': 'int8 x int8'}, ['q']\n"
        "main(run)\n"
    )
    (execution,) = run_fake()
    assert (execution.setting, Counter(execution.products.values())) == ("chip", {"int8 x int8": 1})
    assert execution.elsewhere == ("q",)
    assert np.array_equal(execution.outputs[0], np.ones((1, 1, 2, 2)))


@pytest.mark.parametrize(
    ("scales", "steps", "reorders", "counted"),
    [
        ("float", 0.001, False, 0),
        ("float", 0.01, False, None),
        ("pow2", 0.001, False, None),
        ("pow2", 0.001, True, 0),
        ("pow2", 0.01, True, None),
    ],
)
def test_float32_rounding_is_a_difference_only_where_values_must_be_exact(
    scales, steps, reorders, counted, tmp_path, monkeypatch
):
    path, plan, lower = exported(tmp_path, 16, "packed", scales, 1, batch=26)

    def off(content, feeds):
        expected = plan.layer().inverse(lower).numpy()[np.arange(26) % len(lower)]
        expected[0, 5, 2] += steps * plan.layer().output.scale
        yield Execution(setting="off", outputs=[expected[None]])

    made = Runtime(name="off", execute=off, summary="", module="", requirement="", reorders=reorders)
    monkeypatch.setitem(RUNTIMES, "off", made)
    if counted is None:
        with pytest.raises(VerificationError, match=r"1 of .* first at \[0, 5, 2\]"):
            qinvert.verify(path, plan, lower, runtimes=("off",))
    else:
        (result,) = qinvert.verify(path, plan, lower, runtimes=("off",))
        assert result.mismatches == counted


@pytest.mark.parametrize(("inputs", "equal"), [("float16", True), ("float32", False)])
def test_a_processor_that_takes_float16_is_compared_on_numbers_of_float16(
    inputs, equal, tmp_path, monkeypatch
):
    path, plan, lower = exported(tmp_path, 16, "packed", "pow2", 2, batch=8)

    def narrow(content, feeds):
        given = [torch.from_numpy(feed["L"]).to(torch.float16).to(torch.float32) for feed in feeds]
        yield Execution(setting="narrow", outputs=[plan.layer().inverse(x).numpy() for x in given])

    made = Runtime(name="narrow", execute=narrow, summary="", module="", requirement="", inputs=inputs)
    monkeypatch.setitem(RUNTIMES, "narrow", made)
    # A float32 L beside it is not rounded.
    names = ("onnxruntime", "narrow")
    if equal:
        results = qinvert.verify(path, plan, lower, runtimes=names)
        assert [result.mismatches for result in results] == [0, 0, 0]
    else:
        with pytest.raises(VerificationError, match=r"narrow .* differs from the simulator"):
            qinvert.verify(path, plan, lower, runtimes=names)


@pytest.mark.parametrize(("rounding", "legal"), [("hexagon", True), ("onnx", False)])
def test_a_processor_whose_rounding_is_known_must_return_its_integers(rounding, legal, tmp_path, monkeypatch):
    path, plan, lower = exported(tmp_path, 16, "packed", "float", 1, batch=26)

    def near(content, feeds):
        given = torch.from_numpy(feeds[0]["L"][0])
        # T leaves as float16.
        inverse = plan.layer().inverse(given, rounding=rounding).half().float()
        yield Execution(setting="chip", outputs=[inverse.numpy()[None]])

    made = Runtime(
        name="near", execute=near, summary="", module="", requirement="", own_steps=2, inputs="float16",
        rounding=Rounding.HEXAGON,
    )  # fmt: skip
    monkeypatch.setitem(RUNTIMES, "near", made)
    if legal:
        (result,) = qinvert.verify(path, plan, lower, runtimes=("near",))
        assert (result.rounding, result.exact, result.mismatches) == ("hexagon", True, 0)
    else:
        with pytest.raises(VerificationError, match=r"near \(chip\) differs from the simulator in"):
            qinvert.verify(path, plan, lower, runtimes=("near",))
