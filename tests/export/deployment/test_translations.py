"""Selections of PyTorch as sums and products: the same values, and no operator that NPUs lack."""

import numpy as np
import pytest
import torch

from qinvert import ExportError
from qinvert.export.deployment.graphs import FORBIDDEN
from qinvert.export.deployment.translations import LOWEST, drop_empty_parts, join_softplus, translations
from qinvert.export.runtimes.onnxruntime_cpu import open_session
from qinvert.export.whole_models.tracing import trace

serialize = pytest.importorskip("onnx_ir.serde").serialize_model
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


class Selections(torch.nn.Module):
    """What the routers, the decays and the keys of models select."""

    def forward(self, x):
        softplus = torch.where(x > 20.0, x, torch.log(1.0 + torch.exp(x)))
        joined = torch.zeros_like(x)
        joined[..., :3] = x[..., :3] * 2
        joined[..., 5:] = x[..., 5:] * 3
        best = torch.topk(x, 2, dim=-1)[1]
        mask = torch.zeros_like(x).scatter_(1, best, 1)
        return softplus * 2, joined, mask, x.masked_fill(~mask.bool(), float("-inf"))


class Parted(torch.nn.Module):
    """Keys whose rotated part has no size."""

    def forward(self, x):
        kept, _ = torch.split(x, [x.shape[-1], 0], dim=-1)
        return kept * 2


class Doubled(torch.nn.Module):
    def forward(self, x):
        y = torch.zeros_like(x)
        y[..., ::2] = x[..., ::2]
        return y


def traced(module, x):
    model = trace(module.eval(), {"x": x}, 21, custom_translation_table=translations())
    join_softplus(model)
    return serialize(model)


def test_selections_are_sums_and_products():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 10
    x[0, :3] = torch.tensor([25.0, 90.0, -90.0])
    graph = traced(Selections(), x)
    read = {name for node in graph.graph.node for name in node.input} | {o.name for o in graph.graph.output}
    live = {node.op_type for node in graph.graph.node if read.intersection(node.output)}
    assert not live & FORBIDDEN
    assert "Softplus" in live
    found = open_session(graph.SerializeToString(), threads=1).run(None, {"x": x.numpy()})
    softplus, joined, mask, filled = (value.numpy() for value in Selections()(x))
    np.testing.assert_allclose(found[0], softplus, rtol=1e-5, atol=2e-7)
    np.testing.assert_array_equal(found[1], joined)
    np.testing.assert_array_equal(found[2], mask)
    np.testing.assert_array_equal(found[3], np.maximum(filled, np.float32(LOWEST)))


def test_parts_without_size_are_left_out():
    model = trace(Parted().eval(), {"x": torch.ones(2, 8)}, 21, custom_translation_table=translations())
    assert [node.op_type for node in model.graph] == ["Split", "Mul"]
    drop_empty_parts(model)
    assert [node.op_type for node in model.graph] == ["Mul"]
    (found,) = open_session(serialize(model).SerializeToString(), threads=1).run(
        None, {"x": np.ones((2, 8), np.float32)}
    )
    np.testing.assert_array_equal(found, 2.0)


def test_slices_with_gaps_are_refused():
    with pytest.raises(ExportError, match="every n-th"):
        traced(Doubled(), torch.randn(2, 8))
