"""The command group: one verb per step of the job."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import click

from qinvert.cautions import QInvertWarning
from qinvert.cli.output import printable
from qinvert.cli.verbs import LazyVerbs, stand_ins
from qinvert.errors import QInvertError
from qinvert.version import __version__

#: Exit code of a process that Ctrl-C ends: 128 and the number of the signal.
INTERRUPTED: Final = 130


class OneLineErrors(LazyVerbs):
    """Turns every `QInvertError` and every illegal option into one line on stderr and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the verb."""
        try:
            with _warnings_as_lines():
                return super().main(*args, **{**kwargs, "standalone_mode": False})
        except QInvertError as error:
            refuse(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "qinvert"
            refuse(f"{error.format_message()} See: {command} --help")
        except (click.Abort, KeyboardInterrupt):
            refuse("interrupted", INTERRUPTED)
        except (MemoryError, RuntimeError) as error:
            # torch says that memory is short by a RuntimeError of this text.
            if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
                raise
            refuse("not enough memory for this input; pass less at once")
        except OSError as error:
            refuse(f"cannot write the output: {error.strerror or error}")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; a reader that has seen enough, such as `head`, is no error."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Nothing more can be flushed to it.  Click itself would leave with 1.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        return result


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each `QInvertWarning` at once, as one line on stderr; tables say those of layers."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, QInvertWarning):
                click.echo(f"qinvert: warning: {printable(' '.join(str(message).split()))}", err=True)
            else:
                before(message, category, *rest, **more)

        setattr(warnings, "showwarning", show)  # noqa: B010 - as the module's page says
        warnings.simplefilter("always", QInvertWarning)
        warnings.filterwarnings("ignore", message="layer ", category=QInvertWarning)
        yield


def refuse(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and leave with an exit code."""
    click.echo(f"qinvert: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


@click.group(
    cls=OneLineErrors, commands=stand_ins(), context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__)
def cli() -> None:
    """Triangular inverses of delta-rule linear attention as low-bit integer MatMuls.

    \b
    qinvert demo                                    everything, on the embedded model
    qinvert calibrate MODEL --data tokens.npz -o plan.json
    qinvert simulate plan.json --min-sqnr 20
    qinvert export plan.json -o graphs/
    qinvert verify graphs/
    qinvert export-model plan.json -o model.onnx    the whole model
    qinvert graft model.onnx plan.json -o out.onnx  the LinearAttention nodes of any model

    Exit codes: 0 done, 1 a goal was missed, 2 bad input, 130 interrupted.
    """
