"""Products with quantized weights as a graph has them, and the model with the very same ones in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch

from qinvert.errors import VerificationError
from qinvert.export.rules.graph_index import Array, Grid, Structure, attribute
from qinvert.export.whole_models.method_replacement import replace_method
from qinvert.formats import INT8, INT16, IntFormat
from qinvert.numerics.rounding import dequantize, quantize

#: Formats of activations, by the NumPy names of their containers.
FORMATS: Final[dict[str, IntFormat]] = {"int8": INT8, "int16": INT16}
#: How far beyond half a step float32 takes a weight that was rounded.
SLACK: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedProduct:
    """``y = DQ(Q(DQ(Q(x)) @ W))`` of one node."""

    name: str
    #: W as the node reads it, ``[K, N]``.
    weight: Array
    #: Step of every element of W.
    steps: Array
    before: Grid
    after: Grid

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute it in float32."""
        return _on_grid(_on_grid(x, self.before) @ torch.from_numpy(self.weight), self.after)

    def is_rounded(self, weight: Array) -> bool:
        """Whether every element of W is the nearest one on its grid to a weight ``[N, K]``."""
        away = np.abs(weight.T - self.weight)
        return bool((away <= (0.5 + SLACK) * self.steps).all())


def quantized_products(path: str | PathLike[str]) -> list[QuantizedProduct]:
    """Read the products of a graph that have integer weights, in its order.

    Products of planned layers are not among them: their constants have a single scale.
    """
    graph = Structure(onnx.load(Path(path)))
    found = (_product(graph, node) for node in graph.nodes if node.op_type == "MatMul")
    return [product for product in found if product is not None]


def _product(graph: Structure, node: onnx.NodeProto) -> QuantizedProduct | None:
    given, weight = (graph.writers.get(name) for name in node.input)
    after = next(iter(graph.readers[node.output[0]]), None)
    if given is None or weight is None or after is None:
        return None
    if (given.op_type, weight.op_type, after.op_type) != (
        "DequantizeLinear",
        "DequantizeLinear",
        "QuantizeLinear",
    ):
        return None
    stored, scales = (graph.constant(name) for name in weight.input[:2])
    before, behind = graph.grid(given), graph.grid(after)
    if stored is None or scales is None or not scales.ndim or before is None or behind is None:
        return None
    steps = _steps(scales, stored.shape, attribute(weight, "axis", 1), attribute(weight, "block_size", 0))
    values = (stored.astype(np.float32) * steps).astype(np.float32)
    return QuantizedProduct(name=node.name, weight=values, steps=steps, before=before, after=behind)


def _steps(scales: Array, shape: Sequence[int], axis: int, block: int) -> Array:
    if block:
        return np.take(np.repeat(scales, block, axis), np.arange(shape[axis]), axis)
    return np.broadcast_to(scales if axis == len(shape) - 1 else scales[:, None], shape)


def _on_grid(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    fmt = FORMATS[grid.element]
    return dequantize(quantize(x, grid.scale, fmt), grid.scale, fmt)


@contextmanager
def quantized_as(model: torch.nn.Module, products: Sequence[QuantizedProduct]) -> Iterator[None]:
    """Have the linear layers of a model compute what the products of a graph do, inside a ``with`` block.

    Raises
    ------
    VerificationError
        If the weights of a product are no linear layer's, each rounded to the nearest integer.
    """
    left = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with ExitStack() as undo:
        for product in products:
            layer = next((x for x in left if _fits(product, x)), None)
            if layer is None:
                raise VerificationError(
                    f"the weights of {product.name} are not those of the model, rounded to the nearest "
                    "integer; deploy again"
                )
            left.remove(layer)
            replace_method(undo, layer, "forward", partial(_linear, product, layer.bias))
        yield


def _fits(product: QuantizedProduct, layer: torch.nn.Linear) -> bool:
    weight = layer.weight.detach().cpu().numpy()
    return weight.T.shape == product.weight.shape and product.is_rounded(weight)


def _linear(product: QuantizedProduct, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    y = product(x)
    return y if bias is None else y + bias
