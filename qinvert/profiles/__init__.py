"""Export profiles as data: what one family of compilers takes.

Each module of this package defines one `Profile`; a new file is a new
profile.  Calibration reads from it which formats and which requantize form to
plan for, export reads how to lower, and the command line prints the table.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from qinvert.errors import ExportError, lookup
from qinvert.formats import IntFormat
from qinvert.profiles._profile import Lowering, Profile

__all__ = ["PROFILES", "Lowering", "Profile", "default_target", "find_profile"]


def _discover() -> dict[str, Profile]:
    names = sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    profiles = [import_module(f"{__name__}.{name}").PROFILE for name in names]
    return {profile.name: profile for profile in profiles}


#: Every profile by its name.
PROFILES: dict[str, Profile] = _discover()

#: Where no target is given: the first of these that takes the format.
DEFAULT_TARGETS = ("npu-qdq-int8", "npu-qdq-int4", "npu-qdq-int16", "int-ops")


def default_target(fmt: IntFormat) -> str:
    """Return the target of plans of that format, if a caller names none."""
    return next(name for name in DEFAULT_TARGETS if fmt in PROFILES[name].formats)


def find_profile(name: str) -> Profile:
    """Return the profile of that name.

    Raises
    ------
    ExportError
        If there is none; the message lists the legal names.
    """
    return lookup(PROFILES, name, "profile", ExportError)
