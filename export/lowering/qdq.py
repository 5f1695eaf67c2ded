"""QDQ lowering: float operators between DequantizeLinear and QuantizeLinear.

Compilers fuse each group into one integer kernel.  A program tensor ``x``
becomes the int8 tensor ``x`` between ``x/quantize`` and ``x/dequantized``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qinvert.export.graph import Sizes
from qinvert.export.interface import ANY_BATCH, InputType
from qinvert.export.lowering.base import GraphLowering, Value
from qinvert.export.lowering.tensors import TRANSPOSED, IntArray, vector_name
from qinvert.formats import INT8, PLANE_RATIO, IntFormat
from qinvert.numerics.scales import product_scale
from qinvert.plan.carried_identity import sliced_ones
from qinvert.plan.far_sums import is_far
from qinvert.plan.quantization import Quantization
from qinvert.program.sparsity import constant_support
from qinvert.program.steps import (
    Add,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Slice,
    Step,
    Subtract,
    Transpose,
)

#: Grid of 0/1 masks.
MASK_GRID = Quantization(format=INT8, scale=1.0)
#: Integer of 1 in a mask of 16 bits.  It means exactly 1 on every runtime, but Hexagon rounds products
#: with a 1 of scale 1 to steps of 8 or so, and with integers from 16 on not at all.
WIDE_ONE = 2**14
#: Steps from a format's last integer to where Clip cuts: rounding takes them back, and no
#: compiler that divides the end by the scale takes it for the integer below.
CLIP_MARGIN = 0.25


class QdqLowering(GraphLowering):
    """Values are dequantized float tensors; every one has just been quantized."""

    def source(self, tensor: str, name: str) -> Value:
        if self.grid(tensor).format.is_float:
            return self.given_float(tensor, name)
        if tensor not in self.integer_inputs:
            return self._finished(tensor, name)
        shape, grid = self.shape(tensor), self.grid(tensor)
        end = self.profile.end_of(grid.format)
        given = self._dequantize(f"{tensor}/dequantized", name, self.graph.shape(name), grid, end)
        if self.graph.shape(name) != shape:
            # Compilers move dequantized tensors: integers alone have no scale for them.
            folded = self.reshaped(given, f"{tensor}/folded/float", shape)
            given = self._stored(f"{tensor}/folded", folded, shape, grid)
        elif self.converts(tensor):
            given = self._stored(f"{tensor}/inside", given, shape, grid)
        return Value(given, tensor)

    @property
    def entry_type(self) -> InputType:
        return InputType.FLOAT32

    def entry(self, tensor: str, name: str) -> str:
        if self.grid(tensor).format.is_float:
            return super().entry(tensor, name)
        return self.source(tensor, name).name

    def converted(self, name: str, result: Value) -> None:
        grid = self.grid(result.tensor)
        if grid.format.is_float:
            self.copied(name, result)
            return
        end = self.profile.end_of(grid.format)
        inputs = [result.name, self.scale_of(grid), self.zero_point(end)]
        self.graph.node("QuantizeLinear", inputs, name, self.shape(result.tensor), end.element)

    def finish(self, name: str, result: Value) -> str:
        if self.grid(result.tensor).format.is_float:
            self.copied(name, result)
            return name
        # The output has its own DequantizeLinear, because the caller chose its name.
        integers = self.graph.source(result.name)  # of the DequantizeLinear
        return self._dequantize(name, integers, self.shape(result.tensor), self.grid(result.tensor))

    def shifted(self, name: str, tensor: str, value: str, identity: str) -> str:
        shape = self.shape(tensor)
        total = self.graph.node("Add", [value, identity], f"{name}/float", shape)
        return self._stored(name, total, shape, self.grid(tensor))

    def literal(self, name: str, array: IntArray, grid: Quantization, *, spread: bool = False) -> str:
        fmt = self.storage(grid)
        # Two widths may have the same scale.
        width = f"/{grid.format.container_bits}_bits" if grid.format.is_wide else ""
        output = f"{name}{width}/{grid.scale!r}"
        shifted = (array.astype(np.int32) + fmt.zero_point).astype(fmt.element)
        # Every scale has its own integers: onnxruntime-qnn reads a shared constant on one scale only.
        values = self.graph.initializer(f"{output}/{fmt.element}", shifted)
        shape: Sizes = list(array.shape)
        if spread:
            values = self.spread(values, array, fmt.element)
            shape[1] = shape[1] if self.batch is not None else ANY_BATCH
        if output not in self.graph:
            self._dequantize(output, values, shape, grid)
        return output

    def joined(self, name: str, parts: list[str], axis: int, shape: Sizes, grid: Quantization) -> str:
        joined = self.graph.node("Concat", parts, f"{name}/float", shape, axis=axis)
        # What is joined is already on the grid, so there is nothing to clip.
        return self._stored(name, joined, shape, grid)

    def matmul(
        self, step: MatMul, left: Value, right: Value, add: list[Value], subtract: list[Value]
    ) -> Value:
        shape, right = self.shape(step.output), self.operand(right)
        if self._integer_residuals:
            *operands, ones = self.widened(step, left, right)
            return replace(self._partial(step, *operands), ones=ones)
        # Products and residuals join in float, unquantized: only some back ends fuse it.
        products = [
            self.graph.node("MatMul", [left.name, plane], f"{step.output}/matmul_{i}", shape)
            for i, plane in enumerate(self._planes(step, left.name, right.name))
        ]
        terms = [("Add", name) for name in (*products[1:], *(term.name for term in add))]
        terms += [("Sub", term.name) for term in subtract]
        total = products[0]
        for i, (operator, term) in enumerate(terms):
            total = self.graph.node(operator, [total, term], f"{step.output}/sum_{i}", shape)
        return self._finished(step.output, total)

    def _partial(self, step: MatMul, left: str, right: str) -> Value:
        """Requantize the product of each plane, then their sum: compilers see integers only."""
        shape, grid = self.shape(step.output), self.grid(step.output)
        planes = self._planes(step, left, right)
        if len(planes) == 1:
            product = self.graph.node("MatMul", [left, right], self._float(step.output), shape)
            return self._finished(step.output, product)
        parts = []
        for name, plane in zip(("high", "low"), planes, strict=True):
            product = f"{step.output}/{name}"
            real = self.graph.node("MatMul", [left, plane], self._float(product), shape)
            parts.append(self._quantized(product, real, shape, grid).name)
        return self._operator("Add", step.output, parts)

    def _planes(self, step: MatMul, left: str, right: str) -> list[str]:
        """Return the right operand; 16 bits become two int8 planes, as no runtime multiplies 16 by 16."""
        grid = self.grid(step.right)
        if not grid.format.is_split:
            return [right]
        shape = self.shape(step.right)
        # Residual terms may have widened both operands.
        shape[2] = self.graph.shape(left)[3]
        high_grid = Quantization(format=INT8, scale=PLANE_RATIO * grid.scale)
        low_grid = Quantization(format=INT8, scale=grid.scale)
        name = f"{step.output}/right"
        high = self._stored(f"{name}/high", right, shape, high_grid)
        # Both are on one grid: Hexagon subtracts tensors of two scales up to 20 steps wrong.
        widened = self._stored(f"{name}/high/wide", high, shape, grid)
        rest = self.graph.node("Sub", [right, widened], f"{name}/rest/float", shape)
        wide = self._stored(f"{name}/rest", rest, shape, grid)
        return [high, self._stored(f"{name}/low", wide, shape, low_grid)]

    def add(self, step: Add, left: Value, right: Value) -> Value:
        return self._sum(step, [self.plain(left).name, self._term(step, right)])

    def subtract(self, step: Subtract, left: Value, right: Value) -> Value:
        return self._sum(step, [self.plain(left).name, self._term(step, right)], "Sub")

    def _term(self, step: Add | Subtract, right: Value) -> str:
        full = self.profile.full_masks and self.batch is not None
        blocks = self.plan.program.shapes[step.output].blocks if full else 0
        return self.plain(self.operand(right, blocks, self.plan.term_grid(step))).name

    def multiply(self, step: Multiply, left: Value, right: Value) -> Value:
        scale = product_scale(self.grid(step.left).scale, self.grid(step.right).scale)
        return self._product(step, [self.plain(left).name, self.plain(right).name], scale)

    def exponential(self, step: Exponential, source: Value) -> Value:
        return self._operator("Exp", step.output, [self.plain(source).name])

    def _sum(self, step: Add | Subtract | Rescale, operands: list[str], operator: str = "Add") -> Value:
        """Append a sum of two dequantized tensors, in a form that none folds where that loses too much.

        A sum that begins with a product is its accumulator, and stays a float
        Add: so the identity is multiplied, which changes no value.
        """
        if is_far(step, self.plan.tensors):
            operands = [self._times_identity(f"{step.output}/unfolded", step, operands[0]), operands[1]]
        return self._operator(operator, step.output, operands)

    def _product(self, step: Rescale | Scale | Multiply, operands: list[str], scale: float) -> Value:
        """Append an elementwise product of dequantized tensors, one step of which is worth ``scale``.

        Where that is so far above one step of the result that kernels leave
        int32, all products but zero saturate.  So they are rounded onto their own
        grid first, and onto that of the result by a product with the identity.
        """
        name = step.output
        if not is_far(step, self.plan.tensors):
            return self._operator("Mul", name, operands)
        real = self.graph.node("Mul", operands, f"{name}/own/float", self.shape(name))
        own = self._stored(f"{name}/own", real, self.shape(name), Quantization(format=INT8, scale=scale))
        return self._finished(name, self._times_identity(self._float(name), step, own))

    def _times_identity(self, name: str, step: Step, operand: str) -> str:
        eye = np.eye(self.plan.program.shapes[step.output].columns, dtype=np.int8)[None, None]
        factors = [operand, self.literal(f"identity/{eye.shape[-1]}", eye, MASK_GRID)]
        return self.graph.node("MatMul", factors, name, self.shape(step.output))

    def rescale(self, step: Rescale, source: Value) -> Value:
        if self.keeps_integers(step):
            return replace(source, tensor=step.output)
        source = self.plain(source)
        if step.factor != 1:
            scale = product_scale(self.grid(step.source).scale, abs(step.factor))
            return self._product(step, [source.name, self._factor(step.factor)], scale)
        given, wanted = self.grid(step.source).format, self.grid(step.output).format
        # A float that is also read as it is needs another tensor for what is rounded of it.
        if given.container_bits != wanted.container_bits and not given.is_float:
            return self._finished(step.output, source.name)
        # Adding zero keeps an operator between the two scales: back ends merge
        # adjacent quantize/dequantize pairs, which would skip one rounding.
        zero = self.literal("zero", np.zeros((1, 1, 1, 1), dtype=np.int8), self.grid(step.output))
        return self._sum(step, [source.name, zero])

    def scale(self, step: Scale, source: Value, vector: Value) -> Value:
        factor = self.factors[vector_name(step.vector, step.axis)]
        scale = product_scale(self.grid(step.source).scale, self.grid(step.vector).scale)
        return self._product(step, [self.plain(source).name, factor.name], scale)

    def mask(self, step: Mask, source: Value, constant: Value) -> Value:
        assert constant.constant is not None
        matrix, fmt = constant_support(constant.constant).astype(np.int8), self.grid(step.output).format
        grid = MASK_GRID
        if fmt.whole:
            matrix, grid = matrix * np.int16(WIDE_ONE), Quantization(format=fmt, scale=1 / WIDE_ONE)
        if self.profile.full_masks and self.batch is not None:
            blocks = self.plan.program.shapes[step.output].blocks
            mask = self.repeated(f"{constant.tensor}/{blocks * self.batch}", matrix, blocks, grid)
        else:
            mask = self.literal(constant.tensor, matrix[None, None], grid)
        return self._operator("Mul", step.output, [self.plain(source).name, mask])

    def transpose(self, step: Transpose, source: Value) -> Value:
        return self._moved("Transpose", step, [self.plain(source).name], perm=TRANSPOSED)

    def slice(self, step: Slice, source: Value) -> Value:
        source = self.movable(step, source)
        value = self._moved("Slice", step, [source.name, *self.slice_inputs(step)])
        return replace(value, ones=sliced_ones(step, source.ones))

    def _moved(self, operator: str, step: Slice | Transpose, inputs: list[str], **attributes: Any) -> Value:
        grid, shape = self.grid(step.output), self.shape(step.output)
        value = self.graph.node(operator, inputs, self._float(step.output), shape, **attributes)
        # The values are already on the grid, as in `joined`.
        return Value(self._stored(step.output, value, shape, grid), step.output)

    def _factor(self, factor: float) -> str:
        # An integer times a scale, like every other operand of the graph: exact in float32.
        name, sign = ("plus_one", 1) if factor > 0 else ("minus_one", -1)
        grid = Quantization(format=INT8, scale=abs(factor))
        return self.literal(name, np.full((1, 1, 1, 1), sign, dtype=np.int8), grid)

    def _operator(self, operator: str, tensor: str, inputs: list[str]) -> Value:
        return self._finished(
            tensor, self.graph.node(operator, inputs, self._float(tensor), self.shape(tensor))
        )

    @staticmethod
    def _float(tensor: str) -> str:
        return f"{tensor}/float"

    def _finished(self, tensor: str, value: str) -> Value:
        return self._quantized(tensor, value, self.shape(tensor), self.grid(tensor))

    def _quantized(self, tensor: str, value: str, shape: Sizes, grid: Quantization) -> Value:
        if 2**grid.format.container_bits > grid.format.maximum - grid.format.minimum + 1:
            value = self._clipped(tensor, value, shape, grid)
        return Value(self._stored(tensor, value, shape, grid), tensor)

    def _clipped(self, tensor: str, value: str, shape: Sizes, grid: Quantization) -> str:
        """Saturate at the ends of a format that its container exceeds."""
        if self._integer_residuals:
            # First onto the whole container, because compilers fuse a product with its QuantizeLinear only.
            value = self._stored(f"{tensor}/wide", value, shape, grid)
        fmt = grid.format
        ends = [
            self.graph.scalar(f"clip/{end!r}", end)
            for end in ((fmt.minimum - CLIP_MARGIN) * grid.scale, (fmt.maximum + CLIP_MARGIN) * grid.scale)
        ]
        return self.graph.node("Clip", [value, *ends], f"{tensor}/clip", shape)

    def _stored(self, name: str, value: str, shape: Sizes, grid: Quantization) -> str:
        if grid.format.is_float:
            return value
        fmt, stored = self.storage(grid), self.stored(name)
        inputs = [value, self.scale_of(grid), self.zero_point(fmt)]
        self.graph.node("QuantizeLinear", inputs, stored, shape, fmt.element)
        return self._dequantize(f"{name}/dequantized", stored, shape, grid)

    def _dequantize(
        self, name: str, values: str, shape: Sizes, grid: Quantization, stored: IntFormat | None = None
    ) -> str:
        inputs = [values, self.scale_of(grid), self.zero_point(stored or self.storage(grid))]
        return self.graph.node("DequantizeLinear", inputs, name, shape)


LOWERING = QdqLowering
