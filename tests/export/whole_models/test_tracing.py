"""Traces keep the sizes that were asked for."""

import pytest
import torch

from qinvert.errors import ExportError
from qinvert.export.whole_models.tracing import trace

pytest.importorskip("onnxscript", reason="pip install 'qinvert[model]'")
pytestmark = pytest.mark.filterwarnings("ignore")


class TwoRows(torch.nn.Module):
    def forward(self, x):
        return x + torch.zeros(2, 1)


def test_a_size_that_pytorch_fixes_by_itself_is_an_error():
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    with pytest.raises(ExportError, match=r"size 0 of input 'x' as 2, not as open 'batch'"):
        trace(TwoRows().eval(), {"x": torch.zeros(2, 8)}, 21, dynamic_shapes=sizes)
