from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import qinvert
from qinvert.cli.app import cli
from qinvert.stress import from_keys, unit_keys


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def matrices(tmp_path):
    generator = torch.Generator().manual_seed(0)
    beta = torch.rand(12, 16, generator=generator)
    lower = from_keys(unit_keys(12, 16, 0.5, generator), beta, torch.zeros(12, 16))
    np.savez(tmp_path / "l.npz", **{"a": lower.numpy(), "a.beta": beta.numpy()})
    return tmp_path / "l.npz"


@pytest.mark.parametrize("target", ["npu-qdq-int8", "int-ops"])
def test_the_whole_job_on_matrices_and_beta(matrices, target, tmp_path):
    plan = tmp_path / "plan.json"
    made = run("calibrate", matrices, "-o", plan, "--factored", "--target", target, "--max-loss", 3)
    assert made.exit_code == 0, made.output
    assert qinvert.Plan.load(plan).layer("a").program.inverse_ports.beta == "beta"
    report = json.loads(run("simulate", plan, "--data", matrices, "--json").stdout)
    assert report["layers"]["a"]["sqnr_db"] > 30
    assert run("inspect", plan).exit_code == 0
    assert run("export", plan, "-o", tmp_path / "graphs").exit_code == 0
    for data in ((), ("--data", matrices)):
        results = json.loads(run("verify", tmp_path / "graphs", *data, "--json").stdout)
        assert [r["mismatches"] for r in results["a"]] == [0, 0]


def test_a_file_without_beta_is_refused_in_one_line(matrices, tmp_path):
    plan = tmp_path / "plan.json"
    assert run("calibrate", matrices, "-o", plan, "--factored").exit_code in (0, 1)
    run("export", plan, "-o", tmp_path / "graphs")
    np.savez(tmp_path / "bare.npz", a=np.load(matrices)["a"])
    for call in (
        ("calibrate", tmp_path / "bare.npz", "-o", tmp_path / "other.json", "--factored"),
        ("simulate", plan, "--data", tmp_path / "bare.npz"),
        ("verify", tmp_path / "graphs", "--data", tmp_path / "bare.npz"),
    ):
        result = run(*call)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert "beta of layer 'a', which is missing" in result.stderr
    assert not (tmp_path / "other.json").exists()
