"""How far powers of M outgrow the inverse, as a table and as JSON types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qinvert.cli.output import Output

if TYPE_CHECKING:
    from qinvert.calibration.growth import RangeGrowth


def show_growth(output: Output, growth: dict[str, RangeGrowth]) -> None:
    """Print the range-growth table."""
    powers = sorted({k for g in growth.values() for k in g.powers})
    columns = ["layer", "matrices", *(f"max|M^{k}|" for k in powers), "max|T - I|"]
    rows = [
        [
            name,
            str(g.matrices),
            *(f"{g.powers[k]:.3g}" if k in g.powers else "-" for k in powers),
            f"{g.inverse:.3g}",
        ]
        for name, g in growth.items()
    ]
    output.table("Range growth: powers of M against the inverse", columns, rows)


def growth_to_dict(growth: RangeGrowth) -> dict[str, Any]:
    """Return JSON types."""
    powers = {str(k): min(v, 3.4e38) for k, v in growth.powers.items()}
    return {"matrices": growth.matrices, "powers": powers, "inverse": growth.inverse}
