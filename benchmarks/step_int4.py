"""What single tensors of a chunk step lose in 4 bits, on the recall model.

    python benchmarks/step_int4.py --write

Plans for ``int-ops``, everything else in 8 bits.  The table goes between the markers of `docs/step.md`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from step_page import marker, written

import qinvert
from qinvert import ChunkOptions, recall
from qinvert.documents import markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "step.md"
#: Tensors of 4 bits, by what the table calls them; all that share their grids follow.
ROWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "D": ("D",),
    "T, with M and the inverse": ("T", "M"),
    "D, T and scores": ("D", "T", "M", "scores"),
    "q": ("q",),
    "k": ("k",),
}


def sqnr(tensors: tuple[str, ...]) -> list[str]:
    """Return o and state of every layer, dB, on the sample of the calibration."""
    options = ChunkOptions(value_bits=8, state_bits=8, int4=tensors)
    plan = qinvert.calibrate(
        recall.load_model(), recall.sequences(4), scope="chunk", target="int-ops", bits=8, chunk=options
    )
    facts = [layer.provenance for layer in plan.layers.values()]
    return [f"{x['expected_sqnr_o_db']:.1f} / {x['expected_sqnr_state_db']:.1f}" for x in facts]


def main() -> None:
    """Print the table, and write it if told to."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write the table of {PAGE.name}")
    arguments = parser.parse_args()
    head = ["tensors of 4 bits", "layer 0, o / state, dB", "layer 1, o / state, dB"]
    content = markdown([head, *([name, *sqnr(tensors)] for name, tensors in ROWS.items())])
    print(content)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(written(page, content, marker("step_int4.py")), encoding="utf-8")


if __name__ == "__main__":
    main()
