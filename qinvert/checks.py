"""Checks of plain arguments, so that every refusal of a number has the same words."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import StrEnum
from numbers import Integral
from typing import TypeGuard, TypeVar

from qinvert.errors import QInvertError

E = TypeVar("E", bound=StrEnum)

#: Largest goal in dB: the ratios of float64 numbers end at about 6,000 dB.
MAX_DECIBELS = 10_000
#: Largest seed that every random generator in use accepts.
MAX_SEED = 2**63 - 1


def check_integer(
    name: str, value: object, low: int, high: int, error: type[QInvertError], hint: str = ""
) -> int:
    """Return ``value`` if it is an integer in ``[low, high]``; a boolean is not one.

    Raises
    ------
    QInvertError
        Of the class ``error``, with the value, the legal range and ``hint``.
    """
    if not _is_integer(value, low, high):
        raise error(f"{name} {value!r} is not in [{low}, {high}]{hint}")
    return int(value)


def _is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    # Integral also includes NumPy's integers.
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def check_power_of_two(
    name: str, value: object, low: int, high: int, error: type[QInvertError], hint: str = ""
) -> int:
    """Return ``value`` if it is a power of two in ``[low, high]``.

    Raises
    ------
    QInvertError
        Of the class ``error``, with the value, the legal range and ``hint``.
    """
    if not _is_integer(value, low, high) or value & (value - 1):
        raise error(f"{name} {value!r} is not a power of two in [{low}, {high}]{hint}")
    return int(value)


def is_float32(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number that float32 holds exactly; a boolean is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**128 and ctypes.c_float(value).value == value


def check_seed(seed: object, error: type[QInvertError]) -> int:
    """Return ``seed`` if random generators accept it.

    Raises
    ------
    QInvertError
        Of the class ``error``.
    """
    return check_integer("seed", seed, 0, MAX_SEED, error)


def check_decibels(name: str, value: object, error: type[QInvertError]) -> float:
    """Return ``value`` if it is a finite number of decibels.

    Raises
    ------
    QInvertError
        Of the class ``error``, also for NaN, which no later comparison would notice.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_DECIBELS:
        raise error(f"{name} {value!r} is not a number of decibels; pass for example 20.0")
    return float(value)


def check_magnitude(name: str, value: object, error: type[QInvertError], hint: str) -> float:
    """Return ``value`` if it is a number of at least 0, infinity included.

    Raises
    ------
    QInvertError
        Of the class ``error``, with ``hint``, also for NaN, which no later comparison would notice.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise error(f"{name} {value!r} is not a number of at least 0; {hint}")
    return float(value)


def check_flag(name: str, value: object, error: type[QInvertError]) -> bool:
    """Return ``value`` if it is a boolean.

    Raises
    ------
    QInvertError
        Of the class ``error``: a string such as ``"no"`` would count as true.
    """
    if not isinstance(value, bool):
        raise error(f"{name} {value!r} is neither True nor False")
    return value


def check_member(
    kind: type[E], name: str, value: object, error: type[QInvertError], more: Sequence[str] = ()
) -> E:
    """Return the member of an enumeration that has this value.

    Raises
    ------
    QInvertError
        Of the class ``error``, with all legal values; ``more`` are those that the caller takes beside them.
    """
    members = list(kind)
    if not isinstance(value, str) or value not in members:
        *others, last = [*more, *map(str, members)]
        raise error(f"{name} {value!r} is unknown; use {', '.join(others)} or {last}")
    return kind(value)
