"""The type that every module of a chip fills in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qinvert.checks import check_integer
from qinvert.errors import PlanError
from qinvert.hardware._compiler import Compiler
from qinvert.hardware._operators import FEATURES, features, operators
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.profiles import PROFILES
from qinvert.profiles._profile import NAME

#: Largest batch that a cost is asked for.
MAX_BATCH: Final = 65536
#: More chains make graphs that compilers need minutes for.
MAX_CHAINS: Final = 64
#: What a call costs whatever it computes.
CALL: Final = "call"
#: KiB that enter and leave a graph.
ENDS: Final = "ends/KiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """``cost = sum_f weight_f feature_f``: an additive model of a chip, for one width of tensors.

    Weights are by the names of `qinvert.hardware._operators.FEATURES`, `CALL` and `ENDS`.
    """

    #: Graphs whose whole batch runs through one program.
    whole: Mapping[str, float]
    #: Graphs in chains, whose operators overlap; empty where the chip has no use for chains.
    chained: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.whole:
            raise PlanError("a table of costs has no weights of graphs in one chain; fit them, or omit it")
        legal = {*FEATURES, CALL, ENDS}
        for weights in (self.whole, self.chained):
            wrong = [name for name, weight in weights.items() if name not in legal or not weight >= 0]
            if wrong:
                raise PlanError(
                    f"a table of costs has the weight {wrong[0]!r}: {weights[wrong[0]]!r}; weights are at "
                    f"least 0, and their names are {', '.join(sorted(legal))}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What programs cost on one chip.

    Raises
    ------
    PlanError
        At construction, naming the field and what fits.
    """

    #: Name on the command line and in plans.
    name: str
    #: One line for tables.
    summary: str
    #: What a cost counts, such as "cycles, simulated".
    unit: str
    #: Who says so: compiler or measurement, its version, the chip.
    source: str
    #: Day on which the weights were fitted, year-month-day.
    date: str
    #: Mean relative error of predictions on graphs that were not in the fit.
    error: float
    #: Rank correlation on the same graphs.
    correlation: float
    #: Export profiles for it, the narrowest formats first; the first that fits becomes a plan's target.
    targets: tuple[str, ...]
    #: Weights by the bytes of the widest tensor of a plan.
    tables: Mapping[int, Table]
    #: Whether graphs of chunk steps cost the least where every head of every sequence is a chain of its
    #: own: parts of several heads then cost more than all heads together.
    heads_apart: bool = False
    #: What its compiler takes of ONNX graphs; None where that is not known.
    compiler: Compiler | None = None
    #: Export profiles for chunk steps, in the order of `targets`, where they are others than these.
    step_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise PlanError(f"hardware name {self.name!r} is not lower-case words joined by '-'; rename it")
        named = (*self.targets, *self.step_targets)
        if not self.targets or not {*named} <= PROFILES.keys():
            raise PlanError(
                f"hardware {self.name!r} has the targets {named}; name at least one of {', '.join(PROFILES)}"
            )
        if not self.tables or not set(self.tables) <= {1, 2}:
            raise PlanError(
                f"hardware {self.name!r} has tables for {sorted(self.tables)} bytes; give one for 1 or 2"
            )

    def cost(self, plan: QuantizedProgram, batch: int = 8, chains: int = 1) -> float:
        """Return what one call of a graph of ``plan`` costs, in `unit`.

        Parameters
        ----------
        plan : QuantizedProgram
        batch : int
            Matrices per call, between integer ends.
        chains : int
            Independent parts of the batch.

        Raises
        ------
        PlanError
            If the batch or the chains are not legal.
        """
        check_integer("batch", batch, 1, MAX_BATCH, PlanError, "; pass the matrices per call")
        check_integer("chains", chains, 1, MAX_BATCH, PlanError, "; pass the parts of the batch")
        if batch % chains:
            raise PlanError(
                f"batch {batch} cannot be cut into {chains} chains; choose a divisor of the batch"
            )
        table = self._table(plan)
        weights = table.chained if chains > 1 else table.whole
        if not weights:
            raise PlanError(
                f"hardware {self.name!r} has no costs of graphs in {chains} chains; use chains=1, or add the "
                "weights to its table"
            )
        known = known_features(plan, batch, chains)
        return sum(weight * known[name] for name, weight in weights.items())

    def best_chains(self, plan: QuantizedProgram, batch: int = 8) -> tuple[int, float]:
        """Return the number of chains that costs the least, and that cost."""
        each = chain_counts(batch) if self._table(plan).chained else (1,)
        costs = {chains: self.cost(plan, batch, chains) for chains in each}
        best = min(costs, key=lambda chains: costs[chains])
        return best, costs[best]

    def step_chains(self, batch: int) -> int:
        """Return the cheapest number of chains of a chunk step with so many heads of all sequences."""
        return batch if self.heads_apart and batch <= MAX_CHAINS else 1

    def _table(self, plan: QuantizedProgram) -> Table:
        return self.tables.get(width_of(plan)) or self.tables[max(self.tables)]


def chain_counts(batch: int) -> tuple[int, ...]:
    """Return the numbers of chains that are worth a try: none, and as many as compilers take."""
    most = max(count for count in range(1, min(batch, MAX_CHAINS) + 1) if batch % count == 0)
    return tuple(dict.fromkeys((1, most)))


def width_of(plan: QuantizedProgram) -> int:
    """Return the bytes of the widest tensor."""
    return max(grid.format.bytes for grid in plan.tensors.values())


def known_features(plan: QuantizedProgram, batch: int, chains: int) -> Mapping[str, float]:
    """Return the features that weights multiply, by their names."""
    ports = (*plan.program.inputs, *plan.program.outputs)
    ends = sum(batch * math.prod(port.shape) for port in ports)
    found = features(operators(plan, batch, chains))
    return {**found, CALL: 1.0, ENDS: width_of(plan) * ends / 1024}
