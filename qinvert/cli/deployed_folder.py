"""The verb verify, for folders that `qinvert deploy` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qinvert.cli import cost as costs
from qinvert.cli.output import Output
from qinvert.cli.sources import check_exists, load_model
from qinvert.errors import InputError

if TYPE_CHECKING:
    from qinvert.export.deployment.compile_deployment import CompiledGraph
    from qinvert.export.deployment.verify_deployment import DeploymentCheck


class Compilation(NamedTuple):
    """What a caller says about compiling both graphs."""

    #: Chips; that of the plan if none is named.
    hardware: tuple[str, ...]
    #: Whether all chips are asked for.
    all_chips: bool
    #: Folder for compiled files.
    keep: str | None


def is_deployed(folder: str) -> bool:
    """Whether `qinvert deploy` wrote a folder."""
    from qinvert.export.deployment.manifest import MANIFEST

    return (Path(folder) / MANIFEST).is_file()


def verify_deployed(
    output: Output, folder: str, model: str | None, runtimes: tuple[str, ...], compilation: Compilation
) -> None:
    """Run both graphs of a folder, compare them with the model, compile them, and print what was found.

    A graph that a compiler refuses, or of which it leaves nodes to the CPU, ends the process with code 1.

    Raises
    ------
    InputError
        If the model is not known, or another runtime than onnxruntime is asked for.
    ExportError
        If a chip that is named has no compiler here.
    """
    from qinvert.export.deployment.manifest import Manifest
    from qinvert.export.deployment.verify_deployment import verify_deployment

    if runtimes != ("onnxruntime",):
        raise InputError(
            "values of deployed folders are verified on onnxruntime; leave out --runtime, and name chips to "
            "compile for by --hardware"
        )
    source = model if model is not None else Manifest.load(folder).facts.get("source")
    if not isinstance(source, str):
        raise InputError(f"{folder} does not name its model; pass --model")
    check_exists(source)
    chips = _chips(folder, compilation)
    with output.progress("verifying"):
        checks = verify_deployment(folder, load_model(source))
    show_checks(output, checks)
    compiled = _compiled(output, folder, chips, compilation.keep)
    show_compiled(output, compiled)
    output.result({"verified": checks, **({"compiled": compiled} if chips else {})})
    if any(graph.refused for graph in compiled):
        sys.exit(1)


def _chips(folder: str, compilation: Compilation) -> tuple[str, ...]:
    """Chips to compile for; one that is named and has no compiler here is refused before the work."""
    from qinvert.errors import ExportError
    from qinvert.export.deployment.compile_deployment import planned_chips
    from qinvert.export.runtimes import estimators, installed

    if compilation.hardware:
        named = costs.chips(compilation.hardware, ())
        for chip, remedy in costs.missing_toolkits(named).items():
            raise ExportError(f"{chip} cannot be compiled for: {remedy}")
        return named
    if compilation.all_chips:
        present = installed()
        return tuple(chip for chip, runtime in estimators().items() if runtime.name in present)
    return planned_chips(folder)


def _compiled(output: Output, folder: str, chips: tuple[str, ...], keep: str | None) -> list[CompiledGraph]:
    from qinvert.export.deployment.compile_deployment import compile_deployment

    with output.progress("compiling"):
        return [
            graph
            for chip in chips
            for graph in compile_deployment(folder, chip, keep=keep and Path(keep) / chip)
        ]


def show_compiled(output: Output, graphs: list[CompiledGraph]) -> None:
    """Print one row for each graph and chip; what is refused is said in full."""
    rows = [
        [
            graph.file,
            graph.hardware,
            str(graph.tokens),
            ", ".join(graph.estimate.elsewhere) or "none",
            graph.estimate.span,
            str(graph.estimate.uncosted),
            "-" if graph.tokens_per_second is None else f"{graph.tokens_per_second:,.0f}",
        ]
        for graph in graphs
        if graph.estimate is not None
    ]
    columns = [
        "graph",
        "chip",
        "tokens",
        "nodes outside the chip",
        "cycles of one call (range)",
        "operators without a cost",
        "tokens per second, simulated",
    ]
    if rows:
        output.table("Compiled", columns, rows)
    for source in dict.fromkeys(graph.estimate.source for graph in graphs if graph.estimate is not None):
        output.say(f"cycles and tokens per second: {source}; operators without a cost are left out")
    for graph in graphs:
        if graph.refused:
            output.say(f"{graph.file} is not compiled for {graph.hardware}: {graph.refused}")
    costs.show_kept(output, [[graph.estimate] for graph in graphs if graph.estimate is not None])


def show_checks(output: Output, checks: list[DeploymentCheck]) -> None:
    """Print one row for each text and setting."""
    rows = [
        [
            f"{check.prefilled} + {check.decoded}",
            "optimized" if check.optimized else "unoptimized",
            f"{check.logits:.1e}",
            f"{check.states:.1e}",
            f"{max(check.kl, 0.0):.1e}",
            f"{check.top1_agreement:.3f}",
            "" if check.decode_kl is None else f"{max(check.decode_kl, 0.0):.1e}",
        ]
        for check in checks
    ]
    columns = [
        "tokens of prefill + decode",
        "onnxruntime",
        "logits off, share",
        "worst state off, share",
        "KL to the patched model",
        "same next token",
        "KL of decode to the model",
    ]
    output.table("Deployment", columns, rows)
