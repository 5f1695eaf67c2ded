"""Tables of profiles, chips and runtimes for the site, written from the code while it is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qinvert.documents import markdown
from qinvert.export.runtimes import RUNTIMES
from qinvert.hardware import HARDWARE
from qinvert.profiles import PROFILES

FOLDER = Path(__file__).parent / "reference" / "tables"


def tables() -> dict[str, tuple[Sequence[str], list[list[str]]]]:
    """Return columns and rows by the name of the file."""
    profiles = [
        [f"`{p.name}`", p.summary, ", ".join(f.name for f in p.formats), str(p.opset), ", ".join(p.proved),
         p.caveats]
        for p in PROFILES.values()
    ]  # fmt: skip
    chips = [
        [f"`{c.name}`", c.summary, c.unit, f"{c.error:.0%}", ", ".join(f"`{t}`" for t in c.targets), c.source]
        for c in HARDWARE.values()
    ]
    runtimes = [[f"`{name}`", r.summary, f"`pip install {r.requirement}`"] for name, r in RUNTIMES.items()]
    return {
        "profiles": (("profile", "form", "formats", "opset", "compared on", "caveats"), profiles),
        "chips": (("chip", "what", "unit", "error", "profiles", "source"), chips),
        "runtimes": (("runtime", "compiles for", "needs"), runtimes),
    }


def write(_app: Any = None) -> None:
    """Write every table into its file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (columns, rows) in tables().items():
        (FOLDER / f"{name}.md").write_text(f"{markdown([list(columns), *rows])}\n")
