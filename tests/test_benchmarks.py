import os
import subprocess
import sys


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
