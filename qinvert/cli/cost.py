"""What `qinvert verify --cost` adds: cycles of graphs, as compilers predict them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qinvert.cli.graph_folder import ALL_LAYERS, file_names
from qinvert.cli.output import Output
from qinvert.errors import ExportError, lookup
from qinvert.export.runtimes import estimators, installed
from qinvert.export.runtimes.subprocesses import how_to_install
from qinvert.plan.plan import Plan
from qinvert.progress import track

if TYPE_CHECKING:
    from qinvert.export.runtimes import CycleEstimate
    from qinvert.export.verification.comparison import Verification


def chips(hardware: tuple[str, ...], runtimes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the named chips, or all chips of the named runtimes if none is named.

    Raises
    ------
    ExportError
        If a chip is unknown, or if none is named and the runtimes estimate none.
    """
    known = estimators()
    for chip in hardware:
        lookup(known, chip, "hardware", ExportError)
    found = hardware or tuple(chip for chip, runtime in known.items() if runtime.name in runtimes)
    if not found:
        raise ExportError(
            f"{', '.join(runtimes)} estimates no cycles; name a chip, --hardware {' or '.join(known)}"
        )
    return found


def missing_toolkits(hardware: tuple[str, ...]) -> dict[str, str]:
    """How to install what estimates for a chip, by the chips that cannot be asked here."""
    runtimes, present = estimators(), installed()
    return {
        chip: how_to_install(runtimes[chip].name, runtimes[chip].requirement)
        for chip in hardware
        if runtimes[chip].name not in present
    }


def estimate_graphs(
    output: Output,
    plan: Plan,
    found: dict[str, tuple[str, Path]],
    hardware: tuple[str, ...],
    keep: str | None,
) -> dict[str, list[CycleEstimate]]:
    """Return the estimates of every graph, by the graph's label."""
    from qinvert.export.verification.cycles import estimate

    results: dict[str, list[CycleEstimate]] = {}
    with output.progress("compiling"):
        for label, (layer, file) in track(found.items(), "graphs", len(found)):
            folder = keep_folder(plan, layer, file, keep)
            results[label] = [
                estimate(file, chip, layer=layer, keep=folder)
                for chip in track(hardware, "chips", len(hardware))
            ]
    return results


def keep_folder(plan: Plan, layer: str, file: Path, keep: str | None) -> Path | None:
    """Return the folder for compiled files of one graph: layers must not overwrite each other."""
    if keep is None:
        return None
    stem = Path(file_names(plan)[layer]).stem
    together = Path(ALL_LAYERS).stem
    return Path(keep) / together / stem if file.name == ALL_LAYERS else Path(keep) / stem


def show_costs(output: Output, results: dict[str, list[CycleEstimate]], missing: dict[str, str]) -> None:
    """Print cycles, what moves through memory, and who says so."""
    rows = [
        [
            label,
            found.hardware,
            found.span,
            "; ".join(f"{name} {count:,}" for name, count in found.traffic.items() if count),
            str(found.uncosted),
        ]
        for label, estimates in results.items()
        for found in estimates
    ]
    if rows:
        columns = [
            "layer",
            "chip",
            "cycles of one call (range)",
            "traffic, bytes",
            "operators without a cost",
        ]
        output.table("Cost", columns, rows)
    for source in dict.fromkeys(found.source for estimates in results.values() for found in estimates):
        output.say(f"cycles: {source}")
    for chip, remedy in missing.items():
        output.say(f"cycles of {chip} are left out: {remedy}")


def show_kept(output: Output, results: Iterable[Sequence[Verification | CycleEstimate]]) -> None:
    """Print which compiled files were kept, and how to load them."""
    kept = {file: loading for found in results for each in found for file, loading in each.kept.items()}
    for loading in dict.fromkeys(kept.values()):
        files = ", ".join(file for file, said in kept.items() if said == loading)
        output.say(f"kept {files}: {loading}")
