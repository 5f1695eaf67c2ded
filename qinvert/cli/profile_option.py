"""The option that names an export profile."""

from __future__ import annotations

import click

from qinvert.profiles import PROFILES

#: Adds ``--profile``.
profile_option = click.option("--profile", help=f"{', '.join(PROFILES)}; the plan's target by default.")
