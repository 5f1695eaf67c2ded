"""Export profiles as data: what one family of compilers takes.

Each module of this package defines one `Profile`; a new file is a new
profile.  Calibration reads from it which formats and which requantize form to
plan for, export reads how to lower and what rules to hold graphs to, and the
command line prints the table.
"""

from __future__ import annotations

from qinvert.discovery import definitions
from qinvert.errors import ExportError, lookup
from qinvert.formats import IntFormat
from qinvert.profiles._profile import Profile

__all__ = ["PROFILES", "Profile", "default_target", "discover", "find_profile"]

#: Every profile by its name.
PROFILES: dict[str, Profile] = {}

#: Where no target is given: the first of these that takes the format.
DEFAULT_TARGETS = ("npu-qdq-int8", "npu-qdq-int4", "npu-qdq-int16", "int-ops")


def discover() -> dict[str, Profile]:
    """Fill `PROFILES` from the modules of this package, and return it.

    Runs once by itself; call it again after a folder was added to the
    package's ``__path__``.  If it fails, the table stays as it was.

    Raises
    ------
    ExportError
        If a module defines no ``PROFILE``, or two define one of the same name.
    """
    found = definitions(__name__, __path__, "PROFILE", Profile, ExportError)
    PROFILES.clear()
    PROFILES.update(found)
    return PROFILES


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


discover()
