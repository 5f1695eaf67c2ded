"""What verbs print of a diagnosis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qinvert.cli.output import Output
from qinvert.errors import ExportError

if TYPE_CHECKING:
    from qinvert.export.rules.doctor import Diagnosis
    from qinvert.plan.plan import Plan


def show_diagnosis(output: Output, diagnosis: Diagnosis) -> None:
    """Print the verdict, and a line and a remedy for each group of faults."""
    output.say(diagnosis.verdict)
    for group in diagnosis.groups:
        output.say(f"  {group.title}\n    {group.remedy}")


def examined(output: Output, path: str, plan: Plan, hardware: str | None) -> Diagnosis | None:
    """Print and return the verdict on a file, for the chip that is given or that of the plan, if any."""
    from qinvert.export.rules.doctor import doctor as examine
    from qinvert.export.rules.doctor import with_compilers

    named = plan.provenance.get("hardware") if hardware is None else hardware
    try:
        diagnosis = examine(path, hardware=named if named in with_compilers() else hardware)
    except ExportError:
        if hardware is not None:
            raise
        # No chip is named anywhere.
        output.say(f"for a chip's verdict: qinvert doctor {path} --hardware {with_compilers()[0]}")
        return None
    show_diagnosis(output, diagnosis)
    return diagnosis


def check_chip(hardware: str | None) -> None:
    """Refuse a chip whose compiler is not known, before the work starts."""
    from qinvert.export.rules.doctor import chip_with_compiler

    if hardware is not None:
        chip_with_compiler(hardware)
