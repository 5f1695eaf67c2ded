"""The verb verify: exported graphs on runtimes, against the simulator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qinvert.cli import cost as costs
from qinvert.cli.decibels import DECIBELS, decibels
from qinvert.cli.deployed_folder import Compilation, is_deployed, verify_deployed
from qinvert.cli.graph_folder import PLAN_FILE, check_same_plan, exported_graphs
from qinvert.cli.output import Output, output_options
from qinvert.cli.sources import open_own
from qinvert.errors import InputError, VerificationError
from qinvert.export.runtimes import RUNTIMES
from qinvert.numerics.law import Rounding
from qinvert.plan.plan import Plan
from qinvert.program.program import Program
from qinvert.program.steps import MAX_BETA
from qinvert.progress import track

if TYPE_CHECKING:
    import torch

    from qinvert.export.verification.comparison import Verification
    from qinvert.systems import Systems

#: Sequences of the embedded model's task that a goal is measured on.
GATE_SEQUENCES = 4
#: Keys of each kind that graphs from keys are verified with.
STRESS_KEYS = 8


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option(
    "--data", type=click.Path(), help="Matrices L, .npz or .safetensors; stress matrices by default."
)
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help=f"{', '.join(RUNTIMES)}; repeatable. `qinvert profiles` says which are installed.",
)
@click.option(
    "--min-sqnr",
    "--min-sqnr-db",
    "min_sqnr",
    type=DECIBELS,
    help="Exit with code 1 if a runtime's T stays below this sqnr, dB, on --data or the plan's own data.",
)
@click.option(
    "--cost",
    is_flag=True,
    help="Also show the cycles that the compilers of --hardware predict; nothing is measured.",
)
@click.option(
    "--hardware",
    multiple=True,
    help="Chip to predict cycles for, repeatable; all chips of the runtimes by default. Implies --cost.",
)
@click.option(
    "--keep", type=click.Path(file_okay=False), help="Folder for compiled files, one folder a layer."
)
@click.option("--model", help="Model folder of a deployment; the one that it was made of by default.")
@output_options
def verify(
    folder: str,
    data: str | None,
    runtimes: tuple[str, ...],
    min_sqnr: float | None,
    cost: bool,
    hardware: tuple[str, ...],
    keep: str | None,
    model: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run exported graphs and compare every value with the simulator.

    FOLDER is what `qinvert export` wrote, or `qinvert deploy`, whose graphs are compared
    with the model, in windows and token by token, and compiled for their chip where its
    compiler is installed.  A difference that the profile does
    not allow is an error, exit code 2; where a graph breaks a rule of its
    profile, the node and the remedy are printed.

    \b
    Example: qinvert verify graphs/
             qinvert verify graphs/ --data L.npz --min-sqnr 20
             qinvert verify graphs/ --runtime openvino --runtime qnn
             qinvert verify graphs/ --runtime qnn --cost --keep compiled/
             qinvert verify out/ --model ./my-model
             qinvert verify out/ --hardware hexagon-v81 --keep compiled/
    """
    output = Output(as_json=as_json, quiet=quiet)
    if is_deployed(folder):
        for name, given in (("--data", data), ("--min-sqnr", min_sqnr)):
            if given is not None:
                raise InputError(f"{name} is for folders of qinvert export, and {folder} is a deployment")
        verify_deployed(output, folder, model, runtimes, Compilation(hardware, cost, keep))
        return
    if model is not None:
        raise InputError(f"--model is for folders of qinvert deploy, and {folder} is none; leave it out")
    asked = costs.chips(hardware, runtimes) if cost or hardware else ()
    missing = costs.missing_toolkits(asked)
    plan = Plan.load(Path(folder) / PLAN_FILE)
    check_same_plan(plan, Path(folder))
    found = exported_graphs(plan, Path(folder))
    if not found:
        raise InputError(f"{folder} holds no exported layer of its plan; run: qinvert export")
    own = None if data is None else (data, None)
    if own is None and min_sqnr is not None:
        # A goal is about the data that the plan is for, not about stress matrices.
        own = open_own(plan, GATE_SEQUENCES)
    kept_by = any(RUNTIMES[name].loading for name in runtimes if name in RUNTIMES)
    # Where only the estimates make files, verification is not asked for any.
    results, failures = run_graphs(
        output, plan, found, own, runtimes, None if asked and not kept_by else keep
    )
    present = tuple(chip for chip in asked if chip not in missing)
    estimates = costs.estimate_graphs(output, plan, found, present, keep) if present else {}
    show_findings(output, [file for _, file in found.values()])
    if results:
        show_verifications(output, results, own_data=own is not None)
    costs.show_costs(output, estimates, missing)
    costs.show_kept(output, [*results.values(), *estimates.values()])
    verified = {**results, **{label: {"failed": str(error)} for label, error in failures.items()}}
    output.result({"verified": verified, "cost": estimates, "not_installed": missing} if asked else verified)
    if failures:
        raise VerificationError(_failed(failures, len(found)))
    worst = min(r.sqnr_db for rows in results.values() for r in rows)
    if min_sqnr is not None and worst < min_sqnr:
        output.say(f"missed: the worst runtime has {worst:.1f} dB, the goal is {min_sqnr:.1f}")
        sys.exit(1)


def run_graphs(
    output: Output,
    plan: Plan,
    found: dict[str, tuple[str, Path]],
    own: tuple[Any, Any] | None,
    runtimes: tuple[str, ...],
    keep: str | None,
) -> tuple[dict[str, list[Verification]], dict[str, VerificationError]]:
    """Return what every runtime makes of every graph, by the graph's label, and the graphs that are wrong."""
    from qinvert.export.verification.verify import verify as verify_layer

    results: dict[str, list[Verification]] = {}
    failures: dict[str, VerificationError] = {}
    with output.progress("verifying"):
        for label, (name, file) in track(found.items(), "graphs", len(found)):
            given, beta = inputs_for(file, plan, name, own)
            folder = costs.keep_folder(plan, name, file, keep)
            try:
                results[label] = verify_layer(
                    file, plan, given, runtimes=runtimes, layer=name, beta=beta, keep=folder
                )
            except VerificationError as error:
                failures[label] = error
    return results, failures


def _failed(failures: dict[str, VerificationError], count: int) -> str:
    """One line for all graphs that are wrong: the first in full, and the names of the others."""
    label, *others = failures
    more = f"; and {', '.join(others)}" if others else ""
    return f"{len(failures)} of {count} graphs are wrong: {label}: {failures[label]}{more}"


def show_findings(output: Output, files: list[Path]) -> None:
    """Print the rules that graphs break; a file of several layers is read once."""
    from qinvert.export.rules.lint import lint

    for file in dict.fromkeys(files):
        for finding in lint(file):
            output.say(f"{file.name}: {finding}")


def inputs_for(file: Path, plan: Plan, layer: str, own: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """Return what to verify a graph with: matrices, or keys if it builds L from them, and beta."""
    from qinvert.export.step_heads import layer_plans
    from qinvert.export.step_interface import StepInterface
    from qinvert.export.verification.step_samples import heads_samples
    from qinvert.export.verification.verify import read_interface
    from qinvert.stress import stress_keys

    interface = read_interface(file, plan, layer)
    if isinstance(interface, StepInterface):
        if own is not None:
            raise InputError(f"{file} is a chunk step, but the data has matrices; leave out --data")
        return heads_samples(layer_plans(plan, layer), interface), None
    if interface.key_size is None:
        return matrices_for(plan, layer, own)
    if own is not None:
        raise InputError(f"{file} takes keys, but the data has matrices; verify a graph of --input L")
    return stress_keys(STRESS_KEYS, plan.layer(layer).chunk, interface.key_size), None


def matrices_for(
    plan: Plan, layer: str, own: tuple[Any, Any] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices to verify a layer with, of a source or the stress sets, and beta if it takes it."""
    program = plan.layer(layer).program
    return given_matrices(plan, layer, own) if own is not None else generated_matrices(program)


def generated_matrices(program: Program) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return matrices of every stress set, and beta if the program takes it."""
    import torch

    from qinvert.stress import STRESS, stress_matrices

    lower = torch.cat([stress_matrices(name, 4, program.chunk) for name in STRESS])
    # T is the same for any beta that a row can have; the smallest one keeps |K| at 1.
    return lower, lower.abs().amax(-1).clamp(max=MAX_BETA) if program.inverse_ports.factored else None


def given_matrices(plan: Plan, layer: str, own: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return all matrices that a source has for an entry of a plan, and beta if its program takes it."""
    import torch

    from qinvert.calibration.sources import check_size, open_systems
    from qinvert.execution.inputs import needed

    parts, program = [], plan.layer(layer).program
    for name, whole in open_systems(*own):
        systems = _of_entry(plan, layer, name, whole)
        if systems is not None:
            check_size(systems.chunk, program.chunk, layer)
            parts.append(needed(program, systems, f"beta of layer {layer!r}").flat())
    if not parts:
        raise InputError(f"the data has no matrices for layer {layer!r}; name an array after the layer")
    betas = [part.beta for part in parts if part.beta is not None]
    return torch.cat([part.lower for part in parts]), torch.cat(betas) if betas else None


def _of_entry(plan: Plan, entry: str, name: str, systems: Systems) -> Systems | None:
    """Return what a source's matrices of a name hold for an entry of a plan; None if nothing."""
    from qinvert.calibration.head_names import head_number, layer_name
    from qinvert.calibration.heads import check_heads
    from qinvert.calibration.sources import DEFAULT_LAYER

    head, layer = head_number(entry), layer_name(entry)
    if name != entry and name in (layer, DEFAULT_LAYER) and head is not None and systems.has_heads:
        parts = list(systems.heads())
        check_heads(plan, layer, len(parts))
        return parts[head]
    return systems if name in (entry, DEFAULT_LAYER) else None


def _promise(result: Verification) -> str:
    if not result.exact:
        return "no"
    return "yes" if result.rounding == Rounding.ONNX else f"yes, as {result.rounding} rounds"


def show_verifications(output: Output, results: dict[str, list[Verification]], own_data: bool) -> None:
    """Print how many values agree; sqnr is meaningful for the caller's own data only."""
    rows = [
        [
            name,
            r.runtime,
            f"{r.values - r.mismatches} of {r.values}",
            f"{r.max_steps:.3g}",
            decibels(r.sqnr_db) if own_data else "-",
            _promise(r),
            ", ".join(f"{count} {types}" for types, count in r.products.items()),
        ]
        for name, verifications in results.items()
        for r in verifications
    ]
    columns = [
        "layer",
        "runtime",
        "values equal to the simulator",
        "largest difference, steps",
        "sqnr, dB",
        "must be exact",
        "products",
    ]
    output.table("Verification", columns, rows)
