"""Which integers a float32 graph of a plan may return, and not only the simulator's.

A QDQ graph is defined over floats.  A runtime that multiplies in float32 adds
the products in any order, so a sum of n of them may be off by

    (n + 8) 2^-24 sum |a| |b|,

and a value that lies closer than this to a rounding boundary may fall on its
other side.  The next product multiplies that step.  So every value gets an
interval of integers: `qinvert.proof.intervals` carries them through the
program, and here each rounding is opened by that error.  Where no value comes
near a boundary, every interval is the simulator's integer.

On grids that are powers of two, float32 holds every product and every sum of
less than 2^24 steps exactly, in any order: nothing is opened there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from qinvert.execution.inputs import only, program_inputs
from qinvert.execution.simulator import simulate_integers
from qinvert.formats import INT8
from qinvert.numerics import rounding
from qinvert.numerics.accumulators import FLOAT32_EXACT
from qinvert.numerics.exponentials import MAX_ULPS
from qinvert.numerics.folded_sums import MAX_LOSS, folded_loss
from qinvert.numerics.scales import is_power_of_two
from qinvert.plan.integer_product import Accumulator, IntegerProduct
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.cost import inner_size
from qinvert.program.steps import Exponential, Rescale
from qinvert.proof.interval_arithmetic import join, magnitude, oriented, split
from qinvert.proof.intervals import IntervalEvaluator, Term
from qinvert.systems import Systems

#: Largest relative error of one float32 operation.
ROUNDOFF: Final = 2.0**-24
#: Operations around a sum: two scales, the product with them, the division, and their inverses.
OPERATIONS: Final = 8
#: Relative error of an input: a runtime may multiply by the reciprocal of the scale.
INPUT_ERROR: Final = 4 * ROUNDOFF
#: Error of an L that the graph builds from keys, relative to its largest element: two runs of one
#: part of a graph may add in two orders.
KEYS_ERROR: Final = 2.0**-16
#: Matrices whose intervals are computed at once.
BATCH: Final = 64


def reach(plan: LayerPlan, systems: Systems, *, from_keys: bool = False) -> npt.NDArray[np.float64]:
    """Largest difference of a float32 graph from the simulator, in steps of the output's grid.

    Parameters
    ----------
    plan : LayerPlan
        Of an inverse.
    systems : Systems
        Flat.
    from_keys : bool
        Whether the graph builds L, so that L is known up to `KEYS_ERROR` only.

    Returns
    -------
    array
        float64 ``[N, C, C]``; 0 where every order of summation gives the simulator's integer.
    """
    parts = [_reach(plan, part, from_keys) for part in _batches(systems)]
    found: npt.NDArray[np.float64] = np.concatenate(parts)
    return found


def _batches(systems: Systems) -> Sequence[Systems]:
    beta = None if systems.beta is None else systems.beta.cpu()
    near = Systems(lower=systems.lower.cpu(), beta=beta)
    return [near[start : start + BATCH] for start in range(0, near.count, BATCH)]


def _reach(plan: LayerPlan, systems: Systems, from_keys: bool) -> npt.NDArray[np.float64]:
    evaluator = ReachEvaluator(plan, systems.count)
    with torch.autocast("cpu", enabled=False):
        inputs = {
            name: evaluator.given(name, value, from_keys)
            for name, value in program_inputs(plan.program, systems, torch.float32).items()
        }
        low, high = split(only(plan.program.evaluate(evaluator, inputs)))
    middle = simulate_integers(plan, systems)
    return torch.maximum(high - middle, middle - low).to(torch.float64).numpy()


class ReachEvaluator(IntervalEvaluator):
    """Intervals of the integers of several matrices, every rounding opened by the error of float32 sums."""

    def __init__(self, plan: QuantizedProgram, batch: int) -> None:
        super().__init__(plan, batch)

    def given(self, name: str, value: torch.Tensor, from_keys: bool) -> torch.Tensor:
        """Interval of an input ``[N, rows, columns]`` in real units."""
        largest = value.abs()
        grid = self.plan.tensors[name]
        relative = 0.0 if is_power_of_two(grid.scale) else INPUT_ERROR
        error = largest.amax().expand_as(value) * KEYS_ERROR if from_keys else largest * relative
        # What is zero stays zero: above the diagonal nothing is computed.
        error = torch.where(value == 0, 0.0, error)
        return rounding.quantize(join(value - error, value + error), grid.scale, grid.format)

    def opened(
        self, reading: IntegerProduct, part: Accumulator, total: torch.Tensor, largest: torch.Tensor
    ) -> torch.Tensor:
        step = reading.step
        terms = inner_size(self.plan.program, step) * len(part.pairs)
        terms += sum(reading.identity_parts(term.tensor).number for term in part.residuals)
        error = (terms + OPERATIONS) * ROUNDOFF * largest
        if all(is_power_of_two(grid.scale) for grid in (reading.left, reading.right, reading.output)):
            # A single product is rounded once in float32, here and in the simulator.
            error = torch.where((largest <= FLOAT32_EXACT) | (terms == 1), 0.0, error)
        return _widened(total, error)

    def _sum(self, name: str, terms: list[Term]) -> torch.Tensor:
        grid = self.plan.tensors[name]
        largest = torch.stack([magnitude(ends).to(torch.float64) * abs(unit) for ends, unit in terms]).sum(0)
        error = (len(terms) + OPERATIONS) * ROUNDOFF * largest
        units = [abs(unit) for _, unit in terms]
        if all(map(is_power_of_two, (*units, grid.scale))):
            error = torch.where(largest <= FLOAT32_EXACT * min(units), 0.0, error)
        if grid.format.container_bits == INT8.container_bits:
            # Beyond the largest loss the graph has another form, which loses nothing.
            error += min(MAX_LOSS, folded_loss(units, grid.scale)) * grid.scale
        return super()._sum(name, [*terms, (join(-error, error), 1.0)])

    def rescale(self, step: Rescale, source: torch.Tensor) -> torch.Tensor:
        if step.factor == 1:
            return super().rescale(step, source)
        grid, output = self.plan.tensors[step.source], self.plan.tensors[step.output]
        value = oriented(rounding.dequantize(source, grid.scale, grid.format), step.factor) * step.factor
        if not all(map(is_power_of_two, (grid.scale, step.factor, output.scale))):
            value = _widened(value, OPERATIONS * ROUNDOFF * magnitude(value))
        return rounding.quantize(value, output.scale, output.format)

    def exponential(self, step: Exponential, source: torch.Tensor) -> torch.Tensor:
        grid, output = self.plan.tensors[step.source], self.plan.tensors[step.output]
        value = torch.exp(rounding.dequantize(source, grid.scale, grid.format).to(torch.float64))
        # exp(0) is 1 in every library.
        error = torch.where(value == 1, 0.0, (2 * MAX_ULPS + OPERATIONS) * ROUNDOFF * value)
        (low, high), (below, above) = split(value), split(error)
        return rounding.quantize(join(low - below, high + above), output.scale, output.format)


def _widened(interval: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    low, high = (end.to(torch.float64) for end in split(interval))
    return join(low - error, high + error)
