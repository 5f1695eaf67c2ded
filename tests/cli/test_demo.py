import json
import os

import pytest
from click.testing import CliRunner

from qinvert.cli.app import cli


def test_the_demo_does_the_whole_job(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "demo"
    result = CliRunner().invoke(cli, ["demo", "-o", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    layers = ["model.layers.0.linear_attn", "model.layers.1.linear_attn"]
    assert sorted(os.listdir(folder)) == [*(f"{name}.onnx" for name in layers), "plan.json", "report.html"]
    assert document["accuracy"]["exact"] == 1.0
    assert document["accuracy"]["integer"] == 1.0
    assert document["accuracy"]["T = I"] == pytest.approx(0.27, abs=0.04)
    assert document["growth"][layers[1]]["powers"]["8"] > 1e4
    assert document["growth"][layers[1]]["inverse"] <= 1
    for name in layers:
        layer = document["layers"][name]
        assert layer["floor_db"] - layer["sqnr_db"] < 2
        assert [v["values"] for v in layer["verified"]] == [512 * 64 * 64] * 2
        assert all(v["mismatches"] <= 1e-4 * v["values"] for v in layer["verified"])
