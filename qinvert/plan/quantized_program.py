"""A program with a grid for every tensor: what the simulator, kernels, proof and lowering take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any

from qinvert.numerics.accumulators import check_accumulator
from qinvert.plan.integer_product import PRODUCTS, IntegerProduct, integer_product
from qinvert.plan.quantization import (
    CONSTANT_GRID,
    Quantization,
    Requantize,
    check_floats,
    check_moves,
    check_names,
    check_single_planes,
    constant_grid,
    requantize_named,
)
from qinvert.program.cost import inner_size
from qinvert.program.step_list import StepList
from qinvert.program.steps import Add, Rescale, Step, Subtract


def construction(instance: Any) -> tuple[Callable[[], Any], tuple[()]]:
    """How a frozen dataclass that holds read-only mappings is made anew, for pickle and copy.

    Python pickles no read-only mapping.  Processes send each other the plans of layers.
    """
    given = {one.name: getattr(instance, one.name) for one in fields(instance) if one.init}
    plain = {name: dict(x) if isinstance(x, MappingProxyType) else x for name, x in given.items()}
    made: Callable[..., Any] = type(instance)
    return partial(made, **plain), ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedProgram:
    """A program, the grid of every tensor, and how products become integers again.

    Invariants: every tensor of the program has a quantization and no other
    name has one; tensors that slices, masks and concats connect share it;
    every accumulator fits the target's; with `Requantize.MULTIPLIER`, residual terms
    are exact integers of the accumulator (see `IntegerProduct.identity`).

    Raises
    ------
    PlanError
        At construction, naming the tensor and the remedy.
    """

    program: StepList
    tensors: Mapping[str, Quantization]
    requantize: Requantize
    #: What every product means in integers, by its output.  It is derived.
    products: Mapping[str, IntegerProduct] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requantize", requantize_named(self.requantize))
        check_names(self.program, self.tensors)
        # Tensors keep the program's order, because equal plans must give equal files.
        ordered = {name: self.tensors[name] for name in self.program.tensors}
        object.__setattr__(self, "tensors", MappingProxyType(ordered))
        check_floats(self.program, self.tensors)
        check_moves(self.program, self.tensors)
        if self.requantize is Requantize.MULTIPLIER:
            check_single_planes(self.tensors)
        object.__setattr__(self, "products", MappingProxyType(self._read_products()))
        for product in self.products.values():
            check_accumulator(product.bound, product.limit)
            if self.requantize is Requantize.MULTIPLIER:
                # This refuses factors that overflow.
                _ = product.factor

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return construction(self)

    def keeps_integers(self, step: Rescale) -> bool:
        """Whether a rescaling changes nothing: its factor is 1, and both tensors have one grid.

        Then no interpreter rounds.  To round again would not be the identity on
        two planes: 128.3 steps round to (1, -128), but 128 steps to (0, 127).
        """
        return step.factor == 1 and self.tensors[step.source] == self.tensors[step.output]

    def is_real(self, step: Step) -> bool:
        """Whether a step reads or writes float32, so that it computes with real numbers."""
        return any(self.grid(name).format.is_float for name in (*step.inputs, step.output))

    def grid(self, name: str) -> Quantization:
        """Return the grid of a tensor or of a constant."""
        return self.tensors.get(name, CONSTANT_GRID)

    def term_grid(self, step: Add | Subtract) -> Quantization:
        """Return the grid of the right operand of a sum, see `constant_grid`."""
        return self.tensors.get(step.right) or constant_grid(self.tensors[step.left])

    def grids_of(self, step: Step) -> list[Quantization]:
        """Return the grids of what a step reads, in the order of its inputs, and of what it writes."""
        inputs = [self.grid(name) for name in step.inputs]
        if isinstance(step, (Add, Subtract)):
            inputs[1] = self.term_grid(step)
        return [*inputs, self.tensors[step.output]]

    def _read_products(self) -> dict[str, IntegerProduct]:
        grids = {**self.tensors, **{c.name: CONSTANT_GRID for c in self.program.constants}}
        return {
            step.output: integer_product(step, grids, self.requantize, inner_size(self.program, step))
            for step in self.program.steps
            if isinstance(step, PRODUCTS) and not self.is_real(step)
        }

    @property
    def chunk(self) -> int:
        """Size C of a chunk."""
        return self.program.chunk

    @property
    def input(self) -> Quantization:
        """Grid of the first input: of M = -L, or of K where an inverse is factored."""
        return self.tensors[self.program.inputs[0].tensor]

    @property
    def output(self) -> Quantization:
        """Grid of the first output."""
        return self.tensors[self.program.outputs[0].tensor]

    @property
    def formats(self) -> str:
        """Names of the formats in use, joined by ``+``."""
        return "+".join(dict.fromkeys(q.format.name for q in self.tensors.values()))
