"""The command group: one verb per step of the job."""

from __future__ import annotations

import sys
from typing import Any

import click

from qinvert.cli.demo import demo
from qinvert.cli.graphs import export, profiles, verify
from qinvert.cli.plans import calibrate, evaluate, inspect, simulate
from qinvert.errors import QInvertError
from qinvert.version import __version__


class OneLineErrors(click.Group):
    """Turns every `QInvertError` into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except QInvertError as error:
            click.echo(f"qinvert: {' '.join(str(error).split())}", err=True)
            sys.exit(2)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    r"""Triangular inverses of delta-rule linear attention as low-bit integer MatMuls.

    \b
    qinvert demo                                    everything, on the embedded model
    qinvert calibrate MODEL --data tokens.npz -o plan.json
    qinvert simulate plan.json --min-sqnr 20
    qinvert export plan.json -o graphs/
    qinvert verify graphs/

    Exit codes: 0 done, 1 a goal was missed, 2 bad input.
    """


for verb in (demo, inspect, calibrate, simulate, export, verify, evaluate, profiles):
    cli.add_command(verb)
