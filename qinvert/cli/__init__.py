"""The command line; the only part of the package that prints."""

from __future__ import annotations

import io
import os
import sys
from importlib.util import find_spec


def main() -> None:
    """Entry point of the ``qinvert`` command."""
    try:
        run()
    except KeyboardInterrupt:
        # Imports take a second, in which a user may change their mind.
        print("qinvert: interrupted", file=sys.stderr)
        sys.exit(130)


def run() -> None:
    """Load what the command line needs, and run a verb."""
    # Tables and errors are ours to print; models should load silently.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    require("click")
    # Before NumPy loads: its threads only wait for each other on matrices of a chunk.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Loaded with the first table, which would be late to miss it.
    require("rich")
    from qinvert.cli.app import cli

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    cli()


def require(package: str) -> None:
    """Leave with one line and exit code 2 where a package is not installed."""
    if find_spec(package) is None:
        print(f"qinvert: the command line needs {package}; run: pip install 'qinvert[cli]'", file=sys.stderr)
        sys.exit(2)
