"""The script that compares whole chunk steps: its sequential inverses, parts, float16 graphs and page."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import qinvert
from qinvert.errors import ExportError
from qinvert.export.runtimes import CycleEstimate
from qinvert.stress import stress_matrices


@pytest.fixture(scope="module")
def scripts(pytestconfig):
    """Import the modules, and forget them behind."""
    folder = str(pytestconfig.rootpath / "benchmarks")
    sys.path.insert(0, folder)
    before = set(sys.modules)
    names = ("step_graphs", "step_layer", "step_page", "step")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(folder)
    own = {file.stem for file in (pytestconfig.rootpath / "benchmarks").glob("*.py")}
    for name in own & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.parametrize("name", ["masked_columns", "growing_columns"])
def test_sequential_programs_are_the_inverse(scripts, name):
    lower = stress_matrices("independent_keys", 3, 16).double()
    program = getattr(scripts["step_graphs"], name)(16)
    (strict,) = program.execute({"M": -lower}, torch.float64).values()
    exact = torch.linalg.inv(torch.eye(16) + lower)
    assert torch.allclose(strict + torch.eye(16), exact, atol=1e-9)


def test_a_part_makes_its_outputs_of_the_inputs_that_it_needs(scripts):
    program = qinvert.gated_delta_step(qinvert.residuals_as_sums(qinvert.elimination(16)), 8, 8)
    part = scripts["step_graphs"].part_of(program, ("M",))
    assert {port.name for port in part.inputs} == {"k", "beta", "g"}
    assert [port.name for port in part.outputs] == ["M"]
    assert len(part.steps) < len(program.steps)


def test_a_step_in_float16_is_the_step(scripts):
    program = qinvert.gated_delta_step(qinvert.residuals_as_sums(qinvert.elimination(16)), 8, 8)
    generator = torch.Generator().manual_seed(0)
    given = {p.name: 0.3 * torch.rand(2, *p.shape[1:], generator=generator) for p in program.inputs}
    given["g"] = -given["g"]
    wanted = program.execute(given, torch.float64)
    for chains in (1, 2):
        model = scripts["step_graphs"].half_step(program, 2, chains)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        feed = {name: x[None].numpy().astype(np.float16) for name, x in given.items()}
        found = session.run(["o_out", "state_out"], feed)
        for value, name in zip(found, ("o", "state"), strict=True):
            assert np.abs(value[0] - wanted[name].numpy()).max() < 1e-2


@pytest.mark.parametrize("widths", [(8, 8), (16, 4), (0, 0)])
def test_projections_are_legal_graphs_of_constant_weights(scripts, widths):
    layer = scripts["step_layer"]
    case = layer.Projections(chip="hexagon-v81", part="mixer", activations=widths[0], weights=widths[1])
    model = layer.projections(case)
    onnx.checker.check_model(model)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == len(layer.MIXER)
    assert {value.name for value in model.graph.input} == {"hidden", "mixed"}


def test_tables_go_between_the_markers_and_a_page_without_them_is_refused(scripts):
    page = scripts["step_page"]
    text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    found = page.written(text, "new")
    assert found == f"before\n{page.BEGIN}\nnew\n{page.END}\nafter\n"
    assert page.written(found, "new") == found
    with pytest.raises(ExportError, match="has no lines"):
        page.written("before", "new")
    other = page.marker("other.py")
    both = f"{text}{other}\nold\n{page.END}\n"
    assert page.written(both, "new", other) == f"{text}{other}\nnew\n{page.END}\n"


def test_what_was_measured_and_refused_is_in_the_tables(scripts, monkeypatch):
    graphs, page, cell = scripts["step_graphs"], scripts["step_page"], scripts["step_page"].Cell
    monkeypatch.setattr(page, "decibels", lambda *_: (20.0, -1.0))
    found = {}
    for name, cycles in ((graphs.OURS, 100), *((other, 1000) for other in graphs.SEQUENTIAL)):
        case = graphs.Case(chip="hexagon-v81", inverse=name)
        found[case] = cell(cycles=cycles * 1000, source="counted")
        found[replace(case, chains=2)] = cell(cycles=cycles * 2000, source="counted")
    refused = graphs.Case(chip="hexagon-v81", layout="tokens_first")
    found[refused] = cell(cycles=None, refused="qnn refuses the graph: | Fail : no")
    text = page.tables(found)
    assert "100k cycles; the same step with forward substitution takes 10.0" in text
    assert "| elimination | 8 | 20.0 / < 0 | 100k (16) |" in text
    assert "| no | hexagon-v81: elimination: 8, 16 chains, tokens_first |" in text


def test_outcomes_keep_what_moves_between_chip_and_memory(scripts):
    npu = importlib.import_module("npu")
    job = npu.Job(chip="hexagon-v81", name="x", graph="0", content=b"")
    answer = CycleEstimate(hardware="hexagon-v81", cycles=5, source="s", traffic={"in": 3, "out": 4})
    assert npu.outcome_of(job, answer).cell.traffic == 7
