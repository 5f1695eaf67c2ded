"""What a graph should return: the simulator's values, and how to read T from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qinvert.errors import InputError, PlanError
from qinvert.execution.inputs import assemble, needed
from qinvert.execution.laws import LAWS
from qinvert.execution.simulator import simulate_integers
from qinvert.export.interface import KEYS, LOG_DECAY, GraphInput, GraphOutput, Interface
from qinvert.formats import IntFormat
from qinvert.matrices import as_tensor, row_factors
from qinvert.numerics.law import Rounding
from qinvert.numerics.rounding import dequantize
from qinvert.plan.plan import LayerPlan
from qinvert.program.ports import BETA
from qinvert.program.steps import MAX_BETA
from qinvert.stress import from_keys
from qinvert.systems import Systems

Returned: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What one graph should return for some matrices."""

    plan: LayerPlan
    #: How integers are stored; None where the graph returns T.
    storage: IntFormat | None
    #: Difference that counts as one step, for every matrix ``[N, C or 1, 1]``.
    unit: npt.NDArray[np.float32]
    #: The simulator's values ``[N, C, C]``, of the type that the graph returns.
    expected: Returned
    #: The exact inverse, float64.
    truth: torch.Tensor
    #: What was inverted.
    systems: Systems
    #: Whose integers are expected.
    rounding: Rounding
    #: Whether the graph builds L from keys.
    from_keys: bool = False

    def inverse(self, returned: Returned) -> torch.Tensor:
        """T of what a graph returned, float32."""
        if self.storage is None:
            return torch.from_numpy(returned)
        grid = self.plan.output
        integers = torch.from_numpy(returned.astype(np.float32) - self.storage.zero_point)
        beta = None if self.systems.beta is None else self.systems.beta.cpu()
        systems = Systems(lower=self.systems.lower.cpu(), beta=beta)
        return assemble(self.plan.program, dequantize(integers, grid.scale, grid.format), systems)


def reference(
    plan: LayerPlan,
    interface: Interface,
    storage: IntFormat,
    systems: Systems,
    rounding: Rounding = Rounding.ONNX,
) -> Reference:
    """Return what a graph should return for flat systems.

    ``rounding`` is used for plans for which it is known; for others ONNX's is expected.
    """
    rounding = rounding if _is_known(rounding, plan, interface) else Rounding.ONNX
    unit = torch.ones(systems.count, 1, 1, dtype=torch.float32)
    integers = interface.output is GraphOutput.INTEGERS
    if integers:
        result = simulate_integers(plan, systems, rounding=rounding).cpu().numpy()
        expected = (result + storage.zero_point).astype(storage.element)
    else:
        expected = plan.inverse(systems.lower, systems.beta, rounding=rounding).cpu().numpy()
        unit = unit * plan.output.scale
        beta = systems.beta
        unit = unit if beta is None else unit * row_factors(beta, torch.float32).cpu()
    return Reference(
        plan=plan,
        storage=storage if integers else None,
        unit=unit.numpy(),
        expected=expected,
        truth=systems.inverse(),
        systems=systems,
        rounding=rounding,
        from_keys=interface.input is GraphInput.KEYS,
    )


def _is_known(rounding: Rounding, plan: LayerPlan, interface: Interface) -> bool:
    law = LAWS[rounding]
    try:
        law.check(plan)
    except PlanError:
        return False
    return interface.has_integer_ends or not law.needs_integer_ends(plan)


def graph_inputs(plan: LayerPlan, interface: Interface, given: Any, beta: Any) -> dict[str, torch.Tensor]:
    """Return checked float32 inputs ``[N, rows, columns]`` of a graph, by name.

    Raises
    ------
    InputError
        If they are not legal, or not what the graph takes.
    """
    if interface.input is GraphInput.KEYS:
        return _keys(plan, interface, given)
    if isinstance(given, Mapping):
        raise InputError(
            f"the graph takes {interface.input}; pass matrices, not {', '.join(map(str, given))}"
        )
    rows = beta if plan.program.inverse_ports.factored else None
    systems = needed(plan.program, Systems.checked(given, rows, chunk=plan.chunk)).flat().to(torch.float32)
    matrix = systems.lower if interface.input is GraphInput.L else -systems.lower
    found = {str(interface.input): matrix}
    return found if systems.beta is None else found | {BETA: systems.beta.unsqueeze(-1)}


def _keys(plan: LayerPlan, interface: Interface, given: Any) -> dict[str, torch.Tensor]:
    names = (KEYS, BETA, LOG_DECAY)
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise InputError("the graph builds L from keys; pass {'k': ..., 'beta': ..., 'g': ...} instead of L")
    k, beta, g = (as_tensor(given[name], name).to(torch.float32) for name in names)
    rows = k.shape[:-1]
    if k.ndim < 2 or k.shape[-2:] != (plan.chunk, interface.key_size) or not beta.shape == g.shape == rows:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in zip(names, (k, beta, g), strict=True))
        raise InputError(
            f"{shapes} do not fit; pass k (..., {plan.chunk}, {interface.key_size}), beta and g without the "
            "last axis"
        )
    # NaN fails every comparison.
    legal = bool(torch.isfinite(k).all()) and bool(((beta >= 0) & (beta <= MAX_BETA)).all())
    if not legal or not bool(((g <= 0) & torch.isfinite(g)).all()):
        raise InputError(f"k and g must be finite, beta in [0, {MAX_BETA:g}] and g at most 0")
    columns = {name: x.reshape(-1, plan.chunk, 1) for name, x in ((BETA, beta), (LOG_DECAY, g))}
    return {KEYS: k.reshape(-1, *k.shape[-2:]), **columns}


def lower_from_keys(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """L in float64, by `qinvert.stress.from_keys`."""
    k, beta, g = (inputs[name].to(torch.float64) for name in (KEYS, BETA, LOG_DECAY))
    return from_keys(k, beta.squeeze(-1), g.squeeze(-1))
