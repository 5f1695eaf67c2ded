"""Everything that qinvert raises on purpose.

A message says what was given, what is legal, and what to do next.  The
command line prints it as one line and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class QInvertError(ValueError):
    """Base class of every error that a caller can cause."""


class InputError(QInvertError):
    """Matrices, model inputs or data files that the library cannot accept."""


class ProgramError(QInvertError):
    """A program whose steps do not fit together, or illegal method arguments."""


class PlanError(QInvertError):
    """A plan that is damaged, inconsistent, or lacks what the caller asked for."""


class ExportError(QInvertError):
    """A plan that the chosen export profile cannot express."""


class VerificationError(QInvertError):
    """A runtime computed something other than the plan says."""


class MissingDependencyError(QInvertError, ImportError):
    """An optional package is needed for this call and is not installed."""


def reason(error: BaseException) -> str:
    """Return the first line of a foreign error, or its type if it has no message."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def lookup(table: Mapping[str, T], name: object, kind: str, error: type[QInvertError], more: str = "") -> T:
    """Return ``table[name]``, or raise ``error`` with the legal names; ``more`` says what else is legal."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise error(f"unknown {kind} {name!r}; use one of {', '.join(table)}{more}")
