"""The verb profiles: what graphs can be exported for, and verified on."""

from __future__ import annotations

from typing import Any

import click

from qinvert.cli.output import Output, output_options
from qinvert.export.runtimes import RUNTIMES, Runtime, installed
from qinvert.profiles import PROFILES, Profile


@click.command()
@output_options
def profiles(as_json: bool, quiet: bool) -> None:
    """List the export profiles, and the runtimes that graphs can be verified on.

    \b
    Example: qinvert profiles
    """
    output = Output(as_json=as_json, quiet=quiet)
    rows = [
        [
            p.name,
            ", ".join(map(str, p.formats)),
            types_of(p),
            str(p.opset),
            ", ".join(p.proved),
            p.summary,
            p.caveats,
        ]
        for p in PROFILES.values()
    ]
    output.table("Profiles", ["profile", "formats", "types", "opset", "proved on", "form", "caveats"], rows)
    found = installed()
    runtimes = [[r.name, "installed" if r.name in found else remedy(r), r.summary] for r in RUNTIMES.values()]
    output.table("Runtimes", ["runtime", "here", "what"], runtimes)
    output.result({p.name: profile_to_dict(p) for p in PROFILES.values()})


def remedy(runtime: Runtime) -> str:
    """How to get a runtime."""
    return f"pip install {runtime.requirement}, or QINVERT_{runtime.name.upper()}_PYTHON"


def types_of(profile: Profile) -> str:
    """``int8``, or ``int8, uint8 x int8`` where products take another type from the left."""
    left = profile.left_operand
    stored = ", ".join(profile.stored)
    return stored if left is None else f"{stored}, {left.element} x {profile.storage.element}"


def profile_to_dict(profile: Profile) -> dict[str, Any]:
    """Return JSON types."""
    return {
        "formats": [fmt.name for fmt in profile.formats],
        "types": types_of(profile),
        "scales": "pow2" if profile.power_of_two_scales else "float",
        "opset": profile.opset,
        "proved": list(profile.proved),
        "summary": profile.summary,
        "caveats": profile.caveats,
    }
