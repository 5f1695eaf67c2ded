"""Who is allowed which differences, as a table of numbers, and a case on each side of every boundary."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from step_plans import is_log, small_plan

import qinvert
from qinvert.errors import ExportError, VerificationError
from qinvert.export.runtimes import Execution, Runtime
from qinvert.export.verification.comparison import compare, judge
from qinvert.export.verification.references import Reference
from qinvert.export.verification.tolerance import Tolerance, is_exact, tolerance_for
from qinvert.formats import INT8, INT16
from qinvert.numerics.exponentials import near_ties, safe_scale
from qinvert.numerics.law import Rounding
from qinvert.numerics.scales import float32
from qinvert.profiles import find_profile
from qinvert.program.steps import Exponential
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

CHUNK = 4
#: Profile, scales and bits.
PLANS = {
    "integer": ("int-ops", "float", 8),
    "qlinear": ("qlinear", "float", 8),
    "qdq pow2": ("npu-qdq-int8", "pow2", 8),
    "qdq float": ("npu-qdq-int8", "float", 8),
    "uint8 float": ("npu-qdq-uint8", "float", 8),
    "int4 pow2": ("npu-qdq-int4", "pow2", 4),
    "int4 float": ("npu-qdq-int4", "float", 4),
    "int16 pow2": ("npu-qdq-int16", "pow2", 16),
    "int16 float": ("npu-qdq-int16", "float", 16),
}
EXACT = ("integer", "qlinear", "qdq pow2", "int4 pow2")
OPEN = ("qdq float", "uint8 float", "int4 float", "int16 pow2", "int16 float")
WIDE = ("int16 pow2", "int16 float")

#: What ONNX says, by plan: counted from, and where floats are reordered, share, steps, share beyond, times.
#: What may differ in a float product is said by `reach` (see test_reach.py), so that it has no steps.
ONNX = {
    **dict.fromkeys(EXACT, (0.0, 0.00390625, 0.0, 1, 0.0, 1)),
    **dict.fromkeys(OPEN, (0.00390625, 0.00390625, 0.0625, 0, 0.0, 1)),
}
#: The same for a graph that builds L from keys: nothing is promised any more.
KEYS = {**ONNX, **dict.fromkeys(EXACT, ONNX["qdq float"])}
#: A processor whose own rounding is 2 steps, whatever is promised.
OWN = {
    **dict.fromkeys(PLANS, (0.5, 0.5, 1.0, 2, 0.001, 4)),
    **dict.fromkeys(WIDE, (0.5, 0.5, 1.0, 64, 0.001, 4)),
}
#: Where the simulator followed the processor: T is a float16 if it has its own rounding.
KNOWN = dict.fromkeys(PLANS, (0.0, 0.00390625, 0.0, 0, 0.0, 1))
KNOWN_OWN = dict.fromkeys(PLANS, (0.5, 0.5, 0.0, 0, 0.0, 1))

#: By rounding, own steps, and whether L is built from keys.
TABLES = {
    ("onnx", 0, False): ONNX,
    ("onnx", 0, True): KEYS,
    ("onnx", 2, False): OWN,
    ("onnx", 2, True): OWN,
    ("hexagon", 0, False): KNOWN,
    ("hexagon", 0, True): KNOWN,
    ("hexagon", 2, False): KNOWN_OWN,
    ("hexagon", 2, True): KNOWN_OWN,
}


def runtime(own_steps=0, reorders=False):
    return Runtime(
        name="toy",
        execute=lambda *_: iter(()),
        summary="",
        module="",
        requirement="",
        own_steps=own_steps,
        reorders=reorders,
    )


@pytest.fixture(scope="module")
def plans():
    lower = stress_matrices("independent_keys", 4, CHUNK)
    method = qinvert.block_merge(CHUNK, base=2)
    return {
        name: qinvert.calibrate(lower, method=method, bits=bits, target=profile, scales=scales).layer()
        for name, (profile, scales, bits) in PLANS.items()
    }


@pytest.mark.parametrize("reorders", [False, True])
@pytest.mark.parametrize(
    ("plan", "rounding", "own_steps", "from_keys"),
    [(plan, *case) for plan, case in itertools.product(PLANS, TABLES)],
)
def test_who_is_allowed_what(plans, plan, rounding, own_steps, from_keys, reorders):
    every, reordered, share, steps, share_beyond, times_beyond = TABLES[rounding, own_steps, from_keys][plan]
    found = tolerance_for(
        runtime(own_steps, reorders),
        find_profile(PLANS[plan][0]),
        plans[plan],
        Rounding(rounding),
        from_keys=from_keys,
    )
    assert found == Tolerance(
        counted_from=reordered if reorders else every,
        share=share,
        steps=steps,
        share_beyond=share_beyond,
        times_beyond=times_beyond,
        by_reach=share == 0.0625,
    )
    assert found.exact is (share == 0)


#: Rounding, own steps, reorders, plan.
KINDS = {
    "equality": ("onnx", 0, False, "qdq pow2"),
    "equality reordered": ("onnx", 0, True, "qdq pow2"),
    "float products": ("onnx", 0, False, "qdq float"),
    "wide products": ("onnx", 0, False, "int16 pow2"),
    "own rounding": ("onnx", 2, False, "qdq float"),
    "own rounding, wide": ("onnx", 2, False, "int16 float"),
    "known rounding": ("hexagon", 2, False, "qdq float"),
    "known rounding of float32": ("hexagon", 0, False, "qdq float"),
}
#: Kind, matrices of 16 values, steps by which values differ: ``{how many: steps}``, and then what is
#: counted, what lies beyond, and whether that is allowed.
VERDICTS = [
    ("equality", 1, {}, 0, 0, True),
    ("equality", 1, {1: 2**-20}, 1, 0, False),
    ("equality", 10_000, {1: 1.0}, 1, 0, False),
    ("equality reordered", 1, {16: 0.0039}, 0, 0, True),
    ("equality reordered", 1, {1: 0.00390625}, 1, 0, False),
    # On zeros no sum comes near a boundary.
    ("float products", 1, {15: 0.0039}, 0, 0, True),
    ("float products", 10_000, {1: 1.0}, 1, 1, False),
    ("wide products", 1, {15: 0.0039}, 0, 0, True),
    ("wide products", 10_000, {1: 1.0}, 1, 1, False),
    ("own rounding", 1, {16: 2.49}, 16, 0, True),
    # None of 16 values is one in 1,000; 16 of 16,000 are.
    ("own rounding", 1, {1: 2.5}, 1, 1, False),
    ("own rounding", 1000, {16: 8.49}, 16, 16, True),
    ("own rounding", 1000, {17: 8.49}, 17, 17, False),
    ("own rounding", 1000, {1: 8.5}, 1, 1, False),
    ("own rounding", 1, {16: 0.49}, 0, 0, True),
    ("own rounding, wide", 1, {16: 64.49}, 16, 0, True),
    ("own rounding, wide", 1, {1: 64.5}, 1, 1, False),
    ("own rounding, wide", 1000, {16: 256.25}, 16, 16, True),
    ("own rounding, wide", 1000, {1: 256.5}, 1, 1, False),
    ("known rounding", 1, {16: 0.49}, 0, 0, True),
    ("known rounding", 10_000, {1: 0.5}, 1, 1, False),
    ("known rounding of float32", 1, {}, 0, 0, True),
    ("known rounding of float32", 10_000, {1: 2**-20}, 1, 0, False),
    *((kind, 10_000, {1: float("nan")}, 1, 1, False) for kind in KINDS),
]


def compared(plans, kind, actual):
    """Compare with zeros on a grid of step 1, and return what judging says."""
    rounding, own_steps, reorders, plan = KINDS[kind]
    profile = find_profile(PLANS[plan][0])
    tolerance = tolerance_for(runtime(own_steps, reorders), profile, plans[plan], Rounding(rounding))
    wanted = Reference(
        plan=plans[plan],
        storage=None,
        unit=np.ones((len(actual), 1, 1), np.float32),
        expected=np.zeros_like(actual),
        truth=torch.ones(actual.shape, dtype=torch.float64),
        systems=Systems(lower=torch.zeros(actual.shape)),
        rounding=Rounding(rounding),
    )
    result = compare("toy", Execution(setting="one", outputs=[actual]), actual, wanted, tolerance)
    try:
        judge(result, actual, wanted, tolerance, "look there")
    except VerificationError as error:
        return result, str(error)
    return result, None


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("kind", "matrices", "differing", "counted", "beyond", "allowed"), VERDICTS)
def test_both_sides_of_every_boundary(plans, kind, matrices, differing, counted, beyond, allowed, sign):
    actual = np.zeros((matrices, CHUNK, CHUNK), np.float32)
    for count, steps in differing.items():
        actual.flat[-count:] = sign * steps
    result, refusal = compared(plans, kind, actual)
    assert (result.values, result.mismatches, result.beyond) == (actual.size, counted, beyond)
    assert (refusal is None) is allowed


def test_every_kind_passes_once_and_fails_once():
    assert {(kind, allowed) for kind, *_, allowed in VERDICTS} == set(itertools.product(KINDS, (True, False)))


@pytest.mark.parametrize(
    ("kind", "near", "far", "first"),
    [
        ("equality", 2**-20, 1.0, [0, 1, 2]),
        ("equality reordered", 0.001, 1.0, [5, 3, 0]),
        ("float products", 1.0, 2.0, [0, 1, 2]),
        ("wide products", 1.0, 2.0, [0, 1, 2]),
        # A processor's own rounding is not to blame.
        ("own rounding", 2.0, 9.0, [5, 3, 0]),
        ("own rounding, wide", 64.0, 300.0, [5, 3, 0]),
        ("known rounding", 0.25, 1.0, [5, 3, 0]),
        ("known rounding of float32", 2**-20, 1.0, [0, 1, 2]),
    ],
)
def test_a_refusal_names_the_first_element_that_is_to_blame(plans, kind, near, far, first):
    actual = np.zeros((8, CHUNK, CHUNK), np.float32)
    actual[0, 1, 2], actual[5, 3, 0] = near, far
    result, refusal = compared(plans, kind, actual)
    assert refusal == (
        f"toy (one) differs from the simulator in {result.mismatches} of 128 values, by up to {far:.3g} "
        f"steps; first at {first}: {actual[tuple(first)]} instead of 0.0; look there"
    )


LEGAL = {"counted_from": 0.5, "share": 1.0, "steps": 2, "share_beyond": 0.001, "times_beyond": 4}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counted_from", -0.1),
        ("counted_from", 0.51),
        ("counted_from", float("nan")),
        ("share", 1.1),
        ("share", float("nan")),
        ("share", True),
        ("share", "1"),
        # Values beyond are among those that may differ.
        ("share", 0.0001),
        ("steps", -1),
        ("steps", 1.5),
        ("steps", 2**16),
        ("share_beyond", -0.1),
        ("share_beyond", 2.0),
        # Alone they would mean nothing.
        ("share_beyond", 0.0),
        ("times_beyond", 1),
        ("times_beyond", 0),
        ("times_beyond", 1.5),
    ],
)
def test_numbers_that_mean_nothing_are_refused(name, value):
    Tolerance(**LEGAL)
    with pytest.raises(ExportError, match=r"is not a number in \[0, |is not in \[|do not fit"):
        Tolerance(**LEGAL | {name: value})


def test_a_tolerance_cannot_be_widened_afterwards():
    tolerance = Tolerance.of_equality(0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tolerance.share = 1.0


def test_steps_of_its_own_that_no_processor_has_are_refused(plans):
    with pytest.raises(ExportError, match=r"steps -1 is not in \[0, 65535\]"):
        tolerance_for(runtime(own_steps=-1), find_profile("int-ops"), plans["integer"], Rounding.ONNX)


@pytest.mark.parametrize("target", ["int-ops", "qlinear", "int-ops-x86"])
def test_no_profile_promises_an_exponential_whose_rounding_the_library_decides(target):
    layer = small_plan(target, logs=INT16).layer()
    result = next(layer.tensors[s.output] for s in layer.program.steps if isinstance(s, Exponential))
    # Between two integers of the result, at the source's first one: a tie.
    tie = float32(-math.log(result.scale * 63.5))
    assert near_ties(tie, INT16, result.scale, INT8)
    safe = safe_scale(tie, INT16, result.scale, INT8)

    def with_logs(scale):
        logs = {
            name: dataclasses.replace(q, scale=scale) for name, q in layer.tensors.items() if is_log(name)
        }
        return dataclasses.replace(layer, tensors={**layer.tensors, **logs})

    assert is_exact(find_profile(target), with_logs(safe))
    assert not is_exact(find_profile(target), with_logs(tie))
