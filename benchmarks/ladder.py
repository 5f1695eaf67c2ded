"""Print what ``bits="auto"`` reaches and costs as the goal rises, and what single levers gain."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import qinvert
from qinvert import recall
from qinvert.delta_rule.from_keys import from_keys
from qinvert.plan.plan import LayerPlan
from qinvert.stress import STRESS, stress_matrices

#: No loss against the floor is too much: the goal alone decides.
ANY_LOSS_DB: Final = 200.0
#: Cosines of keys that gates are paired with, and the size of the keys.
COSINES: Final = (0.3, 0.5, 0.9)
KEY_SIZE: Final = 128
#: What is tried by itself: a name, and the arguments of `qinvert.calibrate`.
LEVERS: Final[dict[str, dict[str, Any]]] = {
    "int8": {"bits": 8},
    "int8, mse ranges": {"bits": 8, "ranges": "mse"},
    "int8, percentile ranges": {"bits": 8, "ranges": "percentile"},
    "int8x2": {"bits": "8x2"},
}


def gates(path: Path, cosine: float, count: int) -> torch.Tensor:
    """Return L of real gates, ``beta`` and ``g`` of one head each, and synthetic unit keys."""
    generator = torch.Generator().manual_seed(0)
    with np.load(path) as arrays:
        beta, g = (torch.from_numpy(arrays[name].T.copy()).reshape(-1, 64) for name in ("beta", "g"))
    chosen = torch.randperm(len(beta), generator=generator)[:count]
    shared = torch.randn(count, 1, KEY_SIZE, generator=generator)
    own = torch.randn(count, 64, KEY_SIZE, generator=generator)
    mixed = torch.nn.functional.silu(cosine**0.5 * shared + (1 - cosine) ** 0.5 * own)
    return from_keys(torch.nn.functional.normalize(mixed, dim=-1), beta[chosen], g[chosen])


def sources(folder: Path | None, count: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, source and data of everything in the table."""
    yield "recall", recall.load_model(), recall.sequences(count)
    for path in sorted(folder.glob("*.npz")) if folder else ():
        for cosine in COSINES:
            yield f"{path.stem}, cosine {cosine:g}", gates(path, cosine, count), None
    for name in STRESS:
        yield name, stress_matrices(name, count, 64), None


def planned(source: Any, data: Any, target: str, **arguments: Any) -> dict[str, LayerPlan]:
    """Return the plan of every layer; goals that are missed are in its provenance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = qinvert.calibrate(source, data, target=target, max_loss_db=ANY_LOSS_DB, **arguments)
    return dict(plan.layers)


def row(name: str, layer: str, what: str, plan: LayerPlan) -> str:
    """One row of the table."""
    facts = plan.provenance
    reached = f"{facts['expected_sqnr_db']:.1f} dB" if facts["meets_goal"] else "missed"
    cost = f"{facts['cost'] / 1e6:.2f} M"
    return f"| {name} {layer} | {what} | {reached} | {cost} | {plan.formats} | `{plan.program.title}` |"


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=Path, help="Folder of .npz files with arrays beta and g.")
    parser.add_argument("--only", help="Names that start with this.", default="")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--step", type=int, default=5, help="Decibels between two goals.")
    parser.add_argument("--target", default="int-ops")
    arguments = parser.parse_args()
    print("| source | goal or lever | reached | cost | formats | program |")
    print("|" + " --- |" * 6)
    for name, source, data in sources(arguments.gates, arguments.count):
        if not name.startswith(arguments.only):
            continue
        wanted: dict[str, dict[str, Any]] = {
            f"{goal} dB": {"min_sqnr_db": float(goal)} for goal in range(20, 71, arguments.step)
        }
        levers = {what: {**given, "min_sqnr_db": 0.0} for what, given in LEVERS.items()}
        for what, given in (levers | wanted).items():
            for layer, plan in planned(source, data, arguments.target, **given).items():
                print(row(name, layer, what, plan), flush=True)


if __name__ == "__main__":
    main()
