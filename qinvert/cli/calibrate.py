"""The verb calibrate."""

from __future__ import annotations

import sys

import click

from qinvert.calibration.choices import (
    BITS,
    HARDWARE_LOSS_DB,
    MAX_LOSS_DB,
    MIN_SQNR_DB,
    Granularity,
    RangeRule,
    ScaleRule,
)
from qinvert.cli.data_options import DataOptions, data_options
from qinvert.cli.decibels import DECIBELS
from qinvert.cli.output import Output, output_options, present, wrote
from qinvert.cli.plan_tables import layer_to_dict, show_choices
from qinvert.cli.sources import open_pair, with_source
from qinvert.cli.step_options import StepOptions, step_options
from qinvert.cli.step_tables import show_step_choices
from qinvert.errors import InputError
from qinvert.files import check_writable
from qinvert.hardware import HARDWARE
from qinvert.methods import METHODS
from qinvert.profiles import PROFILES


@click.command()
@click.argument("source")
@click.option("-o", "--output", "path", required=True, type=click.Path(dir_okay=False), help="Plan to write.")
@click.option("--method", default="auto", show_default=True, help=f"auto, {', '.join(METHODS)}.")
@click.option("--bits", default="auto", show_default=True, type=click.Choice(("auto", *BITS)))
@click.option("--target", help=f"{', '.join(PROFILES)}; by default npu-qdq-int8, if it takes the bits.")
@click.option(
    "--hardware", help=f"Chip whose costs decide: {', '.join(HARDWARE)}; by default that of the target."
)
@click.option("--batch", default=8, show_default=True, help="Matrices per call, for costs on --hardware.")
@click.option(
    "--measure-cost", is_flag=True, help="Compile the best few candidates with the compiler of --hardware."
)
@click.option(
    "--scales",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *(rule.value for rule in ScaleRule)]),
    help="auto is float, unless the target takes powers of two only.",
)
@click.option(
    "--ranges",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *(rule.value for rule in RangeRule)]),
    help="What grids cover; auto is mse for int4 and max for wider grids.",
)
@click.option(
    "--granularity",
    default="tensor",
    show_default=True,
    type=click.Choice([grain.value for grain in Granularity]),
    help="One set of grids per layer, or one per head; auto: per head in layers whose heads need it.",
)
@click.option(
    "--min-sqnr",
    "--min-sqnr-db",
    "min_sqnr",
    type=DECIBELS,
    help=f"Goal for T of each layer, dB; {MIN_SQNR_DB:g} by default, if the next two are not given.",
)
@click.option(
    "--min-output-sqnr",
    "--min-output-sqnr-db",
    "min_output_sqnr",
    type=DECIBELS,
    help="Goal for the output of each layer of a model, dB.",
)
@click.option(
    "--max-kl", type=float, help="Goal for the whole model: largest KL of its logits, nats per token."
)
@click.option(
    "--max-loss",
    "--max-loss-db",
    "max_loss",
    type=DECIBELS,
    help=f"Goal for the distance to the floor, dB; {MAX_LOSS_DB:g} by default, {HARDWARE_LOSS_DB:g} with "
    "--hardware.",
)
@click.option("--factored", is_flag=True, help="Quantize L / beta; a file needs arrays NAME.beta.")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="Save statistics in this file from time to time; continue from it if it exists.",
)
@step_options
@data_options
@output_options
def calibrate(
    source: str,
    path: str,
    method: str,
    bits: str,
    target: str | None,
    hardware: str | None,
    batch: int,
    measure_cost: bool,
    scales: str,
    ranges: str,
    granularity: str,
    factored: bool,
    min_sqnr: float | None,
    min_output_sqnr: float | None,
    max_kl: float | None,
    max_loss: float | None,
    checkpoint: str | None,
    steps: StepOptions,
    given: DataOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure ranges and write an integer plan for every layer.

    SOURCE is a model folder with --data, `recall`, or a file of matrices L
    (.npz or .safetensors, one array per layer).  The exit code is 1 if a layer
    misses a goal; the plan is also written then.

    \b
    Example: qinvert calibrate recall -o plan.json
             qinvert calibrate ./my-model --data book.txt --num-samples 64 -o plan.json
             qinvert calibrate ./my-model --data rows.jsonl --column content -o plan.json
             qinvert calibrate ./my-model --data book.txt --hardware hexagon-v81 -o plan.json
             qinvert calibrate ./my-model --data book.txt --scope chunk --target npu-qdq-int16 -o step.json
             qinvert calibrate L.npz --bits 8x2 --min-sqnr 60 -o plan.json
             qinvert calibrate ./my-model --data t.npz --checkpoint t.checkpoint.npz -o plan.json
             torchrun --nproc-per-node 2 -m qinvert.cli calibrate recall -o plan.json
    """
    from qinvert.calibration.calibrate import calibrate as run_calibration
    from qinvert.calibration.data.processes import joined

    chunk = steps.chunk_options()
    measure = None
    if measure_cost:
        if hardware is None:
            raise InputError("--measure-cost needs --hardware, the chip to compile for")
        from qinvert.export.compiled_cost import compiled_cost

        measure = compiled_cost(hardware)
    before = present(path)
    for file in (path, checkpoint):
        if file is not None:
            check_writable(file)
    with joined() as shard:
        # One of several processes prints and writes; all of them have the plan.
        first = shard.rank == 0
        output = Output(as_json=as_json and first, quiet=quiet or not first)
        with output.progress("calibrating") as progress:
            plan = run_calibration(
                *open_pair(source, given),
                method=method,
                bits=bits,
                target=target,
                hardware=hardware,
                batch=batch,
                measure=measure,
                min_sqnr_db=min_sqnr,
                min_output_sqnr_db=min_output_sqnr,
                max_kl=max_kl,
                max_loss_db=max_loss,
                scales=scales,
                ranges=ranges,
                granularity=granularity,
                factored=factored,
                seed=given.seed,
                progress=progress,
                checkpoint=checkpoint,
                scope=steps.scope,
                chunk=chunk,
            )
    plan = with_source(plan, source)
    if first:
        plan.save(path)
    if chunk is None:
        show_choices(output, plan)
    else:
        show_step_choices(output, plan)
    output.say(wrote(path, before))
    output.result({"plan": path, "layers": {n: layer_to_dict(p, p.proof()) for n, p in plan.layers.items()}})
    if not all(layer.provenance["meets_goal"] for layer in plan.layers.values()):
        sys.exit(1)
