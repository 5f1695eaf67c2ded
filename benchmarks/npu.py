"""What the inverse costs on NPUs, by their compilers: measures, and writes the page `docs/npu.md`.

    python benchmarks/npu.py --cache npu.jsonl --write

No NPU is needed.  ``QINVERT_QNN_PYTHON`` and ``QINVERT_VELA_PYTHON`` name the
environments of the compilers; chips whose compiler is not installed are left out.
The cache holds what was compiled, by the graph's content, so that a run can be
continued and that only graphs which changed are compiled anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Protocol, TypeVar

import onnx
from npu_choices import choices, predictions
from npu_graphs import CONTENDERS, FLOAT16, SELECTED, Case, Cell, Contender, Family, model_of
from npu_page import main_element, page

from qinvert.errors import ExportError, QInvertError
from qinvert.export.exporting import serialize
from qinvert.export.runtimes import CycleEstimate, estimates, estimators, installed
from qinvert.export.runtimes.subprocesses import how_to_install

T = TypeVar("T")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "npu.md"
#: Graphs that one process compiles, by their batch: compilers need more time and memory for large ones.
TOGETHER = {1: 16, 8: 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A line of the cache: what a compiler says of one graph."""

    hardware: str
    #: Hash of the graph, see `digest`.
    graph: str
    #: Name for people.
    case: str
    #: None where the graph is refused.
    cycles: int | None
    #: Why.
    refused: str = ""
    #: Who predicted.
    source: str = ""
    #: Bytes between the chip and its memory, where the compiler says so.
    traffic: int = 0

    @property
    def cell(self) -> Cell:
        """The same for a table."""
        return Cell(cycles=self.cycles, refused=self.refused, source=self.source, traffic=self.traffic)


def digest(model: onnx.ModelProto) -> str:
    """Return a hash of what a compiler reads: without descriptions and the version of this package."""
    graph = onnx.GraphProto.FromString(model.graph.SerializeToString())
    graph.doc_string = graph.name = ""
    return sha256(graph.SerializeToString(deterministic=True)).hexdigest()[:24]


class Cache:
    """Outcomes by chip and graph, in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found = [Outcome(**json.loads(line)) for line in lines]
        self.known = {(outcome.hardware, outcome.graph): outcome for outcome in found}

    def add(self, outcome: Outcome) -> None:
        """Append an outcome."""
        self.known[outcome.hardware, outcome.graph] = outcome
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(outcome)) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A graph that is to be compiled."""

    chip: str
    #: Name for people.
    name: str
    graph: str
    content: bytes


class Compilable(Protocol):
    """A graph for one chip."""

    @property
    def chip(self) -> str:
        """A key of `estimators`."""

    @property
    def batch(self) -> int:
        """Matrices or heads per call."""

    @property
    def key(self) -> str:
        """Name for people who read the cache."""


C = TypeVar("C", bound=Compilable)


def measured(
    cases: Sequence[C], cache: Cache, processes: int, build: Callable[[C], onnx.ModelProto]
) -> dict[C, Cell]:
    """Compile what the cache does not hold, and return the outcome of every case.

    With 0 processes nothing is compiled, and what is not known is left out.
    """
    found: dict[C, Cell] = {}
    waiting = _groups(cases, cache, found, build)
    if processes:
        _compile(waiting, cache, found, processes)
    else:
        for _ in waiting:  # enters what is known
            pass
    return {case: found[case] for case in cases if case in found}


def _compile(
    waiting: Iterator[list[tuple[C, Job]]], cache: Cache, found: dict[C, Cell], processes: int
) -> None:
    with ThreadPoolExecutor(processes) as pool:
        for groups in _batched(waiting, processes):
            answers = pool.map(compiled, [[job for _, job in group] for group in groups])
            for group, outcomes in zip(groups, answers, strict=True):
                for (case, _), outcome in zip(group, outcomes, strict=True):
                    cache.add(outcome)
                    found[case] = outcome.cell
                print(f"{case.chip}, {case.key}: {found[case].text}", file=sys.stderr)


def _groups(
    cases: Sequence[C], cache: Cache, found: dict[C, Cell], build: Callable[[C], onnx.ModelProto]
) -> Iterator[list[tuple[C, Job]]]:
    """Yield what one process is to compile; outcomes that are known, and refusals of exports, are entered."""
    for (_, batch), group in groupby(cases, key=lambda case: (case.chip, case.batch)):
        yield from _batched(_unknown(group, cache, found, build), TOGETHER.get(batch, 2))


def _unknown(
    cases: Iterator[C], cache: Cache, found: dict[C, Cell], build: Callable[[C], onnx.ModelProto]
) -> Iterator[tuple[C, Job]]:
    for case in cases:
        try:
            model = build(case)
        except QInvertError as error:
            found[case] = Cell(cycles=None, refused=str(error))
            continue
        graph = digest(model)
        outcome = cache.known.get((case.chip, graph))
        if outcome is None:
            yield case, Job(chip=case.chip, name=case.key, graph=graph, content=serialize(model))
        else:
            found[case] = outcome.cell


def measured_alone(model: onnx.ModelProto, chip: str, name: str, cache: Cache, offline: bool) -> Cell:
    """Compile one graph that is not a case, if the cache does not hold it."""
    graph = digest(model)
    if (chip, graph) not in cache.known:
        if offline:
            return Cell(cycles=None)
        (outcome,) = compiled([Job(chip=chip, name=name, graph=graph, content=serialize(model))])
        cache.add(outcome)
    return cache.known[chip, graph].cell


def compiled(jobs: Sequence[Job]) -> list[Outcome]:
    """Compile graphs for one chip in one process."""
    answers = estimates([job.content for job in jobs], jobs[0].chip)
    return [outcome_of(job, answer) for job, answer in zip(jobs, answers, strict=True)]


def outcome_of(job: Job, answer: CycleEstimate | ExportError) -> Outcome:
    """Return the line for one answer."""
    known = {"hardware": job.chip, "graph": job.graph, "case": job.name}
    if isinstance(answer, ExportError):
        return Outcome(**known, cycles=None, refused=str(answer))
    traffic = sum(answer.traffic.values())
    return Outcome(**known, cycles=answer.cycles, source=answer.source, traffic=traffic)


def _batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while part := list(islice(iterator, size)):
        yield part


def cases(chips: Sequence[str], contenders: Sequence[Contender], chunk: int) -> Iterator[Case]:
    """Yield every graph of the page, what takes longest last."""
    selected = [contender for contender in contenders if contender.name in SELECTED]
    for batch in (8, 1):
        for chip in chips:
            yield from _of(chip, contenders, main_element(chip), chunk, batch)
    for chip in chips:
        formats = ("int16",) if chip.startswith("ethos") else ("int8", "int16", FLOAT16)
        for element in formats:
            yield from _of(chip, selected, element, chunk, 8)
        for other in (chunk // 2, 2 * chunk):
            yield from _of(chip, selected, main_element(chip), other, 8)
    for chip in chips:
        yield from _of(chip, contenders, main_element(chip), chunk, 64)


def _of(chip: str, contenders: Sequence[Contender], element: str, chunk: int, batch: int) -> Iterator[Case]:
    for contender in contenders:
        if contender.program is None and element == "int16":
            continue
        for chains in chains_of(contender, chip, batch):
            if contender.fits(chunk, batch, chains):
                yield Case(
                    contender=contender, element=element, chunk=chunk, batch=batch, chains=chains, chip=chip
                )


def chains_of(contender: Contender, chip: str, batch: int) -> tuple[int, ...]:
    """Return the numbers of chains that are tried; a table shows the best one."""
    if batch == 1 or chip.startswith("ethos"):
        return (1,)
    if contender.family.sequential:
        return _sequential_chains(contender, batch)
    if batch == 8:
        return (1, 8)
    if contender.family == Family.MERGES and "packed" in contender.name:
        # Compilers need minutes for each, and 8 matrices show already that it is no form for these chips.
        return ()
    best = contender.family == Family.ELIMINATION and contender.name in SELECTED
    return (1, 8, 64) if best and "packed" not in contender.name else (8,)


def _sequential_chains(contender: Contender, batch: int) -> tuple[int, ...]:
    """Return fewer of them: compilers need a minute for each of these graphs."""
    if batch > 8:
        return (1, 8) if "side by side" in contender.name else (1,)
    whole = contender.family == Family.HORNER or contender.name.startswith("columns, masked")
    return (1, 2, 4, 8) if whole else (1, 2)


def main() -> None:
    """Measure, print the page, and write it if told to."""
    arguments = parse()
    chips = [chip for chip in arguments.hardware if available(chip)]
    if not chips:
        sys.exit("no compiler is installed: there is nothing to measure")
    cache = Cache(arguments.cache)
    wanted = [c for c in CONTENDERS if not arguments.contenders or c.name in arguments.contenders]
    found = measured(list(cases(chips, wanted, arguments.chunk)), cache, arguments.processes, model_of)
    chosen = list(
        choices(chips, arguments.chunk, partial(measured_alone, cache=cache, offline=not arguments.processes))
    )
    content = page(found, chosen, predictions(found), arguments.chunk)
    print(content)
    if arguments.write:
        PAGE.write_text(content, encoding="utf-8")


def available(chip: str) -> bool:
    """Whether a chip's compiler is installed; say so if it is not."""
    runtime = estimators()[chip]
    if runtime.name in installed():
        return True
    print(f"{chip} is left out: {how_to_install(runtime.name, runtime.requirement)}", file=sys.stderr)
    return False


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chips = list(estimators())
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--hardware", nargs="+", default=chips, choices=chips)
    parser.add_argument("--contenders", nargs="*", choices=names, help="all by default")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="compilers at a time; 0: what is known")
    parser.add_argument("--cache", type=Path, default=Path("npu.jsonl"))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
