"""Export profiles as data: each says what one family of compilers accepts.

Each module of this package defines one `Profile`; a new file is a new
profile.  Calibration reads from it which formats and which requantize form to
plan for, export reads how to lower and which rules graphs must follow, and the
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

#: Targets for callers that name none: the first of these that takes the format.
DEFAULT_TARGETS = ("npu-qdq-int8", "npu-qdq-int4", "npu-qdq-int16", "int-ops")


def discover() -> dict[str, Profile]:
    """Fill `PROFILES` from the modules of this package, and return it.

    It runs once on import; call it again after a folder was added to the
    package's ``__path__``.  If it fails, the table stays as it was.

    Raises
    ------
    ExportError
        If a module does not define ``PROFILE``, or if two profiles have the same name.
    """
    found = definitions(__name__, __path__, "PROFILE", Profile, ExportError)
    PROFILES.clear()
    PROFILES.update(found)
    return PROFILES


def default_target(fmt: IntFormat) -> str:
    """Return the target of plans of that format for callers that do not name one."""
    return next(name for name in DEFAULT_TARGETS if fmt in PROFILES[name].formats)


def find_profile(name: str) -> Profile:
    """Return the profile of that name.

    Raises
    ------
    ExportError
        If there is no such profile; the message lists the legal names.
    """
    return lookup(PROFILES, name, "profile", ExportError)


discover()
