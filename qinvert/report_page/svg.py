"""Axes as SVG for a page: no dates, no random names, colours that follow the page's."""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from qinvert.plot import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours of figures and the page's names of them, see the style sheet.
COLOURS: Final = {
    canvas.INK: "var(--ink)",
    canvas.MUTED: "var(--muted)",
    canvas.GRID: "var(--grid)",
    canvas.FIRST: "var(--first)",
    canvas.SECOND: "var(--second)",
    canvas.THIRD: "var(--third)",
    canvas.FOURTH: "var(--fourth)",
    canvas.BAD: "var(--bad)",
}
#: Settings under which the same figure gives the same bytes, with text as text.
SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "qinvert",
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
}
#: Nothing of the machine and of the day.
METADATA: Final = {"Date": None, "Creator": None, "Format": None, "Type": None}
#: Points of width that a phone shows; wider figures are scrolled there, and not as small as their points.
PHONE: Final = 320.0
WIDER: Final = 1.25
#: Pixels for each point where there is room: texts of all figures have one size.
LARGEST: Final = 1.6
SVG: Final = "{http://www.w3.org/2000/svg}"
LINK: Final = "{http://www.w3.org/1999/xlink}href"


def svg(ax: Axes, ident: str, alternative: str) -> str:
    """Return the figure of ``ax`` as an element for a page.

    Parameters
    ----------
    ax : Axes
    ident : str
        Prefix of all names inside, unique on the page.
    alternative : str
        What the figure shows, for those who do not see it.
    """
    root = ElementTree.fromstring(_drawn(ax.figure))
    for element in [e for e in root.iter() if e.find(f"{SVG}metadata") is not None]:
        element.remove(element.find(f"{SVG}metadata"))  # type: ignore[arg-type] # found above
    for element in root.iter():
        for style in element.findall(f"{SVG}style"):
            # It would hold for the whole page; the page's style sheet has it for figures.
            element.remove(style)
    _name_apart(root, ident)
    root.set("role", "img")
    root.set("aria-label", alternative)
    for name in ("width", "height"):
        root.set(name, root.get(name, "").replace("pt", ""))
    width = float(root.get("width", "0"))
    least = width if width <= PHONE else WIDER * width
    root.set("style", f"min-width: {least:.0f}px; max-width: {LARGEST * width:.0f}px")
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", LINK[1:-5])
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"\n\s*", "\n", _in_page_colours(text))


def _drawn(figure: Any) -> bytes:
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata=METADATA, transparent=True)
    return buffer.getvalue()


def _name_apart(root: ElementTree.Element, ident: str) -> None:
    """Keep the names that something refers to, and make them unique on the page."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{ident}-{name}")
        for key, value in element.attrib.items():
            if key == LINK and value.startswith("#"):
                element.set(key, f"#{ident}-{value[1:]}")
            else:
                element.set(key, re.sub(r"url\(#([^)]+)\)", rf"url(#{ident}-\1)", value))


def _in_page_colours(text: str) -> str:
    for colour, name in COLOURS.items():
        text = text.replace(colour, name)
    return text
