import os
import subprocess
import sys

import pytest

EXAMPLES = {
    "calibrate_and_export.py": (["--output", "inverse.onnx"], "onnxruntime (optimized) == simulator"),
    "calibrate_text_model.py": (["--num-samples", "2", "--seq-len", "192"], "wrote plan.json"),
    "compare_methods.py": (["--count", "4", "--chunk", "16"], "correlated_keys"),
    "export_and_run.py": ([], "simulator: 0 of 32768"),
    "patch_and_generate.py": ([], "integer 1.0000"),
    "train_recall.py": (["--steps", "3", "--batch", "2", "--pairs", "32"], "wrote recall-model"),
}


def test_every_example_is_listed(pytestconfig):
    assert {p.name for p in (pytestconfig.rootpath / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, pytestconfig, tmp_path):
    arguments, expected = EXAMPLES[name]
    result = subprocess.run(
        [sys.executable, pytestconfig.rootpath / "examples" / name, *arguments],
        cwd=tmp_path,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert expected in result.stdout
