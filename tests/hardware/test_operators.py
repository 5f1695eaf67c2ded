"""The operators that are counted are those of the graph that is exported."""

from collections import Counter
from functools import cache

import pytest

import qinvert
from qinvert.export.exporting import build
from qinvert.hardware._operators import FEATURES, Kind, features, operators
from qinvert.program.residual_sums import residuals_as_sums
from qinvert.stress import from_keys, stress_keys

CHUNK, BATCH = 16, 8
KINDS = {
    "MatMul": Kind.PRODUCT,
    "Add": Kind.ELEMENTWISE,
    "Sub": Kind.ELEMENTWISE,
    "Mul": Kind.ELEMENTWISE,
    "Slice": Kind.MOVE,
    "Concat": Kind.MOVE,
}
PROGRAMS = {
    "sums": residuals_as_sums(qinvert.elimination(CHUNK)),
    "dense": qinvert.elimination(CHUNK),
    "restarted": qinvert.elimination(CHUNK, restart=2),
    "packed": qinvert.block_merge(CHUNK, 4),
    "packed sums": residuals_as_sums(qinvert.block_merge(CHUNK, 4)),
    "corrected": qinvert.block_merge(CHUNK, 2, tile=8, corrections=1),
    "masked": qinvert.block_merge(CHUNK, 1, layout="masked"),
    # A sum of two grids that lie far apart.
    "far sums": qinvert.neumann_doubling(CHUNK),
    # Residual terms that no product can carry.
    "divided": qinvert.newton_schulz(CHUNK),
    "factored": qinvert.block_merge(CHUNK, factored=True),
}
TARGETS = {"npu-qdq-int8": 8, "hexagon-uint8": 8, "npu-qdq-int16": 16, "hexagon-int16": 16}


@cache
def planned(target, name):
    k, beta, g = stress_keys(32, CHUNK, 24).values()
    program = PROGRAMS[name]
    return qinvert.calibrate(
        (from_keys(k, beta, g), beta),
        method=program,
        target=target,
        bits=TARGETS[target],
        min_sqnr_db=0,
        factored=program.inverse_ports.factored,
    )


def graph(plan, chains=1, batch=BATCH):
    """A graph between ends that are integers, as far as its program takes them."""
    whole = not plan.layer().program.inverse_ports.factored
    return build(
        plan,
        batch=batch,
        input="M",
        output="integers",
        input_type="integers" if whole else "float32",
        chains=chains,
    ).graph


def elements(value):
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def counted(model):
    """One operator for each node on floats, and one where integers only change their grid."""
    writers = {node.output[0]: node for node in model.node}
    found = Counter()
    for node in model.node:
        found[KINDS.get(node.op_type)] += node.op_type in KINDS
        if node.op_type == "QuantizeLinear" and node.input[0] in writers:
            found[Kind.ELEMENTWISE] += writers[node.input[0]].op_type == "DequantizeLinear"
    # Other integers at the ends than inside are a conversion at each end, which is in no program's cost.
    stored = {value.name: value.type.tensor_type.elem_type for value in model.value_info}
    ends = [*model.input, *model.output]
    inside = {
        stored[n.output[0]] for n in model.node if n.op_type == "QuantizeLinear" and n.output[0] in stored
    }
    found[Kind.ELEMENTWISE] -= sum(end.type.tensor_type.elem_type not in (*inside, 1) for end in ends)
    return {kind: found[kind] for kind in Kind}


@pytest.mark.parametrize("chains", [1, 4])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_operators_of_a_plan_are_those_of_its_graph(target, name, chains):
    plan = planned(target, name)
    found = Counter(operator.kind for operator in operators(plan.layer(), BATCH, chains))
    assert {kind: found[kind] for kind in Kind} == counted(graph(plan, chains))


@pytest.mark.parametrize("name", ["dense", "packed", "far sums", "corrected"])
def test_products_multiply_and_write_what_their_shapes_say(name):
    plan = planned("npu-qdq-int8", name)
    model = graph(plan)
    shapes = {value.name: elements(value) for value in (*model.value_info, *model.input, *model.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.initializer}
    products = [node for node in model.node if node.op_type == "MatMul"]
    found = [each for each in operators(plan.layer(), BATCH) if each.kind is Kind.PRODUCT]
    expected = []
    for node in products:
        (_, stack, rows, inner), columns = shapes[node.input[0]], shapes[node.input[1]][3]
        # Constants stand once for all matrices.
        stack = max(stack, shapes[node.output[0]][1])
        expected.append((stack, stack * rows * columns, stack * rows * inner * columns))
    assert sorted((each.matrices, each.written, each.macs) for each in found) == sorted(expected)


def test_16_bits_are_two_products_of_two_bytes_or_one_of_four():
    eight, split, whole = (
        features(operators(planned(target, "masked").layer(), BATCH))
        for target in ("npu-qdq-int8", "npu-qdq-int16", "hexagon-int16")
    )
    assert split["product"] == 2 * whole["product"] == 2 * eight["product"]
    assert whole["product/KiB"] == 2 * eight["product/KiB"]
    assert split["elementwise"] > whole["elementwise"]


def test_features_have_the_names_that_tables_weigh_and_grow_with_the_batch():
    plan = planned("npu-qdq-int8", "packed").layer()
    one, two = (features(operators(plan, batch)) for batch in (BATCH, 2 * BATCH))
    assert set(one) == set(FEATURES)
    for name in FEATURES:
        assert two[name] == (one[name] if name in list(Kind) else 2 * one[name]), name


def test_chains_repeat_what_one_part_takes_between_moves():
    plan = planned("npu-qdq-int8", "sums").layer()
    part, whole = operators(plan, BATCH // 4), operators(plan, BATCH, 4)
    assert [operator.kind for operator in whole] == [
        *[Kind.MOVE] * 4,
        *[operator.kind for operator in part] * 4,
        Kind.MOVE,
    ]
    assert whole[-1].written == BATCH * CHUNK * CHUNK == sum(cut.written for cut in whole[:4])
