"""Builds ``M = -L`` from keys, inside the graph and in float32."""

from __future__ import annotations

from typing import Final

import numpy as np

from qinvert.export.graph import GraphBuilder
from qinvert.export.interface import KEYS, LOG_DECAY, Interface
from qinvert.plan.quantized_program import QuantizedProgram
from qinvert.program.ports import BETA

#: Name of M where the graph builds it.
FROM_KEYS: Final = "M/from_keys"


def matrix_from_keys(graph: GraphBuilder, plan: QuantizedProgram, interface: Interface) -> str:
    """Append ``M[i, j] = -beta_i <k_i, k_j> exp(sum_{j < m <= i} g_m)``, ``j < i``, and return its name.

    This is the formula of `qinvert.stress.from_keys`, whose ``G_i - G_j`` with
    ``G = cumsum(g)`` is this sum.  Here it is one product with constant 0/1
    matrices, ``(lower diag(g)) strictly_lower``.  CumSum is wrong in some
    compilers.  Terms of one sign cannot cancel as a difference of long sums does.
    On and above the diagonal the sum is empty, so that no exponential overflows
    before the mask.  The constant is the right operand, as weights are.
    """
    square, (keys, column) = interface.square(plan), list(interface.inputs(plan).values())[:2]
    size = plan.chunk
    turned = graph.node("Transpose", [KEYS], "k/transposed", [*keys[:2], keys[3], keys[2]], perm=[0, 1, 3, 2])
    products = graph.node("MatMul", [KEYS, turned], "keys/products", square)
    ones = np.tril(np.ones((size, size), dtype=np.float32))
    below = np.tril(ones, -1)
    row = graph.node("Transpose", [LOG_DECAY], "g/transposed", [*column[:2], 1, size], perm=[0, 1, 3, 2])
    lower = graph.initializer("ones/lower", ones[None, None])
    terms = graph.node("Mul", [row, lower], "decay/terms", square)
    sums = graph.node(
        "MatMul", [terms, graph.initializer("ones/strictly_lower", below)], "decay/sums", square
    )
    decay = graph.node("Exp", [sums], "decay", square)
    decayed = graph.node("Mul", [products, decay], "keys/decayed", square)
    mask = graph.initializer("minus_ones/strictly_lower", np.where(below, -below, below)[None, None])
    strict = graph.node("Mul", [decayed, mask], "keys/strictly_lower", square)
    return graph.node("Mul", [strict, BETA], FROM_KEYS, square)
