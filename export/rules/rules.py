"""Rules of export profiles, each registered by its name.

Every rule stands for something that a compiler got wrong or refused.  Rules
read the graph only, so they hold for any ONNX file, whoever wrote it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import onnx

from qinvert.export.rules.float_ends import is_float_end, is_from_keys
from qinvert.export.rules.float_states import OPERATORS as FLOAT_OPERATORS
from qinvert.export.rules.float_states import carried_floats
from qinvert.export.rules.graph_index import CASTS, COLUMNS, GRID_INPUTS, ROWS, Structure, joins
from qinvert.export.rules.product_bounds import accumulator_bound, products
from qinvert.export.rules.step_ends import MAX_RANK, OPERATORS, is_step_end, moves_heads, step_ends
from qinvert.numerics.accumulators import FLOAT32_EXACT
from qinvert.numerics.folded_products import leaves_int32
from qinvert.numerics.folded_sums import folded_loss, loses
from qinvert.numerics.scales import MIN_SCALE, is_power_of_two
from qinvert.profiles import Profile

#: Operators that only move values.
MOVES: Final = ("Concat", "Slice", "Reshape", "Transpose")
#: Operators whose further inputs are indices or bounds.
UNARY: Final = ("Slice", "Reshape", "Transpose", "Clip", "Pad")


@dataclass(frozen=True, slots=True)
class Case:
    """What rules look at."""

    graph: Structure
    profile: Profile
    #: Version of the default operator set.
    opset: int


#: Yields (node, message) for every place that breaks one rule.
Check: TypeAlias = Callable[[Case], Iterator[tuple[str, str]]]

#: Every rule by its name: what to do about a finding, and the check.
RULES: Final[dict[str, tuple[str, Check]]] = {}


def rule(name: str, remedy: str) -> Callable[[Check], Check]:
    """Register the decorated check under a name."""

    def register(check: Check) -> Check:
        RULES[name] = (remedy, check)
        return check

    return register


@rule("opset", "export it with the older operator set")
def _opset(case: Case) -> Iterator[tuple[str, str]]:
    if case.opset > case.profile.opset:
        message = f"needs opset {case.opset}; compilers of {case.profile.name!r} read {case.profile.opset}"
        yield case.graph.name, message


@rule("operators", "choose another profile or method")
def _operators(case: Case) -> Iterator[tuple[str, str]]:
    for node in case.graph.nodes:
        ends = case.profile.prologue if is_from_keys(case.graph, node) else frozenset()
        ends |= OPERATORS if is_step_end(case.graph, node) else frozenset()
        if node.op_type not in case.profile.operators | ends | {"Pad"}:
            yield node_name(node), f"is {node.op_type}, which profile {case.profile.name!r} does not allow"


@rule("pad", "join the block with constant zero blocks by Concat")
def _pad(case: Case) -> Iterator[tuple[str, str]]:
    for node in case.graph.nodes:
        if node.op_type == "Pad":
            yield node_name(node), "places a block by Pad, which compiles to wrong values without a warning"


@rule("names", "name every node after what it computes")
def _names(case: Case) -> Iterator[tuple[str, str]]:
    counts = Counter(node.name for node in case.graph.nodes)
    for node in case.graph.nodes:
        if not node.name:
            yield node_name(node), "has no node name"
        elif counts[node.name] > 1:
            yield node_name(node), f"shares its name with {counts[node.name] - 1} other nodes"


@rule("shapes", "fold batch, heads and chunks into the second axis and fix its size")
def _shapes(case: Case) -> Iterator[tuple[str, str]]:
    for name in case.graph.activations:
        shape = case.graph.shape(name)
        if _is_constant_matrix(case.graph, name):
            continue
        if name in step_ends(case.graph):
            if shape is None or len(shape) > MAX_RANK:
                yield name, f"has the shape {shape or 'unknown'}, not a static one of at most {MAX_RANK} axes"
        elif shape is None or len(shape) != 4 or shape[0] != 1:
            yield name, f"has the shape {shape or 'unknown'}, not a static [1, B, R, C]"


def _is_constant_matrix(graph: Structure, name: str) -> bool:
    # Weights are ``[R, C]`` everywhere; some compilers refuse them with two more axes.
    stored = graph.writers[name].input[0] if graph.operator(name) == "DequantizeLinear" else ""
    return graph.constant(stored) is not None and len(graph.shape(stored) or ()) == 2


@rule("scales", f"store one constant scale of at least {MIN_SCALE:g} for each tensor")
def _scales(case: Case) -> Iterator[tuple[str, str]]:
    for node, name in _scale_inputs(case.graph):
        scale = case.graph.constant(name)
        if scale is None:
            yield node_name(node), f"reads the scale {name!r}, which is not a constant"
        elif scale.size != 1:
            yield node_name(node), f"has {scale.size} scales"
        elif not MIN_SCALE <= scale.reshape(()) < np.inf:
            yield node_name(node), f"has the scale {float(scale.reshape(())):g}"


@rule("power-of-two-scales", "calibrate with scales='pow2'")
def _power_of_two_scales(case: Case) -> Iterator[tuple[str, str]]:
    if not case.profile.power_of_two_scales:
        return
    for node, name in _scale_inputs(case.graph):
        scale = case.graph.constant(name)
        if scale is not None and not all(is_power_of_two(float(value)) for value in scale.reshape(-1)):
            yield node_name(node), f"has the scale {scale.reshape(-1)[0]:.6g}"


def _scale_inputs(graph: Structure) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in graph.nodes:
        for scale_at, _ in GRID_INPUTS.get(node.op_type, ()):
            yield node, node.input[scale_at]


@rule("types", "quantize to a type of the profile, or choose another profile")
def _types(case: Case) -> Iterator[tuple[str, str]]:
    for node in case.graph.nodes:
        for position, legal in _zero_points(node, case.profile):
            zero = case.graph.zero_point(node, position)
            if zero is None:
                yield node_name(node), f"has no constant zero point as input {position}"
            elif legal.get(zero[0]) != zero[1]:
                wanted = " or ".join(f"{name} with {value}" for name, value in legal.items())
                yield node_name(node), f"has the type {zero[0]} with zero point {zero[1]}, not {wanted}"


def _zero_points(node: onnx.NodeProto, profile: Profile) -> list[tuple[int, dict[str, int]]]:
    """Inputs that are zero points, each with its legal (element, value) pairs."""
    if node.op_type == "MatMulInteger":
        left = profile.left_operand or profile.storage
        return [(2, {left.element: left.zero_point}), (3, profile.stored)]
    return [(zero_at, profile.stored) for _, zero_at in GRID_INPUTS.get(node.op_type, ())]


@rule("one-scale", "quantize inputs and output onto one scale first")
def _one_scale(case: Case) -> Iterator[tuple[str, str]]:
    for node in case.graph.nodes:
        if node.op_type not in MOVES or moves_heads(node) or _only_multiplied(case.graph, node.output[0]):
            continue
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        scales = {scale for name in sources for scale in _scales_before(case.graph, name)}
        scales |= set(_scales_after(case.graph, node.output[0]))
        if len(scales) > 1:
            yield (
                node_name(node),
                f"moves values between scales: {', '.join(f'{s:.6g}' for s in sorted(scales))}",
            )


def _only_multiplied(graph: Structure, name: str) -> bool:
    # The planes of a two-plane product share an accumulator as integers, whatever their scales are.
    tensors, readers = [name], list[str]()
    for tensor in tensors:
        for node in graph.readers[tensor]:
            # The list grows while it is read, because casts are followed.
            tensors += node.output if node.op_type in CASTS else []
            readers += [node.op_type] if node.op_type not in CASTS else []
    return set(readers) == {"MatMulInteger"}


def _scales_before(graph: Structure, name: str) -> Iterator[float]:
    while graph.operator(name) in (*MOVES, "BitwiseAnd", "Clip"):
        name = graph.writers[name].input[0]
    node = graph.writers.get(name)
    if node is None or node.op_type not in GRID_INPUTS or _is_scaled_accumulator(graph, node.input[0]):
        return
    # The last grid of a node is that of its result.
    grid = graph.grid(node, -1)
    if grid is not None:
        yield grid.scale


def _scales_after(graph: Structure, name: str) -> Iterator[float]:
    grids = [
        graph.grid(r) for r in graph.readers[name] if r.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    yield from (grid.scale for grid in grids if grid is not None)


def _is_scaled_accumulator(graph: Structure, name: str) -> bool:
    # One factor, then QuantizeLinear with scale 1.0: the graph does not contain the result's scale.
    for operator in ("Mul", "Cast"):
        if graph.operator(name) != operator:
            return False
        name = graph.writers[name].input[0]
    return graph.operator(name) == "MatMulInteger"


@rule("shared-constants", "store the integers once for every scale")
def _shared_constants(case: Case) -> Iterator[tuple[str, str]]:
    scales: dict[str, set[float]] = defaultdict(set)
    for node in case.graph.nodes:
        if node.op_type == "DequantizeLinear" and case.graph.constant(node.input[0]) is not None:
            grid = case.graph.grid(node)
            scales[node.input[0]] |= {grid.scale} if grid is not None else set()
    for name, found in scales.items():
        if len(found) > 1:
            numbers = ", ".join(f"{scale:.6g}" for scale in sorted(found))
            yield name, f"is a constant on the scales {numbers}; onnxruntime-qnn reads it on one of them"


@rule("concat-order", "assemble blocks on axis 2 first, then on axis 3")
def _concat_order(case: Case) -> Iterator[tuple[str, str]]:
    for node in (node for node in case.graph.nodes if joins(node, ROWS)):
        # One row under a finished matrix compiles; a matrix made of rows does not.
        rows = sum(_is_row_of_blocks(case.graph, name) for name in node.input)
        if rows > 1:
            yield node_name(node), f"joins on axis 2 {rows} operands that were joined on axis 3"


def _is_row_of_blocks(graph: Structure, name: str) -> bool:
    node = graph.source(name)
    if node is None or not joins(node, COLUMNS):
        return False
    parts = [graph.source(part) for part in node.input]
    return not any(part is not None and joins(part, ROWS) for part in parts)


@rule("quantized", "put DequantizeLinear before and QuantizeLinear after every operator")
def _quantized(case: Case) -> Iterator[tuple[str, str]]:
    if not case.profile.quantized_everywhere:
        return
    sums = _accumulating(case.graph)
    floats = carried_floats(case.graph) if case.profile.float_state else set()
    for node in case.graph.nodes:
        at_end = is_float_end(case.graph, node) or is_step_end(case.graph, node)
        if node.op_type not in GRID_INPUTS and not at_end:
            legal = floats if node.op_type in FLOAT_OPERATORS else set()
            for name in _float_tensors(case.graph, node, sums):
                if name not in legal:
                    yield node_name(node), f"leaves {name!r} unquantized"


def _float_tensors(graph: Structure, node: onnx.NodeProto, sums: set[str]) -> Iterator[str]:
    # What joins a product before it is rounded is its accumulator and stays float.
    adds = node.op_type in ("Add", "Sub")
    for name in node.input[:1] if node.op_type in UNARY else node.input:
        quantized = graph.operator(name) == "DequantizeLinear" or (adds and name in sums)
        if not quantized and node.op_type != "Clip":
            yield name
    for name in node.output:
        readers = {reader.op_type for reader in graph.readers[name]}
        legal = {"QuantizeLinear", "Clip"} | ({"Add", "Sub"} if name in sums else set())
        if name in graph.outputs or not readers or not readers <= legal:
            yield name


def _accumulating(graph: Structure) -> set[str]:
    """Float tensors that hold a product, or a sum with one."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "MatMul" or (node.op_type in ("Add", "Sub") and found & set(node.input)):
            found.update(node.output)
    return found


@rule("wide-products", "split the right operand into two int8 planes")
def _wide_products(case: Case) -> Iterator[tuple[str, str]]:
    for node, left, right in products(case.graph) if not case.profile.multiplies_wide else ():
        if min(np.iinfo(left.element).bits, np.iinfo(right.element).bits) > 8:
            yield (
                node_name(node),
                f"multiplies {left.element} by {right.element}, which compilers narrow or refuse",
            )


@rule("accumulators", "multiply smaller blocks, or use narrower formats")
def _accumulators(case: Case) -> Iterator[tuple[str, str]]:
    limit = case.profile.accumulator_limit
    for node, left, right in products(case.graph):
        bound = accumulator_bound(case.graph, left, right, FLOAT32_EXACT)
        if bound > limit:
            yield node_name(node), f"sums up to {bound:.0f}, but profile {case.profile.name!r} takes {limit}"


@rule("folded-sums", "multiply one operand by an identity first, or choose closer scales")
def _folded_sums(case: Case) -> Iterator[tuple[str, str]]:
    for node, scales, result in _elementwise(case.graph, "Add"):
        if loses(scales, result):
            yield (
                node_name(node),
                f"adds the scales {scales[0]:.6g} and {scales[1]:.6g} on the scale {result:.6g}: kernels "
                f"that fold zero points are off by up to {folded_loss(scales, result):.2g} steps",
            )


@rule(
    "folded-products", "round onto the product of the scales first, or choose a larger scale for the result"
)
def _folded_products(case: Case) -> Iterator[tuple[str, str]]:
    for node, scales, result in _elementwise(case.graph, "Mul"):
        if leaves_int32(scales, result):
            yield (
                node_name(node),
                f"multiplies the scales {scales[0]:.6g} and {scales[1]:.6g} onto the scale {result:.6g}: "
                "kernels that round before they saturate leave int32",
            )


def _elementwise(
    graph: Structure, operator: str
) -> Iterator[tuple[onnx.NodeProto, tuple[float, float], float]]:
    """Yield nodes between 8-bit grids that compilers fuse, with the scales of operands and result."""
    for node in (node for node in graph.nodes if node.op_type == operator):
        writers = (graph.writers.get(name) for name in node.input)
        first, second = (_narrow_scale(graph, writer, "DequantizeLinear") for writer in writers)
        for reader in graph.readers[node.output[0]]:
            result = _narrow_scale(graph, reader, "QuantizeLinear")
            if first and second and result:
                yield node, (first, second), result


def _narrow_scale(graph: Structure, node: onnx.NodeProto | None, operator: str) -> float:
    """Scale of the 8-bit grid that a node of that operator names, 0 if it does not."""
    grid = graph.grid(node) if node is not None and node.op_type == operator else None
    narrow = grid is not None and np.iinfo(grid.element).bits == 8
    return grid.scale if grid is not None and narrow and MIN_SCALE <= grid.scale < np.inf else 0.0


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node, or what it writes."""
    return node.name or f"{node.op_type} that writes {', '.join(node.output)}"
