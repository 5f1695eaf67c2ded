"""Graphs of whole chunk steps: ends, options, metadata, and what is refused."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from step_plans import small_plan

import qinvert
from qinvert.cli.app import cli
from qinvert.errors import QInvertError
from qinvert.export import lint
from qinvert.export.encodings import encodings
from qinvert.export.exporting import build, serialize
from qinvert.export.functions import build_layers
from qinvert.formats import INT16, INT16_WHOLE
from qinvert.plan.plan import Plan
from qinvert.plan.quantization import Quantization
from qinvert.plan.value_channels import ValueChannels
from qinvert.stress import stress_matrices

#: Formats of plans by profile; int8 everywhere else.
FORMATS = {
    "npu-qdq-int16": {"wide": INT16, "logs": INT16},
    "hexagon-int16": {"wide": INT16_WHOLE, "logs": INT16_WHOLE},
    "hexagon-uint16": {"wide": INT16_WHOLE, "logs": INT16_WHOLE},
}
PROFILES = (
    "int-ops",
    "int-ops-x86",
    "qlinear",
    "qlinear-uint8",
    "npu-qdq-int8",
    "npu-qdq-uint8",
    "hexagon-uint8",
    *FORMATS,
)
SIZES = {"batch": 2, "heads": 3, "chunks": 2}


def planned(profile="npu-qdq-int8", **options):
    return small_plan(profile, **FORMATS.get(profile, {}), **options)


@cache
def inverse_plan():
    return qinvert.calibrate(stress_matrices("small_random", 2, 16), method="elimination", min_sqnr_db=0)


def changed(plan, **fields):
    return Plan(layers={"layer": replace(plan.layer(), **fields)}, target=plan.target)


def shapes(values):
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def elements(values):
    return {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in values}


def metadata(model):
    return {e.key.removeprefix("qinvert."): e.value for e in model.metadata_props}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("ends", ["float", "integers"])
def test_every_profile_writes_a_clean_static_graph(profile, ends):
    integers = {"input_type": "integers", "output": "integers"} if ends == "integers" else {}
    model = build(planned(profile), **SIZES, **integers)
    assert lint(model) == []
    ranks = [len(v.type.tensor_type.shape.dim) for v in model.graph.value_info]
    assert max(ranks) <= 4
    assert not any(node.op_type in ("Loop", "Scan", "If") for node in model.graph.node)


def test_ends_have_batch_heads_and_tokens_as_axes():
    model = build(planned(), **SIZES)
    assert shapes(model.graph.input) == {
        "q": [2, 3, 32, 8],
        "k": [2, 3, 32, 8],
        "v": [2, 3, 32, 12],
        "beta": [2, 3, 32],
        "g": [2, 3, 32],
        "valid": [2, 32],
        "state": [2, 3, 8, 12],
    }
    assert shapes(model.graph.output) == {"o": [2, 3, 32, 12], "state_out": [2, 3, 8, 12]}


def test_layout_decay_and_states_change_the_ends():
    model = build(planned(decay="channel"), **SIZES, layout="values_first", states="every")
    taken, returned = shapes(model.graph.input), shapes(model.graph.output)
    assert taken["v"] == returned["o"] == [2, 3, 12, 32]
    assert taken["g"] == [2, 3, 32, 8]
    assert taken["state"] == returned["state_1"] == returned["state_out"] == [2, 3, 12, 8]


def test_one_sequence_needs_no_reshape_of_keys_and_values():
    model = build(planned(), heads=3, chains=1)
    reshaped = {node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    assert not reshaped & {"q", "k", "v", "state"}
    assert not any(node.op_type == "Slice" and node.input[0] == "q/dequantized" for node in model.graph.node)


@pytest.mark.parametrize("profile", ["int-ops", "npu-qdq-int8", "npu-qdq-uint8", "hexagon-uint16"])
def test_integer_ends_take_what_the_metadata_say(profile):
    plan = planned(profile)
    model = build(plan, **SIZES, input_type="integers", output="integers", states="every")
    said, layer = metadata(model), plan.layer()
    assert "valid" not in shapes(model.graph.input)
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for name, element in elements(values).items():
            tensor = "o/chunks" if name == "o" else "state" if name.startswith("state") else name
            grid = layer.tensors["o" if tensor == "o/chunks" else tensor]
            assert float(said[f"{kind}_scale/{name}"]) == grid.scale
            unsigned = element.startswith("u")
            assert int(said[f"{kind}_zero_point/{name}"]) == (2 ** (int(element[4:]) - 1) if unsigned else 0)
            assert ("16" in element) == grid.format.is_wide
            assert unsigned == ("uint" in profile)


def test_metadata_say_everything_that_a_host_needs():
    channels = ValueChannels(exponents=tuple((0, 1, -2) * 4 for _ in range(3)))
    plan = changed(planned(), channels=channels)
    said = metadata(build(plan, **SIZES, layout="values_first", states="every", normalize=True))
    wanted = {
        "batch": "2",
        "heads": "3",
        "chunk": "16",
        "chunks": "2",
        "key_size": "8",
        "value_size": "12",
        "decay": "scalar",
        "layout": "values_first",
        "states": "every",
        "normalize": "true",
        "input_type": "float32",
        "output": "ports",
        "state_input": "state",
        "state_output": "state_out",
        "value_rotation": "none",
        "plan_sha256": plan.sha256,
    }
    assert {name: said[name] for name in wanted} == wanted
    assert json.loads(said["value_exponents"]) == [list(row) for row in channels.exponents]


def test_heads_of_the_plan_need_no_option():
    plan = changed(planned(), provenance={"heads": 5})
    assert shapes(build(plan).graph.input)["q"] == [1, 5, 16, 8]


def test_ends_of_one_chunk_and_several_sequences_have_names_of_their_own():
    for profile in ("int-ops", "npu-qdq-int8"):
        model = build(planned(profile), batch=2, heads=3, states="every")
        assert list(shapes(model.graph.output)) == ["o", "state_out"]


def test_equal_arguments_give_equal_bytes():
    first, second = (serialize(build(planned(), **SIZES)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("profile", "hardware", "chains"),
    [
        ("hexagon-uint16", None, 6),
        ("hexagon-uint16", "hexagon-v73", 6),
        ("npu-qdq-int8", "ethos-u85-256", 1),
        ("int-ops", None, 1),
        ("int-ops", "hexagon-v81", 6),
    ],
)
def test_heads_are_chains_where_that_costs_the_least(profile, hardware, chains):
    plan = replace(planned(profile), provenance={"hardware": hardware} if hardware else {})
    whole, apart = (build(plan, batch=2, heads=3, chains=given) for given in ("auto", chains))
    assert serialize(whole) == serialize(apart)
    assert metadata(whole).get("chains", "1") == str(chains)


def test_more_heads_than_compilers_take_as_chains_stay_together():
    model = build(planned("hexagon-uint16"), batch=13, heads=5)
    assert "chains" not in metadata(model)


REFUSALS = {
    "no heads": ({}, "heads"),
    "heads below one": ({"heads": 0}, "heads"),
    "no chunk": ({"heads": 2, "chunks": 0}, "chunks"),
    "half a chunk": ({"heads": 2, "chunks": 1.5}, "chunks"),
    "unknown layout": ({"heads": 2, "layout": "tokens_last"}, "use tokens_first, values_first or"),
    "unknown states": ({"heads": 2, "states": "all"}, "last or every"),
    "no batch": ({"heads": 2, "batch": 0}, "batch"),
    "chains that do not divide": ({"heads": 2, "chains": 3}, "chains"),
    "integers and norms": ({"heads": 2, "normalize": True, "input_type": "integers"}, "host"),
    "an input of inverses": ({"heads": 2, "input": "L"}, "takes q, k, v"),
    "an output of inverses": ({"heads": 2, "output": "T"}, "for inverses"),
    "a size of keys": ({"heads": 2, "key_size": 8}, "key_size"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_legal_is_refused_in_one_line(case):
    options, match = REFUSALS[case]
    with pytest.raises(QInvertError, match=match) as error:
        build(planned(), **options)
    assert "\n" not in str(error.value)


def test_heads_that_contradict_the_plan_are_refused():
    with pytest.raises(QInvertError, match="heads 4 are not the 5"):
        build(changed(planned(), provenance={"heads": 5}), heads=4)
    channels = ValueChannels(exponents=((0,) * 12,) * 5)
    with pytest.raises(QInvertError, match="pass heads=5"):
        build(changed(planned(), channels=channels), heads=4)
    with pytest.raises(QInvertError, match="value channels, but its program 12"):
        build(changed(planned(), channels=ValueChannels(exponents=((0,) * 6,))), heads=4)


def test_two_grids_of_the_state_are_refused():
    layer = planned().layer()
    grid = layer.tensors["state"]
    tensors = {**layer.tensors, "state": Quantization(format=grid.format, scale=2 * grid.scale)}
    with pytest.raises(QInvertError, match="one quantization"):
        build(changed(planned(), tensors=tensors), heads=2)


@pytest.mark.parametrize(
    "option",
    [{"chunks": 2}, {"heads": 2}, {"layout": "tokens_first"}, {"normalize": True}, {"states": "last"}],
)
def test_inverses_take_no_option_of_steps(option):
    with pytest.raises(QInvertError, match="chunk steps"):
        build(inverse_plan(), batch=2, **option)


def test_one_file_of_functions_is_for_inverses():
    with pytest.raises(QInvertError, match="one file per layer"):
        build_layers(planned())


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-uint8", "npu-qdq-int16", "hexagon-uint16"])
@pytest.mark.parametrize("batch", [1, 2])
def test_encodings_cover_both_ends_of_the_state_with_one_grid(profile, batch):
    model = build(planned(profile), heads=3, batch=batch, chunks=2)
    found = {e["name"]: e for e in encodings(model, "aimet-2.0.0")["encodings"]}
    ends = [{k: v for k, v in found[name].items() if k != "name"} for name in ("state", "state_out")]
    assert ends[0] == ends[1]
    assert {"q", "k", "v", "o"} <= set(found)
    # Every float tensor that a node quantizes, and every constant.
    graph = model.graph
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    initializers = {t.name for t in graph.initializer}
    literals = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in initializers
    }
    assert quantized | literals <= set(found)


@pytest.mark.parametrize("profile", ["npu-qdq-int8", "npu-qdq-int16"])
def test_a_state_in_float32_is_float_in_graph_metadata_and_encodings(profile):
    model = build(
        planned(profile, float_state=True),
        heads=3,
        chunks=2,
        chains=1,
        input_type="integers",
        output="integers",
    )
    assert lint(model) == []
    ends = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    assert ends["state"] == ends["state_out"] == onnx.TensorProto.FLOAT != ends["q"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["qinvert.state_type"] == "float32"
    assert not {"qinvert.input_scale/state", "qinvert.output_scale/state_out"} & {*metadata}
    found = {e["name"]: e for e in encodings(model, "aimet-1.0.0")["activation_encodings"]}
    assert found["state"] == {"name": "state", "dtype": "FLOAT", "bw": 32, "enc_type": "PER_TENSOR"}
    assert found["chunk_0/state/read/float"]["bw"] == 8
    newer = {e["name"]: e for e in encodings(model, "aimet-2.0.0")["encodings"]}
    assert newer["state_out"] == {"name": "state_out", "output_dtype": "float32"}
    assert "state" not in encodings(model, "ort")


def test_other_tensors_than_a_float32_state_must_be_quantized():
    model = build(planned("npu-qdq-int8", float_state=True), heads=2, chains=1, layout="channels_first")
    for node in model.graph.node:
        # A product reads the state as it is carried.
        if node.op_type == "MatMul":
            node.input[:] = ["state" if name == "state/read/dequantized" else name for name in node.input]
    assert {finding.rule for finding in lint(model)} == {"quantized"}


def test_profiles_of_integers_alone_refuse_a_state_in_float32():
    layer = planned("npu-qdq-int8", float_state=True)
    with pytest.raises(QInvertError, match="'hexagon-uint8' has no float32 between integers") as error:
        build(layer, profile="hexagon-uint8", heads=2)
    assert "\n" not in str(error.value)
    clean = build(layer, heads=2)
    assert {finding.rule for finding in lint(clean, "ethos-int8")} >= {"quantized"}


def test_integer_inputs_are_activations():
    model = build(planned(), heads=2, input_type="integers", output="integers")
    found = encodings(model, "aimet-1.0.0")
    assert "state/dequantized" in {e["name"] for e in found["activation_encodings"]}
    assert "state/dequantized" not in {e["name"] for e in found["param_encodings"]}


def test_constant_right_operands_are_two_dimensional_int8():
    model = build(planned(), heads=2)
    programs = [c.name for c in planned().layer().program.constants]
    constants = {t.name: t for t in model.graph.initializer if t.name.partition("/")[0] in programs}
    writers = {node.output[0]: node for node in model.graph.node}
    found = [
        constants[writers[node.input[1]].input[0]]
        for node in model.graph.node
        if node.op_type == "MatMul" and writers[node.input[1]].input[0] in constants
    ]
    assert found
    assert all(len(t.dims) == 2 and t.data_type == onnx.TensorProto.INT8 for t in found)


def test_chunks_share_the_key_path_constants():
    one, four = (build(planned(), heads=2, chunks=n) for n in (1, 4))
    sizes = [sum(np.prod(t.dims) for t in model.graph.initializer) for model in (one, four)]
    assert sizes[1] < 1.2 * sizes[0]


def test_the_command_line_exports_and_verifies(tmp_path):
    plan, folder = planned("int-ops"), tmp_path / "graphs"
    plan.save(tmp_path / "plan.json")
    options = [
        "--heads",
        "2",
        "--chunks",
        "2",
        "--layout",
        "values_first",
        "--normalize",
        "--states",
        "every",
    ]
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "plan.json"), "-o", str(folder), *options])
    assert result.exit_code == 0, result.output
    (file,) = folder.glob("*.onnx")
    said = metadata(onnx.load(file))
    assert (said["heads"], said["chunks"], said["layout"]) == ("2", "2", "values_first")
    assert (said["normalize"], said["states"]) == ("true", "every")
    result = CliRunner().invoke(cli, ["verify", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["layer"]
    assert {row["runtime"].rpartition(" ")[2] for row in rows} == {"o", "state_1", "state_out"}
    assert all(row["mismatches"] == 0 for row in rows)


def test_the_command_line_refuses_in_one_line(tmp_path):
    planned("int-ops").save(tmp_path / "plan.json")
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "plan.json"), "-o", str(tmp_path / "g")])
    assert result.exit_code == 2
    assert "heads" in result.output
    assert len(result.output.strip().splitlines()) == 1
