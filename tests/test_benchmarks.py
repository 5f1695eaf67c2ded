import os
import subprocess
import sys

import pytest


def run(root, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("mode", "count", "said"), [("files", 12, "refused"), ("values", 2e4, "values of seeds")]
)
def test_a_short_soak_finds_nothing(mode, count, said, pytestconfig):
    done = run(pytestconfig.rootpath, "benchmarks/soak.py", mode, "--count", count, "--seed", 7)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("0 faults\n")


def test_a_soak_prints_the_seed_of_a_fault(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    # A reader that fails on everything.
    broken = (
        (root / "benchmarks" / "soak.py").read_text().replace("plan = Plan.load(path)", "plan = {}[path]")
    )
    (tmp_path / "soak.py").write_text(broken.replace("reader(path, random.Random(1))", "pass"))
    for name in ("kills.py", "mutations.py", "random_plans.py"):
        (tmp_path / name).write_bytes((root / "benchmarks" / name).read_bytes())
    done = run(root, tmp_path / "soak.py", "files", "--count", 12, "--seed", 7)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "plan: KeyError" in done.stdout
    assert "seed " in done.stdout


def test_the_benchmark_of_runtimes_runs_as_documented(pytestconfig):
    # One small case, once: that it runs and names its rows, not how fast they are.
    command = [sys.executable, "benchmarks/runtimes.py", "--chunks", "16", "--threads", "1", "--batches", "2"]
    root = pytestconfig.rootpath
    done = subprocess.run(
        [*command, "--profiles", "npu-qdq-int8", "--rounds", "1", "--limit", "0.01", "--spent"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in ("npu-qdq-int8", "solve_triangular", "copy"):
        assert row in done.stdout
