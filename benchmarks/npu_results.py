"""What was compiled for `npu.py`, looked up by what a table shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from npu_graphs import DATA, Case, Cell, Contender, decibels


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The cheapest graph of a contender in one setting."""

    contender: Contender
    element: str
    chains: int
    cell: Cell
    sqnr_db: float

    @property
    def cycles(self) -> int:
        """Cycles of a graph that is not refused."""
        assert self.cell.cycles is not None
        return self.cell.cycles

    @property
    def title(self) -> str:
        """Name with the number of chains."""
        chains = f", {self.chains} chains" if self.chains > 1 else ""
        return f"{self.contender.name}{chains}"


class Results:
    """What was measured, with the best number of chains."""

    def __init__(self, found: Mapping[Case, Cell]) -> None:
        self.found = found
        self.chips = list(dict.fromkeys(case.chip for case in found))
        self._best: dict[tuple[str, str, str, str, int, int], tuple[Case, Cell]] = {}
        for case, cell in found.items():
            key = self._key(case.contender, case.element, case.chip, case.chunk, case.batch)
            other = self._best.get(key)
            if other is None or _order(cell) < _order(other[1]):
                self._best[key] = case, cell

    @staticmethod
    def _key(
        contender: Contender, element: str, chip: str, chunk: int, batch: int
    ) -> tuple[str, str, str, str, int, int]:
        return contender.family, contender.name, element, chip, chunk, batch

    def contenders(self, *, chunk: int, element: str, chips: Sequence[str]) -> list[Contender]:
        """Return what was tried, in the order of the cases."""
        return list(
            {
                (case.contender.family, case.contender.name): case.contender
                for case in self.found
                if (case.chunk, case.element) == (chunk, element) and case.chip in chips
            }.values()
        )

    def text(self, contender: Contender, element: str, chip: str, chunk: int, batch: int) -> str:
        """Return a cell of a table."""
        known = self._best.get(self._key(contender, element, chip, chunk, batch))
        if known is None:
            return ""
        case, cell = known
        return cell.text + (f" ({case.chains})" if case.chains > 1 else "")

    def all(self, chip: str, chunk: int, batch: int) -> Iterator[Best]:
        """Yield the best of every contender in every format, without those that are refused."""
        for case, cell in self._best.values():
            if (case.chip, case.chunk, case.batch) == (chip, chunk, batch) and cell.cycles is not None:
                value = decibels(case.contender, case.element, chunk, chip, DATA[0])
                yield Best(
                    contender=case.contender,
                    element=case.element,
                    chains=case.chains,
                    cell=cell,
                    sqnr_db=value,
                )


def _order(cell: Cell) -> float:
    return float("inf") if cell.cycles is None else cell.cycles
