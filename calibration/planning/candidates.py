"""The programs that ``method="auto"`` chooses from, and how one of them is planned."""

from __future__ import annotations

from typing import Final

import torch

from qinvert.errors import ProgramError
from qinvert.methods import find_method
from qinvert.methods.banded_residual import banded_residual
from qinvert.methods.block_merge import block_merge
from qinvert.methods.neumann import neumann
from qinvert.metrics import ErrorStatistics, floor_inverse
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.program.program import Program
from qinvert.simulation import simulate_inverse

#: Tiles in which merges are masked products: fewer, wider steps than blocks alone.
TILE: Final = 16


def candidate_programs(
    method: str, chunk: int, factored: bool = False, requantize: Requantize = Requantize.DIVIDE
) -> list[Program]:
    """Return what ``method`` leaves to choose from for matrices of that size.

    ``"auto"``: short series, block merges by base and correction, and one
    banded residual; ``"block_merge"``: its bases and corrections;
    ``"banded_residual"``: its orders and steps; any other method: its defaults.
    Of the factored ones: a block merge, and one with a correction where the
    target takes the divide form, which its residual ``- W`` needs.

    Raises
    ------
    ProgramError
        If the method is unknown, or has no factored form.
    """
    if factored:
        if find_method(method if method != "auto" else "block_merge") is not block_merge:
            raise ProgramError(f"method {method!r} has no factored form; use auto or block_merge")
        corrections = (0, 1) if requantize is Requantize.DIVIDE else (0,)
        return [block_merge(chunk, corrections=k, factored=True) for k in corrections]
    match method:
        case "auto":
            short = [neumann(chunk, order) for order in (1, 2, 3) if order < chunk]
            return [*short, *_merges(chunk), *([banded_residual(chunk)] if chunk > 2 else [])]
        case "block_merge":
            return _merges(chunk)
        case "banded_residual":
            return _banded(chunk)
    return [find_method(method)(chunk)]


def _merges(chunk: int) -> list[Program]:
    bases = [base for base in (16, 8, 4, 2) if base <= chunk]
    return [block_merge(chunk, base, tile=min(TILE, chunk), corrections=k) for k in (0, 1) for base in bases]


def _banded(chunk: int) -> list[Program]:
    # Steps from half of what is exact: fewer leave most diagonals to the band alone.
    orders = [order for order in (1, 3, 7) if order < chunk]
    return [
        banded_residual(chunk, order, steps)
        for order in orders
        for steps in sorted({max(1, chunk // (order + 1) // 2), chunk // (order + 1)})
    ]


def measure(
    plan: LayerPlan, systems: Systems, truth: torch.Tensor
) -> tuple[ErrorStatistics, ErrorStatistics]:
    """Return the errors of the simulated plan and of its floor on systems with exact inverses ``truth``."""
    achieved, floor = ErrorStatistics(), ErrorStatistics()
    achieved.update(simulate_inverse(plan, systems), truth)
    floor.update(floor_inverse(plan, systems), truth)
    return achieved, floor

