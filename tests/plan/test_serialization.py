from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inverse_programs import inverse_program

import qinvert
from qinvert.errors import InputError, PlanError
from qinvert.formats import INT8
from qinvert.methods import block_merge, neumann, neumann_doubling
from qinvert.plan.plan import LayerPlan, Plan
from qinvert.plan.quantization import Quantization, Requantize
from qinvert.program.ports import MATRIX
from qinvert.program.steps import Rescale
from qinvert.stress import stress_matrices

LAYER = "layer"
METHODS = {
    "auto": "auto",
    "corrected": block_merge(8, 2, corrections=1),
    "masked": block_merge(8, 4, layout="masked"),
    "tiled": block_merge(8, 1, tile=4),
    "series": neumann(8, 3),
    "doubling": neumann_doubling(8),
}


@cache
def calibrated(method: str = "corrected", **options) -> Plan:
    return qinvert.calibrate(stress_matrices("half_random", 4, 8), method=METHODS[method], **options)


def document() -> dict:
    return json.loads(calibrated().to_bytes())


def rescaled(factor: float) -> Plan:
    step = Rescale(output="scaled", source=MATRIX, factor=factor)
    program = inverse_program(step)
    tensors = dict.fromkeys(program.tensors, Quantization(format=INT8, scale=0.5))
    layer = LayerPlan(program=program, tensors=tensors, requantize=Requantize.DIVIDE)
    return Plan(layers={LAYER: layer}, target="int-ops")


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def changed(path, value) -> bytes:
    result = document()
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return json.dumps(result).encode()


@pytest.fixture(scope="module")
def load_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"

    def load(content: bytes) -> Plan:
        path.write_bytes(content)
        return Plan.load(path)

    return load


@pytest.mark.parametrize("options", [{}, {"bits": 4, "target": "int-ops"}, {"scales": "pow2"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_comes_back_equal_and_byte_for_byte(tmp_path, method, options):
    plan = calibrated(method, **options)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(str(tmp_path / "plan.json"))
    assert again == plan
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert again.sha256 == plan.sha256
    lower = stress_matrices("half_random", 4, 8)
    assert torch.equal(again.layer().inverse(lower), plan.layer().inverse(lower))


@given(scales=st.lists(st.floats(2.0**-99, 2.0**49, width=32), min_size=3, max_size=3))
def test_every_float32_scale_comes_back_bit_for_bit(scales):
    program = neumann(8, 2)
    tensors = {n: Quantization(format=INT8, scale=s) for n, s in zip(program.tensors, scales, strict=True)}
    layer = LayerPlan(program=program, tensors=tensors, requantize=Requantize.DIVIDE)
    again = Plan.from_bytes(Plan(layers={LAYER: layer}, target="int-ops").to_bytes())
    assert [again.layer().tensors[name].scale for name in program.tensors] == scales


@given(factor=st.floats(2.0**-99, 2.0**49, width=32), sign=st.sampled_from([1, -1]))
def test_every_factor_comes_back_and_1_is_not_written(factor, sign):
    plan = rescaled(sign * factor)
    content = plan.to_bytes()
    assert Plan.from_bytes(content) == plan
    (step,) = json.loads(content)["programs"][0]["steps"]
    assert step.get("factor", 1.0) == sign * factor
    assert ("factor" in step) == (sign * factor != 1.0)


@pytest.mark.parametrize("factor", ["0.0", "0.1", "1e300", '"1"', "true", "null", "[]"])
def test_a_damaged_factor_is_refused(load_bytes, factor):
    content = rescaled(0.5).to_bytes().replace(b'"factor": 0.5', f'"factor": {factor}'.encode())
    with pytest.raises(PlanError, match="factor"):
        load_bytes(content)


def test_layers_share_one_copy_of_their_program():
    layer = calibrated().layer()
    other = calibrated("doubling").layer()
    plan = Plan(layers={"a": layer, "b": other, "c": layer}, target="npu-qdq-int8")
    written = json.loads(plan.to_bytes())
    assert [written["layers"][name]["program"] for name in "abc"] == [0, 1, 0]
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_the_hash_tells_plans_apart():
    assert calibrated().sha256 != calibrated(scales="pow2").sha256


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path):
    (tmp_path / "plan.json").write_text("old")
    calibrated().save(tmp_path / "plan.json")
    assert names(tmp_path) == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json") == calibrated()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1, 2}], ids=["nan", "inf", "object", "set"]
)
def test_a_plan_that_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    (tmp_path / "plan.json").write_text("old")
    with pytest.raises((TypeError, ValueError)):
        replace(calibrated(), provenance={"note": value}).save(tmp_path / "plan.json")
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


@pytest.mark.parametrize("step", ["replace", "dup"])
def test_a_disk_error_while_saving_leaves_the_old_file(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "plan.json").write_text("old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device; choose another place"):
        calibrated().save(tmp_path / "plan.json")
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "old"


@pytest.mark.parametrize("place", ["missing/plan.json", ""])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
        calibrated().save(tmp_path / place)
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["missing.json", "", "missing/plan.json", "nul\0byte"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, place):
    with pytest.raises(PlanError, match=r"cannot read .*; check the path"):
        Plan.load(tmp_path / place)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a plan file .* is it truncated"),
        (b"\xff\xfe\xfa\x00", "not a plan file"),
        (b"\x80\x04\x95.", "not a plan file"),
        (b"[]", "the top level is not an object"),
        (b'"plan"', "the top level is not an object"),
        (b"{}", "'schema_version' must be a int, got None"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b'{"schema_version": 1}', "'programs' must be a list, got None"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "not a plan file"),
    ],
)
def test_what_is_no_plan_is_refused(load_bytes, content, words):
    with pytest.raises(PlanError, match=rf"plan\.json: .*{words}"):
        load_bytes(content)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_plan_is_refused(load_bytes, share):
    content = calibrated().to_bytes()
    with pytest.raises(PlanError, match="is it truncated"):
        load_bytes(content[: int(share * len(content))])


STEP = ("programs", 0, "steps", 0)
TENSOR = ("layers", LAYER, "tensors", "M")
WRONG = [
    (("schema_version",), 4, "schema version 4, but this qinvert .* reads up to 3; upgrade qinvert"),
    (("schema_version",), 0, "versions start at 1"),
    (("schema_version",), True, "'schema_version' must be a int, got True"),
    (("layers",), {}, "needs at least one layer"),
    (("programs",), [], "names program 0, but the plan has 0"),
    (("programs", 0, "chunk"), 12, "chunk 12 is not a power of two"),
    (("programs", 0, "chunk"), 16, "inner sizes must agree"),
    (("programs", 0, "parameters"), {"base": 1.5}, "must map names to integers or strings"),
    (("programs", 0, "output"), "nothing", "output 'nothing' must be a tensor"),
    (("programs", 0, "implicit_identity"), 1, "'implicit_identity' must be a bool, got 1"),
    (("programs", 0, "constants", 0, "ones"), [[0]], "a range must be two integers"),
    (("programs", 0, "constants", 0, "rows"), 10**9, "one column range"),
    ((*STEP, "operation"), "exec", "operation 'exec' is unknown; this version has matmul, add"),
    ((*STEP, "surprise"), 1, "has no field 'surprise'"),
    ((*STEP, "source"), "base_2/S", "which no earlier step writes; order the steps"),
    ((*STEP, "output"), "M", "step 'M': the name is taken"),
    ((*STEP, "rows"), [0, 10**12], "is empty or outside"),
    ((*STEP, "bound"), "1", "'bound' must be a float"),
    ((*STEP,), {"operation": "slice"}, "missing 2 required keyword-only arguments"),
    ((*STEP,), {"operation": "concat", "output": "x", "sources": "M", "axis": "rows"}, "'sources' must be"),
    ((*STEP,), {"operation": "concat", "output": "x", "sources": ["M"], "axis": 7}, "axis 7 is unknown"),
    ((*STEP,), {"operation": "concat", "output": "x", "sources": ["M"], "axis": []}, "axis .* is unknown"),
    (("layers", LAYER), [], "layer 'layer'|'program' must be a int"),
    (("layers", LAYER, "program"), 1, "layer 'layer' names program 1, but the plan has 1"),
    (("layers", LAYER, "program"), -1, "names program -1"),
    (("layers", LAYER, "program"), False, "'program' must be a int, got False"),
    (("layers", LAYER, "requantize"), "shift", "requantize 'shift' is unknown; use divide or multiplier"),
    (("layers", LAYER, "ranges", "M"), "1", "'ranges' must map names to numbers"),
    (("layers", LAYER, "tensors"), {}, "it lacks 'M'"),
    (("layers", LAYER, "tensors", "extra"), {"format": "int8", "scale": 1.0}, "it has 'extra'"),
    ((*TENSOR, "format"), "int3", "unknown format 'int3'; use one of int4"),
    ((*TENSOR, "format"), "uint8", "has a zero point"),
    ((*TENSOR, "format"), "int16", "without rounding"),
    ((*TENSOR, "scale"), 0.0, "is not a float32 in"),
    ((*TENSOR, "scale"), 0.1, "is not a float32 in"),
    ((*TENSOR, "scale"), 10**17, "is not a float32 in"),
    ((*TENSOR, "scale"), 1.0, "without rounding"),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=lambda v: str(v)[:40])
def test_a_damaged_field_is_named(load_bytes, path, value, words):
    with pytest.raises(PlanError, match=rf"plan\.json: .*({words})"):
        load_bytes(changed(path, value))


@pytest.mark.parametrize("path", [("provenance", "deep"), ("target",), (*STEP, "output"), (*TENSOR, "scale")])
@pytest.mark.parametrize(("start", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_nesting_is_refused(load_bytes, path, start, end):
    deep = start * 100_000 + b"1" + end * 100_000
    with pytest.raises(PlanError, match="not a plan file"):
        load_bytes(changed(path, 12345678).replace(b"12345678", deep))


@pytest.mark.parametrize("path", [(*TENSOR, "scale"), (*STEP, "bound")], ids=str)
def test_an_integer_beyond_every_float_is_refused(load_bytes, path):
    with pytest.raises(PlanError):
        load_bytes(changed(path, 10**400))


@pytest.mark.parametrize("path", [(*STEP, "bound"), ("layers", LAYER, "ranges", "M"), ("provenance", "note")])
def test_a_number_beyond_every_float_is_refused(load_bytes, path):
    with pytest.raises(PlanError):
        load_bytes(changed(path, 12345678).replace(b"12345678", b"1e999"))


def test_a_constant_without_rows_is_refused(load_bytes):
    result = document()
    result["programs"][0]["constants"].append({"name": "none", "rows": 0, "columns": 8, "ones": []})
    step = {"operation": "concat", "output": "odd", "sources": ["M", "none"], "axis": "rows"}
    result["programs"][0]["steps"].insert(0, step)
    result["layers"][LAYER]["tensors"]["odd"] = result["layers"][LAYER]["tensors"]["M"]
    with pytest.raises(PlanError, match="at least one row"):
        load_bytes(json.dumps(result).encode())


def paths(node, prefix=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


JUNK = [None, True, 0, -1, 3, 2**31, 10**30, 0.5, -0.0, 1e308, "", "M", "rows", "int4", "\ud800", [], [0, 1]]
JUNK += [[[]], {}, {"a": {}}, [None], [0, 2**40], {"operation": "add"}, "base_2/S", 16, 1.0, "matmul"]


@settings(max_examples=400)
@given(data=st.data())
def test_random_damage_gives_a_plan_error_or_a_plan_that_works(load_bytes, data):
    damaged = document()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(damaged))))
        parent = damaged
        for key in path[:-1]:
            parent = parent[key]
        match data.draw(st.sampled_from(["replace", "delete", "repeat", "add"])):
            case "replace":
                parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
            case "delete":
                del parent[path[-1]]
            case "repeat" if isinstance(parent, list):
                parent.insert(data.draw(st.integers(0, len(parent))), parent[path[-1]])
            case _ if isinstance(parent, dict):
                parent["new"] = parent[path[-1]]
    try:
        plan = load_bytes(json.dumps(damaged).encode())
    except PlanError:
        return
    assert Plan.from_bytes(plan.to_bytes()) == plan
    for layer in plan.layers.values():
        size = layer.chunk
        assert torch.equal(layer.inverse(torch.zeros(size, size)), torch.eye(size))


@settings(max_examples=200)
@given(position=st.floats(0, 1, exclude_max=True), length=st.integers(0, 40), new=st.binary(max_size=8))
def test_random_bytes_give_a_plan_error_or_a_plan(load_bytes, position, length, new):
    content = calibrated().to_bytes()
    start = int(position * len(content))
    try:
        plan = load_bytes(content[:start] + new + content[start + length :])
    except PlanError:
        return
    assert isinstance(plan, Plan)


def test_a_lone_surrogate_is_refused(load_bytes):
    content = calibrated().to_bytes().replace(b'"layer"', b'"lay\\ud800er"')
    with pytest.raises(PlanError, match="is not Unicode"):
        load_bytes(content)
    with pytest.raises(PlanError, match="rename the layer"):
        Plan(layers={"\ud800": calibrated().layer()}, target="int-ops")
