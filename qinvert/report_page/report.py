"""`qinvert.report`: a plan as one page of HTML."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any, Final

from qinvert.calibration.data.token_data import with_options
from qinvert.calibration.evaluate import Score
from qinvert.errors import MissingDependencyError
from qinvert.files import check_writable, write_atomically
from qinvert.plan.plan import Plan
from qinvert.plot.canvas import require_matplotlib
from qinvert.progress import track
from qinvert.report_page.costs import costs_section
from qinvert.report_page.errors import bits_section, path_section
from qinvert.report_page.evidence import Evidence, Progress, gather
from qinvert.report_page.figure import Section
from qinvert.report_page.heads import heads_section
from qinvert.report_page.programs import programs_section
from qinvert.report_page.ranges import growth_section, values_section
from qinvert.report_page.words import Status, layer_words, next_steps
from qinvert.version import __version__

#: What the page shows, in its order.
SECTIONS: Final = (
    growth_section,
    heads_section,
    costs_section,
    values_section,
    bits_section,
    path_section,
    programs_section,
)
#: Digits of the plan's hash that are shown.
DIGITS: Final = 12


def report(
    plan: Plan,
    source: Any = None,
    path: str | PathLike[str] | None = None,
    *,
    data: Any = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    layers: Sequence[str] | None = None,
    score: Score | None = None,
    plan_file: str = "plan.json",
    progress: Progress | None = None,
    force: bool = False,
) -> str:
    """Show a plan, and what is measured of it on a source, as one page that needs no network.

    The same plan and source give the same bytes.

    Parameters
    ----------
    plan : Plan
    source : optional
        Where L comes from, see `qinvert.calibration.sources.open_source`: matrices, or a model
        with ``data``.  Without it the page shows what the plan itself holds.
    path : path, optional
        Where to write the page.
    data : optional
        Text or tokens for a model.
    num_samples, seq_len : int, optional
        How many sequences of ``data`` to read, and how many tokens each of them has.
    layers : sequence of str, optional
        Entries of the plan that are drawn in detail; by default the four worst.
    score : callable, optional
        A task's accuracy, as for `qinvert.evaluate`.
    plan_file : str
        The plan's path in the commands that the page offers.
    progress : callable, optional
        As for `qinvert.simulate`.
    force : bool
        Go on with another model than the one that the plan was made for.

    Returns
    -------
    str
        The page.

    Raises
    ------
    InputError, PlanError
        As `qinvert.simulate` and `qinvert.evaluate`, and if ``path`` cannot be written.
    MissingDependencyError
        If matplotlib or jinja2 is not installed.
    """
    require_matplotlib()
    template = _template()
    if path is not None:
        check_writable(path)
    given = with_options(data, num_samples, seq_len)
    found = gather(plan, source, given, score=score, layers=layers, progress=progress, force=force)
    page: str = template.render(**_content(found, plan_file))
    if path is not None:
        write_atomically(path, page.encode())
    return page


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise MissingDependencyError(
            "pages need jinja2, which is not installed; run: pip install 'qinvert[report]'"
        ) from None
    environment = Environment(
        loader=PackageLoader("qinvert.report_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html")


def _breakable(text: str) -> Any:
    """Return a name that may be broken at its points and strokes, and numbers that may not."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[a-z_])[./](?!\s|$)", r"\g<0><wbr>", str(escape(text)), flags=re.IGNORECASE))


def _content(found: Evidence, plan_file: str) -> dict[str, Any]:
    verdicts = [layer_words(found, name) for name in found.plan.layers]
    sections: list[Section] = [section(found) for section in track(SECTIONS, "sections", len(SECTIONS))]
    return {
        "title": f"qinvert: {fspath(plan_file)}",
        "headline": _headline([verdict.status for verdict in verdicts]),
        "facts": _facts(found),
        "verdicts": verdicts,
        "steps": next_steps(found, plan_file),
        "sections": sections,
        "version": __version__,
    }


def _headline(statuses: Sequence[Status]) -> str:
    missed = statuses.count(Status.MISSED)
    layers = f"{len(statuses)} entries" if len(statuses) > 1 else "The only entry"
    if missed:
        return f"{missed} of {len(statuses)} entries miss a goal."
    if Status.UNKNOWN in statuses:
        return "The plan was not calibrated, or does not say how it was."
    cautions = statuses.count(Status.CAUTION)
    reach = "reach their goals" if len(statuses) > 1 else "reaches its goal"
    return f"{layers} {reach}" + (f", {cautions} with a caution." if cautions else ".")


def _facts(found: Evidence) -> list[tuple[str, str]]:
    facts = found.plan.provenance
    known = [
        ("target", found.plan.target),
        ("hardware", facts.get("hardware")),
        ("made from", facts.get("source")),
        ("method", facts.get("method")),
        ("bits", facts.get("bits")),
        ("goal for sqnr", None if found.goal_db is None else f"{found.goal_db:g} dB"),
        ("scope", "whole chunk steps" if found.of_steps else "the inverse T"),
        ("measured on", found.measured_on or "nothing: the plan alone"),
        ("plan", hashlib.sha256(found.plan.to_bytes()).hexdigest()[:DIGITS]),
    ]
    return [(name, str(value)) for name, value in known if value]
