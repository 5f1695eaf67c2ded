"""The programs that ``method="auto"`` chooses from, and how one of them is planned."""

from __future__ import annotations

import torch

from qinvert.errors import ProgramError
from qinvert.methods import AUTO, Candidates, Method, in_automatic_order, registered
from qinvert.metrics import ErrorStatistics, floor_inverse
from qinvert.plan.plan import LayerPlan
from qinvert.plan.quantization import Requantize
from qinvert.program.program import Program
from qinvert.simulation import simulate_inverse
from qinvert.systems import Systems


def candidate_programs(
    method: str,
    chunk: int,
    factored: bool = False,
    requantize: Requantize = Requantize.DIVIDE,
    on_chips: bool = False,
) -> list[Program]:
    """Return the programs among which ``method`` leaves a choice, for matrices of that size.

    Every method has its own candidates, see `qinvert.methods.Method`.  ``"auto"``
    takes those that the methods offer where no method is named, in their order.
    Residual terms that are not operands of their product need a target that takes
    the divide form; for other targets the factored candidates do not have such terms.
    With ``on_chips`` methods offer what they have for chips whose costs are known.

    Raises
    ------
    ProgramError
        If the method is unknown, or has no factored form.
    """
    methods = in_automatic_order() if method == AUTO else [registered(method)]
    if factored:
        return _factored(method, methods, chunk, requantize is Requantize.DIVIDE)
    each = [_offered(m, named=method != AUTO, on_chips=on_chips) for m in methods]
    programs = [program for candidates in each if candidates is not None for program in candidates(chunk)]
    # Small chunks make some candidates equal.
    return list({program.title: program for program in programs}.values())


def _offered(method: Method, named: bool, on_chips: bool) -> Candidates | None:
    if on_chips and method.on_chips is not None:
        return method.on_chips
    return method.candidates if named else method.automatic


def _factored(name: str, methods: list[Method], chunk: int, free_residuals: bool) -> list[Program]:
    each = [method.factored for method in methods if method.factored is not None]
    if not each:
        legal = ", ".join(method.name for method in in_automatic_order() if method.factored is not None)
        raise ProgramError(f"method {name!r} has no factored form; use {AUTO} or {legal}")
    return [program for candidates in each for program in candidates(chunk, free_residuals)]


def measure(
    plan: LayerPlan, systems: Systems, truth: torch.Tensor
) -> tuple[ErrorStatistics, ErrorStatistics]:
    """Return the errors of the simulated plan and of its floor on systems with exact inverses ``truth``."""
    achieved, floor = ErrorStatistics(), ErrorStatistics()
    achieved.update(simulate_inverse(plan, systems), truth)
    floor.update(floor_inverse(plan, systems), truth)
    return achieved, floor
