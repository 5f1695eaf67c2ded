"""How well a state keeps over a long context: steps in integers, free-running, against the rule in float32.

    python benchmarks/step_state.py --model DIRECTORY --write

Plans are calibrated on short rows and run on one long row. Without a model the recall model reads its task
again and again; a model of bytes reads the text of Python's own documentation. The table goes between the
markers of `docs/step.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from step_page import marker, written

import qinvert
from qinvert import recall
from qinvert.calibration.chunk_steps.candidate import exact_outputs
from qinvert.calibration.patching import patched_by_layer, run_model, solve_chunks
from qinvert.chunk_step.ports import NEW_VALUES, OUTPUT, READ_STATE, STATE
from qinvert.delta_rule.chunks import ChunkOutputs, DeltaChunks
from qinvert.documents import markdown
from qinvert.execution.chunk_steps import run_integers
from qinvert.metrics import NoiseStatistics
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.pretrained import load_pretrained

#: Tokens of a row of the calibration, and rows.
SHORT, ROWS = 512, 16
PAGE = Path(__file__).resolve().parent.parent / "docs" / "step.md"
#: Plans by their names: widths of values and of the state, and room for a state that grows.
PLANS = {
    "8 bits": {"value_bits": 8, "state_bits": 8},
    "8 bits, margin 4": {"value_bits": 8, "state_bits": 8, "state_margin": 4.0},
    "values 8, state 16 bits, margin 4": {"value_bits": 8, "state_bits": 16, "state_margin": 4.0},
    "values 8 bits, error feedback, margin 4": {
        "value_bits": 8,
        "error_feedback": True,
        "state_margin": 4.0,
    },
    "values 8 bits, state in float32": {"value_bits": 8, "state_bits": "float32"},
    "16 bits, no margin": {"value_bits": 16, "state_bits": 16, "state_margin": 1.0},
    "16 bits, margin 4": {"value_bits": 16, "state_bits": 16, "state_margin": 4.0},
    "values 16 bits, state in float32": {"value_bits": 16, "state_bits": "float32"},
}


class Enough(BaseException):
    """All layers have been seen: what a model does behind them is of no interest."""


def chunks_of(model: Any, tokens: torch.Tensor, count: int) -> dict[str, DeltaChunks]:
    """Return the chunks of the first ``count`` layers of a forward pass."""
    found: dict[str, DeltaChunks] = {}

    def see(layer: str, chunks: DeltaChunks) -> Any:
        found[layer] = chunks
        if len(found) == count:
            raise Enough
        return solve_chunks(layer, chunks)

    try:
        with patched_by_layer(model, see):
            run_model(model, {"input_ids": tokens})
    except Enough:
        pass
    return found


def rows(plan: LayerPlan, chunks: DeltaChunks, exact: ChunkOutputs) -> Iterator[str]:
    """Yield the cells of a plan: sqnr of o, of its last eighth, of the state, and values that saturate."""
    tensors = {port.name: port.tensor for port in plan.program.outputs}
    # A float does not saturate, but what products read of it does.
    state = READ_STATE if plan.tensors[STATE].format.is_float else tensors[STATE]
    watched = {state: 0, NEW_VALUES: 0, tensors[OUTPUT]: 0}

    def observe(name: str, integers: torch.Tensor) -> None:
        if name in watched:
            watched[name] += int((integers.abs() >= plan.tensors[name].format.largest).sum())

    found = run_integers(plan, chunks, plan.channels, observe=observe)
    late = chunks.beta.shape[2] * 7 // 8
    pairs = (
        (found.out, exact.out),
        (found.out[:, :, late:], exact.out[:, :, late:]),
        (found.state, exact.state),
    )
    for estimate, truth in pairs:
        noise = NoiseStatistics()
        noise.update(estimate, truth)
        yield f"{noise.sqnr_db:.1f}"
    yield " / ".join(f"{count:,}" for count in watched.values())


def data_of(length: int, given: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return short rows and one long row, which have no token in common."""
    if given is None:
        rows_needed = -(-length // SHORT)
        return recall.sequences(ROWS), recall.sequences(rows_needed, seed=1).reshape(1, -1)[:, :length]
    text = "\n".join(topics.topics.values()).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    needed = SHORT * ROWS
    if len(tokens) < needed + length:
        raise SystemExit(f"the documentation has {len(tokens)} bytes; choose a shorter --tokens")
    return tokens[:needed].reshape(ROWS, SHORT), tokens[None, needed : needed + length]


def plan_of(model: Any, tokens: torch.Tensor, options: dict[str, Any]) -> Plan:
    """Calibrate whole steps: for Hexagon, but for a state in float32, which it does not take."""
    chunk = qinvert.ChunkOptions(**options)
    target = "npu-qdq-int16" if chunk.float_state else "hexagon-uint16"
    return qinvert.calibrate(model, tokens, scope="chunk", target=target, chunk=chunk)


def main() -> None:
    """Print the rows of all plans and layers as one table, and write it if told to."""
    arguments = parse()
    model = load_pretrained(arguments.model) if arguments.model else recall.load_model()
    short, long = data_of(arguments.tokens, arguments.model)
    plans = {name: plan_of(model, short, options) for name, options in PLANS.items()}
    layers = next(iter(plans.values())).layers
    seen = chunks_of(model, long, len(layers))
    exact = {layer: exact_outputs(chunks) for layer, chunks in seen.items()}
    lines = [["plan", "layer", "o, dB", "o of the last eighth, dB", "state, dB",
              "saturated: state / new values / o"]]  # fmt: skip
    for name, plan in plans.items():
        for i, (layer, chunks) in enumerate(seen.items()):
            lines.append([name, str(i), *rows(plan.layers[layer], chunks, exact[layer])])
    table = markdown(lines)
    print(table)
    if arguments.write:
        begin = marker(f"step_state.py {'--model' if arguments.model else ''}".rstrip())
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table, begin), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a model of bytes; the recall model by default")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--write", action="store_true", help=f"write the table of {PAGE.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
