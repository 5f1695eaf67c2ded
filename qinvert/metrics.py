"""Errors of an approximate inverse, each defined once.

E is always T_hat - T, where T is the float64 inverse of the *unquantized* L.
The sqnr counts only the strictly lower part, because the identity on the
diagonal would hide errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qinvert.execution.inputs import assemble, program_inputs
from qinvert.matrices import solve
from qinvert.numerics import rounding
from qinvert.plan.quantization import Quantization
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.ports import Meaning
from qinvert.systems import Systems


@dataclass(slots=True)
class ErrorStatistics:
    """Streaming sums over matrices; memory does not grow with the data."""

    #: Sum of squares of tril(T, -1).
    signal: float = 0.0
    #: Sum of squares of tril(E, -1).
    noise: float = 0.0
    #: Matrices seen.
    matrices: int = 0
    #: max over matrices of ||E||_F / ||T||_F.
    worst_rel: float = 0.0
    #: max|E|.
    max_abs: float = 0.0
    #: Values of T_hat that are NaN or Inf.
    non_finite: int = 0

    def update(self, estimate: torch.Tensor, exact: torch.Tensor) -> None:
        """Add matrices ``(..., C, C)``: an approximate T and the float64 one."""
        size = exact.shape[-1]
        estimate = estimate.to(torch.float64).reshape(-1, size, size)
        exact = exact.reshape(-1, size, size)
        error = estimate - exact
        self.matrices += error.shape[0]
        self.non_finite += int((~torch.isfinite(estimate)).sum())
        self.signal += float(torch.tril(exact, -1).square().sum())
        self.noise += float(torch.tril(error, -1).square().sum())
        relative = torch.linalg.matrix_norm(error) / torch.linalg.matrix_norm(exact)
        self.worst_rel = _largest(self.worst_rel, float(relative.max()))
        self.max_abs = _largest(self.max_abs, float(error.abs().max()))

    @property
    def sqnr_db(self) -> float:
        """``20 log10(||tril(T, -1)|| / ||tril(E, -1)||)`` over all matrices together.

        ``inf`` if there is no error; ``-inf`` if an estimate was not finite, or
        if the signal is zero and the error is not.
        """
        return -math.inf if self.non_finite else ratio_db(self.signal, self.noise)


@dataclass(slots=True)
class NoiseStatistics:
    """Streaming sums over vectors that are computed from T, to measure what its error does to them."""

    #: Sum of squares of the exact values.
    signal: float = 0.0
    #: Sum of squares of the errors.
    noise: float = 0.0

    def update(self, estimate: torch.Tensor, exact: torch.Tensor) -> None:
        """Add values of any shape."""
        exact = exact.to(torch.float64)
        self.signal += float(exact.square().sum())
        self.noise += float((estimate.to(torch.float64) - exact).square().sum())

    @property
    def sqnr_db(self) -> float:
        """``20 log10(||x|| / ||x_hat - x||)`` over all values together, as for T."""
        return ratio_db(self.signal, self.noise)


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of sums of squares.

    ``inf`` if there is no noise; ``-inf`` if the noise is not finite, or if the
    signal is zero and the noise is not.
    """
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def norm_share(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``||x - y|| / ||y||`` in float64; 0 where x is y, also where both are zero.  NaN stays NaN."""
    wanted = wanted.to(torch.float64)
    difference = float((found.to(torch.float64) - wanted).norm())
    return difference / max(float(wanted.norm()), 1e-30) if difference else 0.0


def _largest(old: float, new: float) -> float:
    return math.inf if math.isnan(new) else max(old, new)


def floor_inverse(plan: QuantizedProgram, systems: Systems) -> torch.Tensor:
    """Return the best that any algorithm can do on the plan's input and output grids.

    It is the exact inverse of the quantized L, put onto the output's grid.  Where
    the program is factored, it is that of the quantized K and beta, put onto W's
    grid.  What a plan loses against this floor is what its *algorithm* loses.

    Parameters
    ----------
    plan : QuantizedProgram
        Plan of a program that computes an inverse.
    systems : Systems
        Checked systems, with beta where the program takes it.

    Returns
    -------
    torch.Tensor
        float32 ``(..., C, C)``.
    """
    ports = plan.program.inverse_ports
    inputs = {
        name: _on_grid(value, plan.tensors[name])
        for name, value in program_inputs(plan.program, systems, torch.float32).items()
    }
    source = inputs[ports.matrix]
    exact = solve(-source if ports.beta is None else -source * inputs[ports.beta])
    if ports.factored:
        # W = K T also holds where the quantized beta is 0.
        exact = source.to(torch.float64) @ exact
    # A solve that overflows ends in inf - inf, which is NaN; let these values saturate.
    exact = torch.nan_to_num(exact, nan=math.inf)
    if ports.form is Meaning.STRICT_INVERSE:
        exact = torch.tril(exact, -1)
    return assemble(plan.program, _on_grid(exact, plan.output).reshape(systems.lower.shape), systems)


def _on_grid(values: torch.Tensor, grid: Quantization) -> torch.Tensor:
    integers = rounding.quantize(values, grid.scale, grid.format)
    return rounding.dequantize(integers, grid.scale, grid.format)
