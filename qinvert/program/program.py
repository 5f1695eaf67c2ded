"""Programs as pure data: a flat list of typed steps over named tensors.

A program of a triangular inverse computes the strictly lower part ``S`` of

    T = (I - M)^-1 = I + S,        M = -L strictly lower triangular,

from its port ``M``; `qinvert.program.ports.Meaning` names the other forms.
Other programs have any ports.  Float execution, observation, integer
simulation, proof, cost, ONNX lowering and kernels are all interpreters of the
same list: each implements `Evaluator` and is driven by `Program.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qinvert.program.cost import Cost, program_cost
from qinvert.program.printing import step_table
from qinvert.program.step_list import StepList

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Program(StepList):
    """A `StepList` that can run, print itself and say what it costs."""

    def run(
        self,
        L: torch.Tensor,  # noqa: N803 - the field's name of this matrix
        dtype: torch.dtype | None = None,
        observe: Callable[[str, torch.Tensor], None] | None = None,
        beta: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``T = (I + L)^-1`` in floating point; see `qinvert.execution.floating.run`."""
        from qinvert.execution.floating import run

        return run(self, L, dtype=dtype, observe=observe, beta=beta)

    def execute(
        self,
        inputs: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
        observe: Callable[[str, torch.Tensor], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Every output of any program in floating point; see `qinvert.execution.floating.execute`."""
        from qinvert.execution.floating import execute

        return execute(self, inputs, dtype=dtype, observe=observe)

    def cost(self, bytes_per_element: int = 1) -> Cost:
        """Work, depth and traffic for one matrix; see `qinvert.program.cost.program_cost`."""
        return program_cost(self, bytes_per_element)

    def __str__(self) -> str:
        return step_table(self)
