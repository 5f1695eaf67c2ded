"""The whole job on the embedded model, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qinvert.cli.decibels import decibels
from qinvert.cli.graph_folder import PLAN_FILE, export_all
from qinvert.cli.growth_table import growth_to_dict, show_growth
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.plan_tables import show_choices
from qinvert.cli.sources import load_model, with_source
from qinvert.errors import MissingDependencyError
from qinvert.files import check_folder
from qinvert.methods.banded_residual import banded_residual
from qinvert.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from qinvert.export.verification.comparison import Verification

#: Seeds of the two data sets.
CALIBRATION_SEED, TEST_SEED = 0, 1
#: Sequences of each data set, and how many of them the model answers under every inverse.
SEQUENCES, ANSWERED = 32, 16


@click.command()
@click.option(
    "-o", "--output", "folder", default="qinvert-demo", show_default=True, type=click.Path(file_okay=False)
)
@output_options
def demo(folder: str, as_json: bool, quiet: bool) -> None:
    """Calibrate, simulate, export, verify and evaluate the embedded model.

    The model (0.39 M parameters, two gated-delta layers) recalls the latest
    value of a key; with a wrong inverse it cannot.  Everything it writes goes
    into one folder.

    \b
    Example: qinvert demo
    """
    import torch

    from qinvert import recall
    from qinvert.calibration.calibrate import calibrate
    from qinvert.calibration.growth import range_growth

    # Threads only wait for each other on matrices this small.
    torch.set_num_threads(1)

    output = Output(as_json=as_json, quiet=quiet)
    check_folder(folder)
    model = load_model(recall.NAME)
    seen, unseen = recall.sequences(SEQUENCES, CALIBRATION_SEED), recall.sequences(SEQUENCES, TEST_SEED)
    with output.progress("measuring"):
        matrices = _captured(model, seen)
        growth = range_growth(matrices.items())
    show_growth(output, growth)
    with output.progress("calibrating") as progress:
        plan = calibrate(model, seen, progress=progress)
    plan = with_source(plan, recall.NAME)
    show_choices(output, plan)
    with output.progress("measuring unseen data"):
        others = _captured(model, unseen)
    rows = _layer_rows(output, plan, folder, others)
    accuracy = _accuracy(output, model, plan, matrices, unseen[:ANSWERED])
    page = _page(output, plan, folder)
    output.result(
        {
            "report": page,
            "plan": str(Path(folder) / PLAN_FILE),
            "growth": {name: growth_to_dict(g) for name, g in growth.items()},
            "layers": rows,
            "accuracy": accuracy,
        }
    )


def _captured(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return L of every layer: the model runs once for all that is asked of its matrices."""
    import torch

    from qinvert.calibration.capture import capture

    found: dict[str, list[torch.Tensor]] = {}
    for name, lower in capture(model, tokens):
        found.setdefault(name, []).append(lower)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _page(output: Output, plan: Plan, folder: str) -> str | None:
    """Write the page of the plan alone, which takes two seconds; None without the packages for it."""
    from qinvert.report_page.report import report

    path = str(Path(folder) / "report.html")
    before = present(path)
    try:
        report(plan, path=path, plan_file=str(Path(folder) / PLAN_FILE))
    except MissingDependencyError as error:
        output.say(f"no page was written: {error}")
        return None
    output.say(wrote(path, before))
    return path


def _layer_rows(output: Output, plan: Plan, folder: str, unseen: dict[str, torch.Tensor]) -> dict[str, Any]:
    from qinvert.calibration.simulate import simulate

    with output.progress("simulating") as progress:
        report = simulate(plan, unseen, progress=progress)
    before = present(folder)
    # What runs it here is a CPU, for which parts of a batch are no gain.
    files = export_all(plan, folder, chains=1)
    for file in (str(Path(folder) / PLAN_FILE), *files.values()):
        output.say(wrote(file, before))
    with output.progress("running in onnxruntime"):
        verified = _verify(plan, files, unseen)
    table = [
        [name, r.formats, decibels(r.sqnr_db), decibels(r.floor_db), f"{r.worst_rel:.2e}",
         *(f"{v.values - v.mismatches} of {v.values}" for v in verified[name])]
        for name, r in report.layers.items()
    ]  # fmt: skip
    runs = [f"values equal to the simulator, {v.runtime}" for v in next(iter(verified.values()))]
    output.table(
        "Unseen data",
        ["layer", "format", "sqnr, dB", "floor, dB", "largest error of a matrix, relative", *runs],
        table,
    )
    return {
        name: {
            **r.to_dict(),
            "file": files[name],
            "verified": verified[name],
        }
        for name, r in report.layers.items()
    }


def _verify(
    plan: Plan, files: dict[str, str], unseen: dict[str, torch.Tensor]
) -> dict[str, list[Verification]]:
    from qinvert.export.verification.verify import verify

    return {
        name: verify(Path(file), plan, unseen[name].flatten(0, -3), layer=name)
        for name, file in files.items()
    }


def _accuracy(
    output: Output, model: Any, plan: Plan, seen: dict[str, torch.Tensor], unseen: torch.Tensor
) -> dict[str, float]:
    from qinvert import recall
    from qinvert.calibration.calibrate import calibrate
    from qinvert.calibration.evaluate import compare

    with output.progress("recalling") as progress:
        inverses: dict[str, Any] = {
            "integer": plan,
            "int4": calibrate(seen, method="block_merge", bits=4, progress=progress),
            "banded residual, int8": calibrate(seen, method=banded_residual(64), progress=progress),
            "T = I": _no_inverse,
        }
        results = compare(model, inverses, unseen, score=recall.accuracy, progress=progress)
    scores = {"exact": results["integer"].exact_score or 0.0}
    scores |= {name: result.score or 0.0 for name, result in results.items()}
    rows = [["exact", f"{scores['exact']:.4f}", "-"]]
    rows += [[name, f"{scores[name]:.4f}", f"{result.kl:.2g}"] for name, result in results.items()]
    output.table("Recall accuracy of the model", ["inverse", "accuracy", "KL to exact, nats"], rows)
    return scores


def _no_inverse(lower: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.eye(lower.shape[-1], dtype=lower.dtype).expand(lower.shape)
