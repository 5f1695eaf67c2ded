"""The tables of docs/plan-schema.md against the files that are written, and a file of an older release."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace
from functools import cache
from importlib import import_module

import numpy as np
import pytest
import torch
from inverse_programs import inverse_program
from pages import ROOT, code, page, quoted, rows, sections
from test_ports import planned, step_like

import qinvert
from qinvert import recall
from qinvert.formats import FORMATS
from qinvert.plan.plan import Plan
from qinvert.plan.quantization import Requantize
from qinvert.plan.serialization import SCHEMA_VERSION
from qinvert.plan.value_channels import ValueChannels
from qinvert.program.ports import Meaning
from qinvert.program.program import Program
from qinvert.program.serialization import OPERATIONS, oldest_schema
from qinvert.program.steps import (
    Add,
    Axis,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Slice,
    Subtract,
    Transpose,
)
from qinvert.stress import stress_matrices

PAGE = page("plan-schema.md")
SECTIONS = sections(PAGE)
GOLDEN = ROOT / "tests" / "golden"
#: Python types of the types that the page names.
TYPES = {
    "integer": {int},
    "number": {int, float},
    "text": {str},
    "boolean": {bool},
    "list": {list},
    "object": {dict},
    "null": {type(None)},
}


def table(heading):
    return {quoted(row["key"])[0]: row for row in rows(SECTIONS[heading])}


@cache
def written():
    """Documents that between them use every key: old and new, calibrated and built by hand."""
    golden = Plan.load(GOLDEN / "plan-v1.json")
    lower, beta = inputs()
    keys = stress_matrices("correlated_keys", 16, 32)
    plans = [
        golden,
        qinvert.calibrate((lower, beta), factored=True),
        qinvert.calibrate(lower, method="neumann", min_sqnr_db=90.0, granularity="head"),
        qinvert.calibrate({"a": torch.stack([keys, keys / 20])}, method="newton_schulz", granularity="auto"),
        qinvert.calibrate(lower, method=qinvert.elimination(lower.shape[-1], radix=4), min_sqnr_db=0),
        qinvert.calibrate(
            recall.load_model(), recall.sequences(1), method="newton_schulz", min_output_sqnr_db=1, max_kl=9.0
        ),
        Plan(layers={"step": planned(Requantize.DIVIDE), **golden.layers}, target="int-ops"),
        Plan(layers={"step": chunk_step()}, target="int-ops"),
        qinvert.calibrate(recall.load_model(), recall.sequences(1)[:, :70], scope="chunk"),
    ]
    return [json.loads(plan.to_bytes()) for plan in plans]


def chunk_step():
    """A layer of a whole chunk step, with channels."""
    program = qinvert.gated_delta_step(qinvert.block_merge(4), 2, 4)
    layer = planned(Requantize.DIVIDE, program=program)
    return replace(layer, channels=ValueChannels(exponents=((0, -3, 1, 0),), rotated=True))


def inputs():
    """L and beta of the golden plan: products of small integers, exact in float32."""
    with np.load(GOLDEN / "plan-v1.npz") as found:
        keys, rows = found["keys"].astype(np.float32), found["beta"].astype(np.float32)
    return torch.from_numpy(keys * rows[..., None] / 2**14), torch.from_numpy(rows / 128)


def objects(heading):
    """Every written object that a section describes."""
    documents = written()
    programs = [program for document in documents for program in document["programs"]]
    inverses = [program for program in programs if "output" in program]
    others = [program for program in programs if "output" not in program]
    layers = [layer for document in documents for layer in document["layers"].values()]
    known = [layer["provenance"] for layer in layers if layer["provenance"]]
    calibrated, stepped = ([p for p in known if ("scope" in p) == wanted] for wanted in (False, True))
    return {
        "File": documents,
        "Producer": [document["producer"] for document in documents],
        "Program": programs,
        "Ports of an inverse": inverses,
        "Ports of any program": others,
        "Port": [port for program in others for port in (*program["inputs"], *program["outputs"])],
        "Constant": [constant for program in programs for constant in program["constants"]],
        "Layer": layers,
        "Channels": [layer["channels"] for layer in layers if "channels" in layer],
        "Tensor": [tensor for layer in layers for tensor in layer["tensors"].values()],
        "Provenance of a plan": [d["provenance"] for d in documents if d["provenance"]],
        "Provenance of a layer": calibrated,
        "Model": [d["provenance"]["model"] for d in documents if "model" in d["provenance"]],
        "Data": [d["provenance"]["data"] for d in documents if "data" in d["provenance"]],
        "Unseen": [found["unseen"] for found in calibrated if found.get("unseen")],
        "Head": [head for found in calibrated if found.get("unseen") for head in found["unseen"]["heads"]],
        "Binding": [found["binding"] for found in calibrated],
        "Provenance of a chunk step": stepped,
        "Candidate of a chunk step": [row for found in stepped for row in found["candidates"]],
        "Candidate": [candidate for found in calibrated for candidate in found["candidates"]],
    }[heading]


#: Sections that describe other keys of the same objects.
BESIDE = {
    "Program": ("Ports of an inverse", "Ports of any program"),
    "Ports of an inverse": ("Program",),
    "Ports of any program": ("Program",),
}
KINDS = [
    "File",
    "Producer",
    "Program",
    "Ports of an inverse",
    "Ports of any program",
    "Port",
    "Constant",
    "Layer",
    "Tensor",
    "Channels",
    "Provenance of a plan",
    "Model",
    "Data",
    "Provenance of a layer",
    "Unseen",
    "Head",
    "Binding",
    "Candidate",
    "Provenance of a chunk step",
    "Candidate of a chunk step",
]


@pytest.mark.parametrize("heading", KINDS)
def test_the_page_names_every_key_that_is_written_and_no_other(heading):
    documented, found = table(heading), objects(heading)
    beside = {key for other in BESIDE.get(heading, ()) for key in table(other)}
    keys = {key for entry in found for key in entry}
    assert keys - beside == documented.keys()
    for key, row in documented.items():
        everywhere = all(key in entry for entry in found)
        assert everywhere == (row["written"] == "always"), key


@pytest.mark.parametrize("heading", KINDS)
def test_values_have_the_type_that_the_page_says(heading):
    for key, row in table(heading).items():
        legal = {kind for name in row["type"].split(" or ") for kind in TYPES[name]}
        assert {type(entry[key]) for entry in objects(heading) if key in entry} <= legal, key


def test_every_section_with_a_table_of_keys_is_compared():
    described = {heading for heading, text in SECTIONS.items() if "| key |" in text}
    assert described == {*KINDS, "Step"}


def operations(row):
    return set(OPERATIONS) if row["operations"] == "all" else set(quoted(row["operations"]))


def test_the_page_names_every_field_of_every_step():
    documented = table("Step")
    assert quoted(documented["operation"]["value"]) == list(OPERATIONS)
    for name, kind in OPERATIONS.items():
        keys = {key for key, row in documented.items() if name in operations(row)}
        assert keys == {"operation", *(field.name for field in fields(kind))}, name


def test_steps_are_written_as_the_page_says():
    documented, found = table("Step"), [s for d in written() for p in d["programs"] for s in p["steps"]]
    # Blocks, masks, factors: all that the page names is written somewhere.
    assert {key for step in found for key in step} == documented.keys()
    assert {step["operation"] for step in found} == OPERATIONS.keys()
    for step in found:
        kind = OPERATIONS[step["operation"]]
        assert {f.name for f in fields(kind) if f.default is MISSING} <= step.keys()
        for key, value in step.items():
            legal = {t for name in documented[key]["type"].split(" or ") for t in TYPES[name]}
            assert step["operation"] in operations(documented[key])
            assert type(value) in legal, (step, key)


def test_words_that_are_legal_are_listed_as_the_code_has_them():
    assert quoted(table("Tensor")["format"]["value"]) == [
        *(
            name
            for name in ("int4", "int8", "int8x2", "int16", "int16-whole")
            if not FORMATS[name].zero_point
        ),
        "float32",
    ]
    assert {name for name, fmt in FORMATS.items() if fmt.zero_point} == {"uint8", "uint16"}
    assert quoted(table("Layer")["requantize"]["value"].partition(",")[0]) == list(Requantize)
    assert quoted(table("Port")["meaning"]["value"]) == list(Meaning)
    assert set(quoted(table("Step")["axis"]["value"])) - {"concat"} == set(Axis)
    assert [row["version"] for row in rows(SECTIONS["Versions"])] == [
        str(version) for version in range(1, SCHEMA_VERSION + 1)
    ]


def test_limits_are_those_of_the_code():
    for row in rows(SECTIONS["Limits"]):
        module, _, name = quoted(row["constant"])[0].rpartition(".")
        assert getattr(import_module(module), name) == float(row["value"]), name


@pytest.mark.parametrize(("example", "version"), [(0, 1), (1, 2)])
def test_the_examples_are_plans_and_are_written_as_they_stand(example, version):
    text = code(PAGE, "json")[example]
    plan = Plan.from_bytes(text.encode())
    assert json.loads(plan.to_bytes()) == json.loads(text)
    assert json.loads(text)["schema_version"] == version
    given = {
        port.name: torch.tril(torch.full((1, *port.shape[1:]), 0.25), -1)
        for port in plan.layer().program.inputs
    }
    assert plan.layer().execute(given).keys() == {port.name for port in plan.layer().program.outputs}


def test_an_unknown_key_is_ignored_but_not_in_a_step():
    document = json.loads(code(PAGE, "json")[0])
    program = document["programs"][0]
    expected = Plan.from_bytes(json.dumps(document).encode())
    document["new"] = program["new"] = document["layers"]["layer"]["new"] = 1
    assert Plan.from_bytes(json.dumps(document).encode()) == expected
    program["steps"][0]["new"] = 1
    with pytest.raises(qinvert.PlanError, match="matmul has no field 'new'"):
        Plan.from_bytes(json.dumps(document).encode())


def test_a_plan_has_the_lowest_version_that_can_hold_it():
    assert [document["schema_version"] for document in written()] == [1, 1, 1, 1, 1, 1, 2, 3, 3]
    kinds = {tuple(sorted({"output", "inputs"} & program.keys())) for program in written()[-3]["programs"]}
    assert kinds == {("inputs",), ("output",)}
    assert isinstance(step_like(), Program)


@pytest.mark.parametrize(
    "steps",
    [
        [Subtract(output="y", left="M", right="M")],
        [Multiply(output="y", left="M", right="M")],
        [Exponential(output="y", source="M")],
        [Transpose(output="y", source="M")],
        [MatMul(output="y", left="M", right="ones")],
        [Add(output="y", left="M", right="ones")],
        [Slice(output="row", source="M", rows=(3, 4)), Mask(output="y", source="row", constant="ones")],
    ],
    ids=lambda steps: type(steps[-1]).__name__,
)
def test_what_older_readers_refuse_or_would_compute_otherwise_is_version_3(steps):
    ones = Constant(name="ones", rows=4, columns=4, ones=((0, 4),) * 4)
    program = inverse_program(*steps, constants=(ones,))
    assert oldest_schema(program) == 3
    layer = planned(Requantize.DIVIDE, program=program)
    plan = Plan(layers={"x": layer}, target="int-ops")
    assert json.loads(plan.to_bytes())["schema_version"] == 3
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_channels_alone_make_a_file_version_3():
    layer = planned(Requantize.DIVIDE)
    for channels, version in ((None, 2), (ValueChannels(exponents=((1,),)), 3)):
        plan = Plan(layers={"x": replace(layer, channels=channels)}, target="int-ops")
        assert json.loads(plan.to_bytes())["schema_version"] == version
        assert Plan.from_bytes(plan.to_bytes()) == plan


def test_whole_masks_and_zero_blocks_stay_in_the_first_version():
    ones = Constant(name="ones", rows=4, columns=4, ones=((0, 4),) * 4)
    masked = inverse_program(Mask(output="y", source="M", constant="ones"), constants=(ones,))
    assert oldest_schema(masked) == oldest_schema(qinvert.block_merge(8, 2)) == 1


# plan-v1.json and plan-v1.npz were written by the release before programs had ports; its plans were
# calibrated on the same matrices, and the second file holds the bits of T that it computed.
def test_a_plan_of_the_first_schema_is_read_and_written_unchanged():
    content = (GOLDEN / "plan-v1.json").read_bytes()
    plan = Plan.from_bytes(content)
    again = json.loads(plan.to_bytes())
    assert again | {"producer": None} == json.loads(content) | {"producer": None}
    assert {layer.formats for layer in plan.layers.values()} == {"int4", "int8", "int8x2", "int16"}
    assert {layer.requantize for layer in plan.layers.values()} == set(Requantize)
    assert [name for name, layer in plan.layers.items() if layer.program.inverse_ports.factored] == [
        "factored"
    ]
    assert {"headed/head_0", "headed/head_1"} <= plan.layers.keys()


@pytest.mark.parametrize("name", [*Plan.load(GOLDEN / "plan-v1.json").layers, "powers, hexagon"])
def test_a_plan_of_the_first_schema_computes_the_bits_that_its_release_computed(name):
    plan, (lower, beta) = Plan.load(GOLDEN / "plan-v1.json"), inputs()
    layer, _, rounding = name.partition(", ")
    found = plan.layer(layer).inverse(lower, beta, rounding=rounding or "onnx")
    with np.load(GOLDEN / "plan-v1.npz") as stored:
        assert np.array_equal(found.numpy().view(np.uint32), stored[name])
        assert (stored[name] != stored["doubled"]).any() or name == "doubled"
