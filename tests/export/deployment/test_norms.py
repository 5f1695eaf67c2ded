"""Norms as one operator, and squares as products: the same values, whoever reads the graph."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from deployments import CACHE

import qinvert
from qinvert import recall
from qinvert.export.deployment.deploy import build_graphs
from qinvert.export.deployment.graphs import NORM, NORM_OPSET, operators, takes_norms
from qinvert.export.deployment.options import DeployOptions
from qinvert.export.deployment.translations import write_squares
from qinvert.export.exporting import profile_for
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.whole_models.tracing import trace
from qinvert.hardware import HARDWARE, find_hardware

serialize = pytest.importorskip("onnx_ir.serde").serialize_model
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Norm(torch.nn.Module):
    """A norm as models spell it, of any power."""

    def __init__(self, power):
        super().__init__()
        self.power = power
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x):
        mean = x.abs().pow(self.power).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + 1e-3))


@pytest.mark.parametrize(("power", "operator"), [(2, "Mul"), (3, "Pow")])
def test_squares_are_products_and_other_powers_stay(power, operator):
    module = Norm(power)
    model = trace(module.eval(), {"x": X}, 21)
    assert "Pow" in operators(model)
    write_squares(model)
    assert ("Pow" in operators(model)) is (operator == "Pow")
    found = open_session(serialize(model).SerializeToString(), threads=1).run(None, {"x": X.numpy()})[0]
    np.testing.assert_allclose(found, module(X).detach(), rtol=1e-6, atol=1e-6)


def test_only_compilers_that_take_the_operator_get_it():
    assert takes_norms(HARDWARE["hexagon-v81"].compiler)
    assert takes_norms(HARDWARE["hexagon-v73"].compiler)
    assert not takes_norms(None)
    assert not takes_norms(HARDWARE["ethos-u85-256"].compiler)
    assert not takes_norms(replace(HARDWARE["hexagon-v81"].compiler, opset=NORM_OPSET - 1))


@pytest.mark.parametrize(("hardware", "norms"), [("hexagon-v81", 7), ("cpu-onnxruntime", 0)])
def test_norms_of_a_model_are_one_operator_where_the_chip_takes_it(hardware, norms):
    model = recall.load_model()
    plan = qinvert.calibrate(model, recall.sequences(1), scope="chunk", hardware="hexagon-v81")
    options = DeployOptions(cache=CACHE)
    graphs = build_graphs(model, plan, profile_for(plan, None), options, find_hardware(hardware))
    for graph in graphs:
        counts = operators(graph.model)
        assert counts.get(NORM, 0) == norms
        assert "Pow" not in counts
        assert all(len(node.outputs[0].shape) == 4 for node in turned_gates(graph.model))


def turned_gates(model):
    """The transposes that beta and decays of all layers come from; there are some."""
    sources = [node for node in model.graph if node.op_type in ("Sigmoid", "Softplus")]
    waiting, found = [user for node in sources for user in users(node) if rank(node) == 3], []
    while waiting:
        node = waiting.pop()
        if node.op_type == "Transpose":
            found.append(node)
        elif node.op_type in ("Mul", "Reshape") and rank(node) <= 4:
            waiting += users(node)
    assert len(found) >= 4
    return found


def users(node):
    return [use.node for use in node.outputs[0].uses()]


def rank(node):
    return len(node.outputs[0].shape)
