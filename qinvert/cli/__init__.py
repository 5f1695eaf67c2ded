"""The command line; the only part of the package that prints."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Entry point of the ``qinvert`` command."""
    # Tables and errors are ours to print; models should load silently.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from qinvert.cli.app import cli
    except ImportError as error:
        if error.name not in ("click", "rich"):
            raise
        print(
            f"qinvert: the command line needs {error.name}; run: pip install 'qinvert[cli]'", file=sys.stderr
        )
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    cli()
