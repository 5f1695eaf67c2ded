"""The verb doctor: what of an ONNX model a chip's compiler will not take."""

from __future__ import annotations

import sys

import click

from qinvert.cli.diagnosis import show_diagnosis
from qinvert.cli.output import Output, output_options


@click.command()
@click.argument("model", type=click.Path(dir_okay=False))
@click.option(
    "--hardware",
    multiple=True,
    help="Chip, repeatable, such as hexagon-v81; by default that of the profile in the model's metadata.",
)
@click.option("--strict", is_flag=True, help="Exit with code 1 if a chip does not take every node as it is.")
@output_options
def doctor(model: str, hardware: tuple[str, ...], strict: bool, as_json: bool, quiet: bool) -> None:
    """Say which nodes of an ONNX model a chip's compiler will not take, and what to do.

    MODEL is any ONNX file; weights in other files are not read.  Nothing is
    compiled: `qinvert verify` does that for the graphs of layers.

    \b
    Example: qinvert doctor model.onnx --hardware hexagon-v81
             qinvert doctor model.onnx --hardware hexagon-v81 --hardware ethos-u85-256 --json
    """
    from qinvert.export.rules.doctor import doctor as examine

    output = Output(as_json=as_json, quiet=quiet)
    found = [examine(model, hardware=chip) for chip in hardware or (None,)]
    for diagnosis in found:
        show_diagnosis(output, diagnosis)
    output.result({diagnosis.hardware: diagnosis.to_dict() for diagnosis in found})
    if strict and not all(diagnosis.accepted for diagnosis in found):
        sys.exit(1)
