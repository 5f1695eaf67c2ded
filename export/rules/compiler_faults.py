"""What of a graph a chip's compiler does not take: every cause is a check, registered by its name.

The checks read the graph only, so that they hold for any ONNX model.  What is
constant, or follows from static shapes, is computed before a graph is compiled
and is no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

import onnx

from qinvert.export.rules.float_ends import is_float_end
from qinvert.export.rules.graph_index import ROWS, Structure, joins
from qinvert.export.rules.remedies import remedy_of
from qinvert.export.rules.rules import RULES, Case, node_name
from qinvert.export.rules.step_ends import is_step_end
from qinvert.hardware import Compiler
from qinvert.profiles import Profile

#: Operators that multiply and add: the work of a chip.
PRODUCTS: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
#: Operators whose result has as many elements as its values say.
OPEN_RESULTS: Final = ("NonZero", "Unique", "Compress", "NonMaxSuppression")
#: Operators between numbers and integer grids, in ONNX and in onnxruntime's own domain.
QUANTIZES: Final = ("QuantizeLinear", "com.microsoft.QuantizeLinear")
DEQUANTIZES: Final = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
FLOATS: Final = ("float32", "float16", "float64", "bfloat16")
#: Starts of the names of operators that return something else every time.
RANDOM: Final = ("Random", "Bernoulli", "Multinomial")


class Effect(StrEnum):
    """What a compiler makes of a fault."""

    #: It refuses the graph, or leaves the nodes to the CPU.
    REFUSED = "refused"
    #: It compiles them to other values than ONNX defines, or is known to do so.
    WRONG = "wrong"
    #: It compiles them, but they compute on floats.
    FLOAT = "float"
    #: It compiles them, but other converters for the same chip refuse them.
    ELSEWHERE = "refused elsewhere"


@dataclass(frozen=True, slots=True)
class Fault:
    """One place, and what it is counted with."""

    #: Node, or tensor where no node is to blame.
    node: str
    #: Operator, or what else is counted.
    kind: str
    #: What to do about it: faults of one cause, effect and remedy are one group.
    remedy: str
    effect: Effect = Effect.REFUSED


@dataclass(frozen=True, slots=True)
class Examined:
    """What checks look at: a graph, or one of its loops and branches."""

    graph: Structure
    compiler: Compiler
    profile: Profile
    opset: int
    ir_version: int
    #: Whether it is the graph of the model, and not a body.
    main: bool = True

    def live(self) -> Iterator[onnx.NodeProto]:
        """Nodes that are left when the graph is compiled."""
        known = self.graph.memo("known", _known)
        yield from (node for node in self.graph.nodes if not set(node.output) <= known)


Check: TypeAlias = Callable[[Examined], Iterator[Fault]]

#: Every cause by its name.
CAUSES: Final[dict[str, Check]] = {}


def cause(name: str) -> Callable[[Check], Check]:
    """Register the decorated check under the name of a cause."""

    def register(check: Check) -> Check:
        CAUSES[name] = check
        return check

    return register


def _known(graph: Structure) -> set[str]:
    """Tensors that are known before the graph runs."""
    found: set[str] = set()
    for node in graph.nodes:
        constant = all(not name or name in found or graph.is_constant(name) for name in node.input)
        static = node.op_type in ("Shape", "Size") and graph.shape(node.input[0]) is not None
        fixed = not node.op_type.startswith(RANDOM) and node.op_type not in DEQUANTIZES
        if static or (constant and fixed and not _bodies(node)):
            found.update(filter(None, node.output))
    return found


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for a in node.attribute for graph in (*a.graphs, *([a.g] if a.HasField("g") else []))]


@cause("operator set")
def _opset(case: Examined) -> Iterator[Fault]:
    limit = case.compiler.opset
    if case.main and case.opset > limit:
        remedy = f"export it with operator set {limit}, or convert it by onnx.version_converter"
        yield Fault(case.graph.name, f"operator set {case.opset}", remedy)


@cause("IR version")
def _ir_version(case: Examined) -> Iterator[Fault]:
    limit = case.compiler.ir_version
    if case.main and case.ir_version > limit:
        remedy = f"set ir_version to {limit} if the graph needs nothing newer"
        yield Fault(case.graph.name, f"IR version {case.ir_version}", remedy)


@cause("dynamic shape")
def _dynamic(case: Examined) -> Iterator[Fault]:
    for name in open_inputs(case):
        remedy = (
            "fix batch and length: qinvert export-model --length N, or "
            "onnxruntime.tools.make_dynamic_shape_fixed"
        )
        yield Fault(name, "input", remedy)


def open_inputs(case: Examined) -> list[str]:
    """Inputs of the main graph with a size that is not fixed."""
    graph = case.graph
    names = [name for name in graph.inputs if not graph.is_constant(name)] if case.main else []
    return [name for name in sorted(names) if graph.shape(name) is None and graph.element(name) is not None]


@cause("data-dependent shape")
def _data_dependent(case: Examined) -> Iterator[Fault]:
    fixed = not open_inputs(case)
    for node in case.live():
        taken = node.op_type in case.compiler.operators
        unknown = any(case.graph.shape(name) is None for name in filter(None, node.output))
        follows = (
            taken and unknown and all(case.graph.shape(name) is not None for name in filter(None, node.input))
        )
        if node.op_type in OPEN_RESULTS or (case.main and fixed and follows):
            remedy = remedy_of("NonZero", case.compiler)
            yield Fault(node_name(node), node.op_type, remedy)


def _has_shapes(graph: Structure, names: Iterable[str]) -> bool:
    return all(graph.shape(name) is not None for name in names if name)


@cause("operator missing")
def _operators(case: Examined) -> Iterator[Fault]:
    for node in case.live():
        if node.op_type not in case.compiler.operators | set(OPEN_RESULTS):
            yield Fault(node_name(node), node.op_type, remedy_of(node.op_type, case.compiler))


@cause("rank above 4")
def _ranks(case: Examined) -> Iterator[Fault]:
    compiler = case.compiler
    for node in case.live():
        names = filter(None, (*node.input[:1], *node.output))
        axes = max((case.graph.rank(name) or 0 for name in names), default=0)
        if axes > compiler.max_rank and node.op_type in compiler.operators:
            refused = axes > compiler.most_axes or node.op_type in compiler.refused_beyond
            effect = Effect.REFUSED if refused else Effect.ELSEWHERE
            remedy = f"fold batch, heads or chunks into one axis, so that {compiler.max_rank} are left"
            yield Fault(node_name(node), f"{node.op_type} of {axes} axes", remedy, effect)


@cause("element type")
def _elements(case: Examined) -> Iterator[Fault]:
    for node in case.live():
        found = {case.graph.element(name) for name in filter(None, node.output)}
        for element in sorted(e for e in found if e and e not in case.compiler.elements):
            yield Fault(node_name(node), element, "export the model in float32")


@cause("float32 product")
def _float_products(case: Examined) -> Iterator[Fault]:
    for node in case.live():
        if node.op_type not in PRODUCTS or not case.compiler.floats:
            continue
        operands = node.input[:2]
        kinds = {case.graph.element(name) for name in operands}
        if kinds & {"int32", "int64"}:
            remedy = remedy_of("MatMulInteger", case.compiler)
            yield Fault(node_name(node), node.op_type, remedy)
        elif not all(case.graph.operator(name) in DEQUANTIZES for name in operands):
            remedy = (
                "quantize its operands and its result, or use a plan of the whole chunk step; until then it "
                f"runs in {case.compiler.floats}"
            )
            yield Fault(node_name(node), node.op_type, remedy, Effect.FLOAT)


@cause("float operator")
def _float_operators(case: Examined) -> Iterator[Fault]:
    if case.compiler.floats:
        return
    for node in case.live():
        ends = is_float_end(case.graph, node) or is_step_end(case.graph, node)
        quantizes = node.op_type in (*QUANTIZES, *DEQUANTIZES)
        if node.op_type not in case.compiler.operators or quantizes or ends or _on_grids(case.graph, node):
            continue
        if any(case.graph.element(name) in FLOATS for name in node.output):
            remedy = "quantize what it reads and what it writes, or leave it to the host"
            yield Fault(node_name(node), node.op_type, remedy)


def _on_grids(graph: Structure, node: onnx.NodeProto) -> bool:
    """Whether a node takes what was dequantized; the sum of products may still be in their precision."""
    given = [n for n in node.input if n and graph.element(n) in FLOATS and not _is_bound(graph, n)]
    inside = ("MatMul", "Add", "Sub", "Clip")
    return bool(given) and all(graph.operator(n) in (*DEQUANTIZES, *inside) for n in given)


def _is_bound(graph: Structure, name: str) -> bool:
    return graph.is_constant(name) and graph.shape(name) == []


@cause("wrong values")
def _wrong(case: Examined) -> Iterator[Fault]:
    for node in case.live():
        if node.op_type in case.compiler.wrong and case.graph.operator(node.input[0]) in DEQUANTIZES:
            remedy = case.compiler.wrong[node.op_type]
            yield Fault(node_name(node), node.op_type, remedy, Effect.WRONG)


@cause("broken rule")
def _rules(case: Examined) -> Iterator[Fault]:
    rules = Case(case.graph, case.profile, case.opset)
    for name in sorted(case.compiler.rules):
        remedy, check = RULES[name]
        for node, _ in check(rules):
            if name != "concat-order" or _is_quantized_block(case.graph, node):
                yield Fault(node, name, remedy, Effect.WRONG)


def _is_quantized_block(graph: Structure, name: str) -> bool:
    # The rule counts four axes, and stands for a fault of integer kernels.
    found = (node for node in graph.nodes if node_name(node) == name and joins(node, ROWS))
    return any(
        graph.rank(node.output[0]) == 4 and any(r.op_type in QUANTIZES for r in graph.readers[node.output[0]])
        for node in found
    )


def bodies(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield every loop's and branch's graph of a model, those inside others included."""
    waiting = [model.graph]
    for graph in waiting:
        # The list grows while it is read.
        waiting += [body for node in graph.node for body in _bodies(node)]
    yield from waiting[1:]
