"""Draw docs/layer.svg: where in a layer the inverse sits, and what qinvert makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).parent / "layer.svg"
#: What stands in a row of boxes, by the height of the row.
ROWS: Final = {
    40: ("q, k, v, beta, decay", "L of each chunk", "T = (I + L)^-1", "T V, T K", "output, state"),
    150: ("calibrate", "plan with scales", "integer MatMuls", "proof, simulation", "ONNX for NPUs"),
}
#: Number of the box that qinvert replaces.
INVERSE: Final = 2


def box(x: int, y: int, text: str, *, marked: bool) -> str:
    """Return one box with its text."""
    fill = "#f9d976" if marked else "#e8eef7"
    return (
        f'<rect x="{x}" y="{y}" width="150" height="46" rx="6" fill="{fill}" stroke="#345"/>'
        f'<text x="{x + 75}" y="{y + 28}" text-anchor="middle" fill="#123">{text}</text>'
    )


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """Return one arrow."""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#678" stroke-width="2" marker-end="url(#a)"/>'
    )


def picture() -> str:
    """Return the drawing."""
    parts = []
    for y, names in ROWS.items():
        for i, name in enumerate(names):
            parts.append(box(10 + 175 * i, y, name, marked=i == INVERSE))
            parts += [arrow(160 + 175 * i, y + 23, 182 + 175 * i, y + 23)] if i < len(names) - 1 else []
    parts.append(arrow(435, 86, 435, 147))
    marker = (
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 210" font-family="sans-serif" font-size="14" '
        'role="img"><title>A layer of delta-rule linear attention, and the inverse that qinvert replaces</title>'
        f'<rect width="880" height="210" fill="#fff"/><defs>{marker}<path d="M0 0L8 4L0 8z" fill="#678"/></marker>'
        '</defs><text x="10" y="24" fill="#123">In the layer</text>'
        '<text x="10" y="136" fill="#123">What qinvert makes of it</text>' + "\n".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    PAGE.write_text(picture())
