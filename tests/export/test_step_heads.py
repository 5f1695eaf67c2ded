"""Heads of a chunk step with plans of their own, in one graph: every value is that of its own plan."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from step_plans import small_plan

import qinvert
from qinvert import ExportError, VerificationError
from qinvert.cli.app import cli
from qinvert.export.exporting import build
from qinvert.export.step_heads import graph_layers, layer_plans
from qinvert.export.verification.step_samples import heads_samples
from qinvert.export.verification.verify import read_interface
from qinvert.formats import INT16
from qinvert.plan.plan import Plan
from qinvert.plan.value_channels import ValueChannels

LAYER = "model.layers.0"
INTEGERS = {"input_type": "integers", "output": "integers"}


def of_heads(profile="int-ops", **options):
    """A plan of three heads, each with other grids of values and with other factors of their channels."""
    base, layers = small_plan(profile, **options).layer(), {}
    values = base.program.depends_on("v", "state")
    for head, factor in enumerate((1.0, 0.5, 2.0)):
        tensors = {
            name: replace(grid, scale=grid.scale * factor) if name in values else grid
            for name, grid in base.tensors.items()
        }
        channels = ValueChannels(exponents=(tuple((head + i) % 3 - 1 for i in range(12)),))
        layers[f"{LAYER}/head_{head}"] = replace(base, tensors=tensors, channels=channels)
    return Plan(layers=layers, target=profile)


def verified(plan, path, checked=None, **options):
    qinvert.export(plan, path, layer=LAYER, **options)
    other = checked or plan
    return qinvert.verify(
        path, other, heads_samples(layer_plans(other, LAYER), read_interface(path, other, LAYER))
    )


@pytest.mark.parametrize(
    ("profile", "options", "ends"),
    [
        ("int-ops", {}, {"chunks": 2}),
        (
            "int-ops",
            {"decay": "channel"},
            {"batch": 2, "layout": "values_first", "states": "every", "chunks": 2},
        ),
        ("int-ops", {}, {**INTEGERS, "layout": "channels_first"}),
        ("int-ops", {"values_first": False}, {"normalize": True}),
        ("npu-qdq-int16", {"wide": INT16, "logs": INT16}, {}),
    ],
)
def test_every_head_runs_by_its_own_plan(tmp_path, profile, options, ends):
    plan = of_heads(profile, **options)
    results = verified(plan, tmp_path / "step.onnx", **ends)
    outputs = 3 if "states" in ends else 2
    assert len(results) == 2 * 3 * outputs
    assert {result.runtime.rpartition(" ")[2] for result in results} == {"0", "1", "2"}
    if profile == "int-ops" and "normalize" not in ends:
        assert all(result.mismatches == 0 for result in results)


def test_a_head_with_the_plan_of_another_is_seen(tmp_path):
    plan = of_heads()
    names = list(plan.layers)
    swapped = dict(zip(names, [plan.layers[name] for name in (names[1], names[0], names[2])], strict=True))
    with pytest.raises(VerificationError, match="of head 0"):
        verified(plan, tmp_path / "step.onnx", checked=replace(plan, layers=swapped))


def test_hosts_find_the_scales_of_every_head():
    plan = of_heads()
    model = build(plan, layer=LAYER, **INTEGERS)
    said = {entry.key: entry.value for entry in model.metadata_props}
    for name in ("q", "v", "state"):
        wanted = [each.tensors[name].scale for each in plan.layers.values()]
        assert json.loads(said[f"qinvert.input_scale/{name}"]) == wanted
    assert said["qinvert.heads"] == "3"
    assert json.loads(said["qinvert.value_exponents"]) == [
        list(each.channels.exponents[0]) for each in plan.layers.values()
    ]
    assert f"qinvert.layer/{LAYER}" in said


def test_constants_that_heads_share_stand_once():
    plan = of_heads()
    names = [tensor.name for tensor in build(plan, layer=LAYER).graph.initializer]
    assert len(names) == len(set(names))
    assert any(name.startswith("head_1/") for name in names)
    assert not any(name.startswith("head_0/") for name in names)


def test_what_cannot_be_joined_is_refused():
    plan = of_heads()
    for options, words in (
        ({"heads": 4}, "heads 4 are not the 3"),
        ({"chains": 2}, "chains 2 cut what heads share"),
    ):
        with pytest.raises(ExportError, match=words):
            build(plan, layer=LAYER, **options)
    name = list(plan.layers)[-1]
    other = small_plan("int-ops", decay="channel")
    mixed = replace(plan, layers={**plan.layers, name: other.layer()})
    with pytest.raises(ExportError, match="different sizes"):
        build(mixed, layer=LAYER)


def test_the_command_line_writes_one_graph_for_all_heads(tmp_path):
    plan = of_heads()
    assert graph_layers(plan) == (LAYER,)
    plan.save(tmp_path / "plan.json")
    result = CliRunner().invoke(cli, ["export", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{LAYER}.onnx", "plan.json"]
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = onnx.load(tmp_path / "out" / f"{LAYER}.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1] == 3
    arguments = [
        "export",
        str(tmp_path / "plan.json"),
        "-o",
        str(tmp_path / "one"),
        "--layer",
        f"{LAYER}/head_1",
    ]
    assert CliRunner().invoke(cli, [*arguments, "--heads", "1"]).exit_code == 0
    assert (
        np.asarray(
            onnx.load(tmp_path / "one" / f"{LAYER}_head_1.onnx")
            .graph.input[0]
            .type.tensor_type.shape.dim[1]
            .dim_value
        )
        == 1
    )
