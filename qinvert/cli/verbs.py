"""Which verbs there are; each is loaded when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

#: Every verb, and the line that `qinvert --help` says of it: the first sentence of its own help.
VERBS: Final = {
    "demo": "Calibrate, simulate, export, verify and evaluate the embedded model.",
    "inspect": "Show how far powers of M outgrow the inverse, or what is in a plan.",
    "calibrate": "Measure ranges and write an integer plan for every layer.",
    "simulate": "Run the integer programs bit-exactly and measure the error of T.",
    "export": "Write one ONNX file per layer, or one for all, and the plan beside them.",
    "verify": "Run exported graphs and compare every value with the simulator.",
    "evaluate": "Compare the model under the plan with the model under the exact inverse.",
    "report": "Show a plan as one HTML page: verdicts, figures, tables, what to do next.",
    "export-model": "Write a whole decoder as ONNX, with a local function for each layer's inverse.",
    "deploy": "Write a model as a prefill graph and a decode graph that hand all states on.",
    "run": "Continue a prompt by the graphs of a deployed folder, on onnxruntime.",
    "graft": "Replace LinearAttention nodes by chunks with integer inverses.",
    "doctor": "Say which nodes of an ONNX model a chip's compiler will not take, and what to do.",
    "profiles": "List the export profiles, and the runtimes that graphs can be verified on.",
}


class LazyVerbs(click.Group):
    """A group whose commands are placeholders for verbs; a verb is loaded when it is called.

    Help and completion list the verbs.  Without placeholders they would import
    all verbs, and torch with them.
    """

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found if name is None else load_verb(name), rest


def stand_ins() -> list[click.Command]:
    """Return a command for every verb that has its name and its line of help, and nothing else."""
    return [click.Command(name, help=line) for name, line in VERBS.items()]


def load_verb(name: str) -> click.Command:
    """Import the verb's module, which bears its name, and return the verb."""
    name = name.replace("-", "_")
    verb: click.Command = getattr(import_module(f"qinvert.cli.{name}"), name)
    return verb
