"""Deployed graphs on a chip's compiler: cycles against other inverses, and what sparse attention chooses by.

    python benchmarks/deployment_cycles.py cycles recall
    python benchmarks/deployment_cycles.py cycles random --layers 2 --hidden 1024
    python benchmarks/deployment_cycles.py choice hexagon-v81

``cycles`` compiles both graphs for Hexagon: as planned, with forward substitution, and in float16; it needs
onnxruntime-qnn.  ``choice`` has a chip's compiler take what sparse attention chooses by.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from deployments import random_model
from onnx.reference import ReferenceEvaluator
from onnx_ir.serde import serialize_model
from step_graphs import masked_columns

import qinvert
from qinvert.documents import markdown
from qinvert.export.deployment.attention import added
from qinvert.export.deployment.blocks import BlockSizes, block_keys, visible_entries
from qinvert.export.deployment.cache import WindowCache
from qinvert.export.deployment.compile_deployment import compile_deployment
from qinvert.export.deployment.graphs import check_operators, tidy
from qinvert.export.deployment.manifest import DECODE, PREFILL
from qinvert.export.deployment.states import Traffic
from qinvert.export.exporting import serialize
from qinvert.export.rules.graph_index import Structure
from qinvert.export.runtimes import estimates
from qinvert.export.whole_models.tracing import trace
from qinvert.recall import load_model, sequences

CHIPS = ("hexagon-v81", "hexagon-v73")
#: Inverses of `cycles`: the planned one, and two forms of forward substitution.
INVERSES: dict[str, Callable[[], Any]] = {
    "as planned": lambda: "auto",
    "forward substitution, masked columns": lambda: masked_columns(64),
    "forward substitution, rows of T": lambda: "forward_substitution",
}


def cycles(arguments: argparse.Namespace) -> None:
    """Print what Qualcomm's compiler simulates for both graphs, one row for each kind, chip and graph."""
    if arguments.model == "random":
        model, tokens = random_model(arguments.layers, arguments.hidden)
    else:
        model, tokens = load_model(), sequences(8)
    columns = ["kind", "chip", "graph", "cycles of a call", "without a cost", "tokens per second, simulated"]
    rows: list[list[str]] = []
    weights: dict[str, Any] = {} if arguments.weights == "none" else {"weights": arguments.weights}
    with TemporaryDirectory(dir=arguments.folder) as folder:
        for kind, method in INVERSES.items():
            out = Path(folder) / "out"
            options = {"scope": "chunk", "hardware": CHIPS[0], "method": method()}
            plan = qinvert.calibrate(model, tokens, **options)
            data = {"data": tokens} if weights else {}
            qinvert.deploy(model, plan, out, **weights, **data)
            rows += compiled_rows(kind, out)
            if method() == "auto":
                for file in (PREFILL, DECODE):
                    onnx.save(without_grids(onnx.load(out / file)), out / file)
                rows += compiled_rows("float16", out)
    print(markdown([columns, *rows]))


def compiled_rows(kind: str, folder: Path) -> Iterator[list[str]]:
    """Yield a row for each chip and graph, and print it as a sign of life."""
    for chip in CHIPS:
        for graph in compile_deployment(folder, chip):
            found, speed = graph.estimate, graph.tokens_per_second
            told = (
                ["-", "-", graph.refused[-80:]]
                if found is None
                else [f"{found.cycles:,}", str(found.uncosted), f"{speed:,.0f}"]
            )
            print(kind, chip, graph.file, *told, file=sys.stderr, flush=True)
            yield [kind, chip, graph.file, *told]


def without_grids(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without QuantizeLinear and DequantizeLinear, which Hexagon computes in float16."""
    graph = Structure(model)
    names: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and graph.constant(node.input[0]) is not None:
            model.graph.initializer.append(dequantized(graph, node))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            names[node.output[0]] = names.get(node.input[0], node.input[0])
        else:
            node.input[:] = [names.get(name, name) for name in node.input]
            kept.append(node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)
    for output in model.graph.output:
        if output.name in names:
            model.graph.node.append(onnx.helper.make_node("Identity", [names[output.name]], [output.name]))
    read = {name for node in model.graph.node for name in node.input}
    constants = [constant for constant in model.graph.initializer if constant.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    return onnx.shape_inference.infer_shapes(model)


def dequantized(graph: Structure, node: onnx.NodeProto) -> onnx.TensorProto:
    """The numbers that a constant of integers stands for, with the name of what they are dequantized to."""
    values = onnx.helper.make_model(
        onnx.helper.make_graph([node], "constant", [], [onnx.ValueInfoProto(name=node.output[0])])
    )
    given = {name: constant for name in node.input if (constant := graph.constant(name)) is not None}
    (numbers,) = ReferenceEvaluator(values).run(None, given)
    return onnx.numpy_helper.from_array(np.asarray(numbers, np.float32), node.output[0])


class Choice(torch.nn.Module):
    """What one layer of sparse attention adds to a window: keys of blocks, scores, and a mask."""

    def __init__(self, tokens: int, cache: int, heads: int, sizes: BlockSizes) -> None:
        super().__init__()
        self.tokens, self.cache, self.heads, self.sizes = tokens, cache, heads, sizes

    def inputs(self, width: int) -> dict[str, torch.Tensor]:
        """Zeros for all that it takes."""
        return {
            "query": torch.zeros(1, self.tokens * self.heads, width),
            "key": torch.zeros(1, self.tokens, width),
            "position": torch.zeros(1, dtype=torch.int32),
            "blocks": torch.zeros(1, self.sizes.blocks, width),
            "tail": torch.zeros(1, self.sizes.tokens, width),
            "entries": torch.zeros(self.cache, dtype=torch.int32),
        }

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        position: torch.Tensor,
        blocks: torch.Tensor,
        tail: torch.Tensor,
        entries: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return what is added to scores, and the states."""
        names = ("blocks_0", "tail_0", f"entries_{self.sizes.tokens}")
        traffic = Traffic(cache=self.cache, given=dict(zip(names, (blocks, tail, entries), strict=True)))
        positions = (torch.arange(self.tokens, dtype=torch.int32) + position)[None]
        cache = WindowCache(traffic, None, position, positions)
        keys = block_keys(cache, 0, key, self.sizes, lambda inputs: inputs.mean(2))
        products = torch.relu(query @ keys.transpose(1, 2)).reshape(1, self.tokens, self.heads, -1)
        seen = visible_entries(cache, products.sum(2), self.sizes)
        return added(seen.to(torch.float32)), *(traffic.returned[name] for name in names)


def choice(arguments: argparse.Namespace) -> None:
    """Print what a chip's compiler says of the choice of a prefill and of a decoded token."""
    sizes = BlockSizes(tokens=16, chosen=64, positions=4096 + 64)
    graphs = []
    for tokens in (64, 1):
        module = Choice(tokens, 4096, 4, sizes).eval()
        model = trace(module, module.inputs(128), 21)
        tidy(model)
        check_operators(model)
        graphs.append(serialize(serialize_model(model)))
    for tokens, answer in zip((64, 1), estimates(graphs, arguments.hardware), strict=True):
        print(f"{tokens} tokens: {answer}")


def main() -> None:
    """Run what the command line asks for."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("cycles")
    verb.add_argument("model", choices=["recall", "random"])
    verb.add_argument("--layers", type=int, default=2)
    verb.add_argument("--hidden", type=int, default=1024)
    verb.add_argument("--weights", default="none")
    verb.add_argument("--folder")
    verb.set_defaults(run=cycles)
    verb = verbs.add_parser("choice")
    verb.add_argument("hardware")
    verb.set_defaults(run=choice)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
