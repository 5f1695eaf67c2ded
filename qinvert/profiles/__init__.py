"""Export profiles as data: what one family of compilers takes.

Each module of this package defines one `Profile`; a new file is a new
profile.  Calibration reads from it which formats and which requantize form to
plan for, export reads how to lower, and the command line prints the table.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from qinvert.errors import ExportError, lookup
from qinvert.profiles._profile import Lowering, Profile

__all__ = ["PROFILES", "Lowering", "Profile", "find_profile"]


def _discover() -> dict[str, Profile]:
    names = sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    profiles = [import_module(f"{__name__}.{name}").PROFILE for name in names]
    return {profile.name: profile for profile in profiles}


#: Every profile by its name.
PROFILES: dict[str, Profile] = _discover()


def find_profile(name: str) -> Profile:
    """Return the profile of that name.

    Raises
    ------
    ExportError
        If there is none; the message lists the legal names.
    """
    return lookup(PROFILES, name, "profile", ExportError)
