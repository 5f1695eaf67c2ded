"""Integer lowering: MatMulInteger and int8 tensors, the literal integer program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from qinvert.export.graph import ELEMENT_TYPES, Sizes
from qinvert.export.lowering.base import GraphLowering, Value
from qinvert.export.lowering.tensors import TRANSPOSED, IntArray, vector_name
from qinvert.formats import INT8, PLANE_RATIO, IntFormat
from qinvert.numerics.scalar import planes_scalar
from qinvert.plan.carried_identity import sliced_ones
from qinvert.plan.integer_product import PlanePair
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
    Subtract,
    Transpose,
)


class IntegerLowering(GraphLowering):
    """Values are 8-bit tensors; each node computes one float32 rounding of the simulator."""

    #: How the graph stores integers.
    stored_format: ClassVar[IntFormat] = INT8

    def source(self, tensor: str, name: str) -> Value:
        if self._is_float(tensor):
            return self.given_float(tensor, name)
        if tensor in self.integer_inputs:
            return Value(self.entry(tensor, name), tensor)
        return self._quantized(tensor, name, self.grid(tensor).scale)

    def converted(self, name: str, result: Value) -> None:
        if self.converts(result.tensor):
            super().converted(name, result)
        self.copied(name, result)

    def finish(self, name: str, result: Value) -> str:
        grid, tensor = self.grid(result.tensor), result.tensor
        if grid.format.is_float:
            self.copied(name, result)
            return name
        if grid.format.planes > 1:
            return self._sum(name, tensor, [("Add", result)])
        inputs = [result.name, self.scale_of(grid), self.zero_point(self.stored_format)]
        return self.graph.node("DequantizeLinear", inputs, name, self.shape(tensor))

    def _is_float(self, tensor: str) -> bool:
        return self.grid(tensor).format.is_float

    def _element(self, grid: Quantization) -> str:
        return grid.format.element if grid.format.is_float else self.stored_format.element

    def value(self, tensor: str) -> Value:
        """Return the value of a tensor of the program that was written before."""
        high, *low = self.plane_names(tensor)
        return Value(high, tensor, low="".join(low))

    def shifted(self, name: str, tensor: str, value: str, identity: str) -> str:
        return self.graph.node("Add", [value, identity], name, self.shape(tensor), "int8")

    def literal(self, name: str, array: IntArray, grid: Quantization, *, spread: bool = False) -> str:
        values = self.graph.initializer(f"{name}/int8", array)
        return self.spread(values, array, "int8") if spread else values

    def joined(self, name: str, parts: list[str], axis: int, shape: Sizes, grid: Quantization) -> str:
        return self.graph.node("Concat", parts, name, shape, self._element(grid), axis=axis)

    def matmul(
        self, step: MatMul, left: Value, right: Value, add: list[Value], subtract: list[Value]
    ) -> Value:
        name, right = step.output, self.operand(right)
        if self._integer_residuals:
            *operands, ones = self.widened(step, left, right)
            steps = self._product(name, step, operands)
            real = self._scaled(name, name, steps, self.plan.products[name].factor)
            return replace(self._quantized(name, real, 1.0), ones=ones)
        terms = [("Add", term) for term in add] + [("Sub", term) for term in subtract]
        total = self._sum(f"{name}/sum", name, terms, self._products(step, left, right))
        return self._quantized(name, total, self.grid(name).scale)

    def _products(self, step: MatMul, left: Value, right: Value) -> list[str]:
        name, accumulators = step.output, self.plan.products[step.output].accumulators
        several = len(left.planes) * len(right.planes) > 1
        reals: list[str] = []
        for i, part in enumerate(accumulators):
            stem = f"{name}/{i}" if several else name
            # Pairs of the same weight share an accumulator, in one product of twice the depth.
            lefts = [left.planes[pair.left] for pair in part.pairs]
            rights = [right.planes[pair.right] for pair in part.pairs]
            operands = (
                self.wide(f"{stem}/left", step.left, lefts, 3),
                self.wide(f"{stem}/right", step.right, rights, 2),
            )
            reals.append(self._scaled(stem, name, self._product(stem, step, operands), part.unit))
        return reals

    def _plane_scales(self, tensor: str) -> list[float]:
        grid = self.grid(tensor)
        return [scale for _, scale in planes_scalar(0, grid.scale, grid.format)]

    def _product(self, name: str, step: MatMul, operands: Sequence[str]) -> str:
        shape, (left, right) = self.shape(step.output), operands
        left, left_zero = self._left_operand(left)
        inputs = [left, right, left_zero, self.zero_point(self.stored_format)]
        accumulator = self.graph.node("MatMulInteger", inputs, f"{name}/accumulator", shape, "int32")
        return self.graph.node("Cast", [accumulator], f"{name}/cast", shape, to=1)

    def _left_operand(self, tensor: str) -> tuple[str, str]:
        """Return an int8 tensor as the profile multiplies it from the left, and its zero point."""
        fmt = self.profile.left_operand
        if fmt is None:
            return tensor, self.zero_point(self.stored_format)
        name = f"{tensor}/{fmt.element}"
        if name not in self.graph:
            # The cast wraps modulo 256; flipping the top bit is adding 128.
            shape, bit = self.graph.shape(tensor), np.array(fmt.zero_point, dtype=fmt.element)
            wrapped = self.graph.node(
                "Cast", [tensor], f"{name}/wrapped", shape, fmt.element, to=ELEMENT_TYPES[fmt.element]
            )
            self.graph.node(
                "BitwiseXor", [wrapped, self.graph.initializer("top_bit", bit)], name, shape, fmt.element
            )
        return name, self.zero_point(fmt)

    def _scaled(self, name: str, tensor: str, real: str, factor: float) -> str:
        constant = self.graph.scalar(f"factor/{factor!r}", factor)
        return self.graph.node("Mul", [real, constant], f"{name}/product", self.shape(tensor))

    def _sum(
        self, name: str, tensor: str, terms: list[tuple[str, Value]], first: list[str] | None = None
    ) -> str:
        """Append ``first[0] + first[1] ... +- terms``, left to right, every plane by itself."""
        summands = [("Add", real) for real in first or []]
        for i, (operator, value) in enumerate(terms, start=1):
            reals = self._reals(f"{name}/term_{i}", value)
            summands += [(operator, real) for real in reals]
        (_, total), *rest = summands
        for i, (operator, real) in enumerate(rest, start=1):
            output = name if i == len(rest) else f"{name}/partial_{i}"
            total = self.graph.node(operator, [total, real], output, self.shape(tensor))
        return total

    def add(self, step: Add, left: Value, right: Value) -> Value:
        return self._total(step.output, [("Add", left), ("Add", right)])

    def subtract(self, step: Subtract, left: Value, right: Value) -> Value:
        return self._total(step.output, [("Add", left), ("Sub", right)])

    def _total(self, name: str, terms: list[tuple[str, Value]]) -> Value:
        total = self._sum(f"{name}/sum", name, [(operator, self.plain(value)) for operator, value in terms])
        return self._quantized(name, total, self.grid(name).scale)

    def exponential(self, step: Exponential, source: Value) -> Value:
        name = step.output
        real = self._sum(f"{name}/source", name, [("Add", self.plain(source))])
        real = self.graph.node("Exp", [real], f"{name}/exponential", self.shape(name))
        return self._quantized(name, real, self.grid(name).scale)

    def rescale(self, step: Rescale, source: Value) -> Value:
        if self.keeps_integers(step):
            return replace(source, tensor=step.output)
        real = self._sum(f"{step.output}/scaled", step.output, [("Add", self.plain(source))])
        if step.factor != 1:
            real = self._scaled(step.output, step.output, real, step.factor)
        return self._quantized(step.output, real, self.grid(step.output).scale)

    def scale(self, step: Scale, source: Value, vector: Value) -> Value:
        return self._multiplied(step.output, source, self.factors[vector_name(step.vector, step.axis)])

    def multiply(self, step: Multiply, left: Value, right: Value) -> Value:
        return self._multiplied(step.output, left, right)

    def _multiplied(self, name: str, left: Value, right: Value) -> Value:
        left, right = self.plain(left), self.plain(right)
        if name not in self.plan.products:
            return self._real_product(name, left, right)
        product = self.plan.products[name]
        totals = [self._elementwise(name, left, right, part.pairs) for part in product.accumulators]
        if self._integer_residuals:
            real = self._scaled(name, name, totals[0], product.factor)
            return self._quantized(name, real, 1.0)
        reals = [
            self._scaled(f"{name}/{k}", name, total, part.unit)
            for k, (total, part) in enumerate(zip(totals, product.accumulators, strict=True))
        ]
        return self._quantized(name, self._sum(f"{name}/sum", name, [], reals), self.grid(name).scale)

    def _real_product(self, name: str, left: Value, right: Value) -> Value:
        """Append the product of two real numbers, one of which is not rounded."""
        reals = [
            self._sum(f"{name}/factor_{i}", value.tensor, [("Add", value)])
            for i, value in enumerate((left, right))
        ]
        real = self.graph.node("Mul", reals, f"{name}/product", self.shape(name))
        return self._quantized(name, real, self.grid(name).scale)

    def _elementwise(self, name: str, left: Value, right: Value, pairs: Sequence[PlanePair]) -> str:
        """Append the exact sum of products of planes, integers in float32."""
        shape, total = self.shape(name), ""
        for i, j in pairs:
            factors = [
                self._cast(value.planes[k], self.shape(value.tensor)) for value, k in ((left, i), (right, j))
            ]
            term = self.graph.node("Mul", factors, f"{name}/{i}x{j}", shape)
            total = self.graph.node("Add", [total, term], f"{name}/{i}x{j}/sum", shape) if total else term
        return total

    def _cast(self, plane: str, shape: Sizes) -> str:
        # What a product wrote has that name for its accumulator.
        output = f"{plane}/integers" if f"{plane}/accumulator" in self.graph else f"{plane}/cast"
        return output if output in self.graph else self._integers(plane, output, shape)

    def _integers(self, plane: str, output: str, shape: Sizes) -> str:
        """Append the integers of a plane in float32."""
        return self.graph.node("Cast", [plane], output, shape, to=1)

    def mask(self, step: Mask, source: Value, constant: Value) -> Value:
        assert constant.constant is not None
        # All bits set where the mask is 1.
        bits = -constant_support(constant.constant).astype(np.int8)[None, None]
        return self._move(
            "BitwiseAnd", step, self.plain(source), [self.graph.initializer(f"{constant.tensor}/bits", bits)]
        )

    def transpose(self, step: Transpose, source: Value) -> Value:
        return self._move("Transpose", step, self.plain(source), [], perm=TRANSPOSED)

    def slice(self, step: Slice, source: Value) -> Value:
        source = self.movable(step, source)
        value = self._move("Slice", step, source, self.slice_inputs(step))
        return replace(value, ones=sliced_ones(step, source.ones))

    def _move(
        self,
        operator: str,
        step: Mask | Slice | Transpose,
        source: Value,
        inputs: list[str],
        **attributes: Any,
    ) -> Value:
        shape = self.shape(step.output)
        names = zip(source.planes, self.plane_names(step.output), strict=True)
        for plane, name in names:
            self.graph.node(
                operator, [plane, *inputs], name, shape, self._element(self.grid(step.output)), **attributes
            )
        return self.value(step.output)

    def _reals(self, name: str, value: Value) -> list[str]:
        # Cast and Mul, not DequantizeLinear: optimizers fuse dequantize, operator and
        # quantize into kernels that round in another order.
        if value.constant is None and self._is_float(value.tensor):
            return [value.name]
        if value.constant is not None:
            ones = constant_support(value.constant).astype(np.float32)
            return [self.graph.initializer(f"{value.tensor}/float32", ones[None, None])]
        shape = self.shape(value.tensor)
        reals: list[str] = []
        for plane, scale in zip(value.planes, self._plane_scales(value.tensor), strict=True):
            stem = f"{name}/{len(reals)}"
            real = self._integers(plane, f"{stem}/cast", shape)
            constant = self.graph.scalar(f"scale/{scale!r}", scale)
            reals.append(self.graph.node("Mul", [real, constant], stem, shape))
        return reals

    def _quantized(self, tensor: str, value: str, scale: float) -> Value:
        fmt = self.grid(tensor).format
        if fmt.is_float:
            return Value(value, tensor)
        if fmt.planes == 1:
            self._rounded(tensor, value, scale, self.stored(tensor))
            return self.value(tensor)
        shape, (high, low) = self.shape(tensor), self.plane_names(tensor)
        high_scale = PLANE_RATIO * scale
        self._rounded(tensor, value, high_scale, high)
        real = self.graph.node("Cast", [high], f"{high}/cast", shape, to=1)
        constant = self.graph.scalar(f"scale/{high_scale!r}", high_scale)
        real = self.graph.node("Mul", [real, constant], f"{high}/real", shape)
        rest = self.graph.node("Sub", [value, real], f"{tensor}/rest", shape)
        self._rounded(tensor, rest, scale, low)
        return self.value(tensor)

    def _rounded(self, tensor: str, value: str, scale: float, output: str) -> str:
        fmt, shape, stored = self.grid(tensor).format, self.shape(tensor), self.stored_format
        inputs = [value, self.graph.scalar(f"scale/{scale!r}", scale), self.zero_point(stored)]
        if fmt.planes > 1 or (fmt.minimum, fmt.maximum) == (-128, 127):
            return self.graph.node("QuantizeLinear", inputs, output, shape, stored.element)
        # On the integers: optimizers drop a float Clip whose bounds are tiny.
        wide = self.graph.node("QuantizeLinear", inputs, f"{output}/wide", shape, "int8")
        bounds = [
            self.graph.initializer(f"clip/{q}", np.array(q, dtype=np.int8))
            for q in (fmt.minimum, fmt.maximum)
        ]
        return self.graph.node("Clip", [wide, *bounds], output, shape, "int8")


LOWERING = IntegerLowering
