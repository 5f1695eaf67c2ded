"""The recall model with graphs of chunk steps in place of its layers, run by a runtime or an emulator.

    QINVERT_QNN_PYTHON=... python benchmarks/step_recall.py --runtime qnn --setting "Hexagon v81"

Every layer runs its own graph chunk after chunk; the runtime hands the state on. Prints the accuracy of the
float model, of the simulator and of the runtime, and what differs between the last two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.chunk_steps.candidate import exact_outputs
from qinvert.calibration.patching import patched_by_layer, run_model
from qinvert.chunk_step.ports import OUTPUT, STATE
from qinvert.delta_rule.chunks import ChunkOutputs, DeltaChunks
from qinvert.documents import markdown
from qinvert.errors import QInvertError
from qinvert.execution.chunk_steps import run_integers
from qinvert.export.exporting import build, serialize
from qinvert.export.runtimes import RUNTIMES, execute_sequences
from qinvert.export.step_interface import STATE_OUT, StepInterface
from qinvert.export.verification.step_inputs import StepData, step_data
from qinvert.export.verification.step_reference import StepReference
from qinvert.metrics import NoiseStatistics
from qinvert.plan.plan import Plan
from qinvert.profiles import Profile, find_profile

#: Ends of the graphs: integers, which a host makes and reads.
ENDS = {"layout": "channels_first", "input_type": "integers", "output": "integers"}
#: Widths of values; keys have 8 bits.
WIDTHS = (8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLayers:
    """Runs the graph of each layer in a runtime, as a `LayerInverse`."""

    plan: Plan
    runtime: str
    #: Which setting of the runtime gives the results; the last one if it is empty.
    setting: str = ""
    #: Types of products by layer, and nodes elsewhere.
    products: dict[str, dict[str, int]] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    #: What each layer was given.
    seen: dict[str, DeltaChunks] = field(default_factory=dict)
    #: Sqnr of o against the simulator, and of both against the exact rule, by layer.
    noise: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def __call__(self, layer: str, chunks: DeltaChunks) -> ChunkOutputs:
        """Return what the runtime makes of all chunks of a layer."""
        heads = chunks.beta.shape[1]
        self.seen[layer] = chunks
        model = build(self.plan, layer=layer, heads=heads, **ENDS)
        layer_plan, profile = self.plan.layers[layer], find_profile(self.plan.target)
        interface = StepInterface(
            heads=heads, layout="channels_first", input_type="integers", output="integers"
        )
        data = step_data(layer_plan, interface, given(chunks))
        outputs = self._run(layer, serialize(model), data, profile)
        found = results(outputs, data, profile, chunks)
        self._compare(layer, found, chunks)
        return found

    def _run(self, layer: str, content: bytes, data: StepData, profile: Profile) -> list[list[Any]]:
        chosen = None
        sequences = data.sequences(profile)
        for execution in execute_sequences(self.runtime, content, sequences, {STATE_OUT: STATE}):
            if not self.setting or execution.setting == self.setting:
                chosen = execution
        if chosen is None:
            sys.exit(f"{self.runtime} has no setting {self.setting!r}")
        kinds = list(chosen.products.values())
        self.products[layer] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        self.elsewhere.extend(chosen.elsewhere)
        return [list(calls) for calls in chosen.sequences]

    def _compare(self, layer: str, found: ChunkOutputs, chunks: DeltaChunks) -> None:
        plan = self.plan.layers[layer]
        simulated, exact = run_integers(plan, chunks, plan.channels).out, exact_outputs(chunks).out
        pairs = ((found.out, simulated), (found.out, exact), (simulated, exact))
        values = []
        for estimate, truth in pairs:
            noise = NoiseStatistics()
            noise.update(estimate, truth)
            values.append(noise.sqnr_db)
        self.noise[layer] = (values[0], values[1], values[2])


def given(chunks: DeltaChunks) -> dict[str, np.ndarray]:
    """Return the inputs of a graph with channels first, all tokens of all sequences."""
    flat = {name: getattr(chunks, name).flatten(2, 3) for name in ("q", "k", "v", "beta", "g")}
    turned = {name: flat[name].mT for name in ("q", "k", "v")}
    return {name: x.numpy() for name, x in {**flat, **turned, "state": chunks.state.mT}.items()}


def results(
    sequences: list[list[Any]], data: StepData, profile: Profile, chunks: DeltaChunks
) -> ChunkOutputs:
    """Return real outputs and states of what a runtime returned."""
    reference = StepReference(data=data, profile=profile, integers={}, truth={})
    joined = np.stack([np.concatenate([call[OUTPUT] for call in calls], axis=-1) for calls in sequences])
    out = torch.from_numpy(np.ascontiguousarray(reference.reals(OUTPUT, joined))).flatten(0, 1).mT
    last = np.concatenate([calls[-1][STATE_OUT] for calls in sequences])
    state = torch.from_numpy(np.ascontiguousarray(reference.reals(STATE_OUT, last))).mT
    return ChunkOutputs(out=out.reshape(chunks.v.shape).float(), state=state.float())


def plan_of(model: Any, tokens: torch.Tensor, bits: int) -> Plan:
    """Calibrate whole steps with 8-bit keys and values of some width."""
    options = qinvert.ChunkOptions(value_bits=bits, state_bits=bits)
    return qinvert.calibrate(model, tokens, scope="chunk", target="hexagon-uint16", chunk=options)


def verified(layers: GraphLayers, names: list[str]) -> Iterator[list[str]]:
    """Yield what `qinvert.verify` says of the graphs on the same chunks, in every setting of runtimes."""
    for layer, chunks in layers.seen.items():
        with TemporaryDirectory() as folder:
            file = Path(folder) / "step.onnx"
            qinvert.export(layers.plan, file, layer=layer, heads=chunks.beta.shape[1], **ENDS)
            for name in names:
                try:
                    found = qinvert.verify(file, layers.plan, given(chunks), runtimes=(name,))
                except QInvertError as error:
                    yield [layer, name, str(error).partition(";")[0], "", ""]
                    continue
                for result in found:
                    counts = f"{result.mismatches:,} of {result.values:,}, up to {result.max_steps:g} steps"
                    kinds = ", ".join(f"{count} {kind}" for kind, count in result.products.items())
                    yield [layer, result.runtime, counts, f"{result.sqnr_db:.1f}", kinds]


def main() -> None:
    """Print a table."""
    arguments = parse()
    model = recall.load_model()
    data, tokens = recall.sequences(16), recall.sequences(arguments.sequences, seed=1)
    batch = {"input_ids": tokens}
    float_accuracy = recall.accuracy(run_model(model, batch), tokens)
    head = ["values", "runtime", "float", "simulator", "runtime's accuracy", "layer", "products",
            "o: runtime, simulator, dB", "o: runtime, exact, dB", "o: simulator, exact, dB"]  # fmt: skip
    lines, checks = [head], list[list[str]]()
    for bits in WIDTHS:
        plan = plan_of(model, data, bits)
        with qinvert.patched(model, plan):
            simulated = recall.accuracy(run_model(model, batch), tokens)
        layers = GraphLayers(plan=plan, runtime=arguments.runtime, setting=arguments.setting)
        with patched_by_layer(model, layers):
            found = recall.accuracy(run_model(model, batch), tokens)
        where = f"{arguments.runtime} {arguments.setting}".strip()
        for layer, values in layers.noise.items():
            kinds = ", ".join(f"{count} {kind}" for kind, count in layers.products[layer].items())
            shares = [f"{value:.3f}" for value in (float_accuracy, simulated, found)]
            lines.append([f"{bits} bits", where, *shares, layer, kinds, *(f"{v:.1f}" for v in values)])
        if arguments.verify:
            checks += [[f"{bits} bits", *row] for row in verified(layers, arguments.verify)]
        if layers.elsewhere:
            sys.exit(f"nodes outside the NPU: {layers.elsewhere}")
    print(markdown(lines))
    if checks:
        names = ["values", "layer", "output", "differ from the simulator", "dB", "products"]
        print(markdown([names, *checks]))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    able = [name for name, runtime in RUNTIMES.items() if runtime.carry is not None]
    parser.add_argument("--runtime", default="qnn", choices=able)
    parser.add_argument("--setting", default="", help='such as "Hexagon v81"; the last one by default')
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--verify", nargs="*", choices=able, help="runtimes to verify the graphs in, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
