"""Decibels, as goals that are typed and as results that are shown."""

from __future__ import annotations

import math
from typing import Any

import click

from qinvert.checks import check_decibels
from qinvert.errors import InputError


class Decibels(click.ParamType[float]):
    """A finite number: NaN would pass every comparison."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return check_decibels(param.opts[-1] if param else "goal", float(value), InputError)
        except ValueError as error:
            self.fail(str(error), param, ctx)


#: Type of options that are goals in dB.
DECIBELS = Decibels()


def decibels(value: float) -> str:
    """``31.2``, or ``exact`` without an error."""
    return "exact" if value == math.inf else f"{value:.1f}"
