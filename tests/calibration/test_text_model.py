"""A trained text model on text that every machine has: the docstrings of the standard library."""

import ast
import random
import sysconfig
from pathlib import Path

import pytest
import torch

import qinvert
from qinvert.pretrained import load_pretrained

MODEL = Path(__file__).parents[3] / "shared" / "models" / "bytes-2m"
SIZE = {"num_samples": 8, "seq_len": 512}

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the trained model is not in the repository")


def docstrings():
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    random.Random(0).shuffle(texts)
    return texts


def no_inverse(lower):
    return torch.eye(lower.shape[-1]).expand_as(lower)


def test_integer_inverses_keep_a_text_model_s_predictions(tmp_path):
    pytest.importorskip("transformers")
    model, texts = load_pretrained(MODEL), docstrings()
    seen, unseen = texts[::2], texts[1::2]
    # Both plans from the statistics of one pass.
    options = {**SIZE, "checkpoint": tmp_path / "statistics.npz"}
    plans = {bits: qinvert.calibrate(model, seen, bits=bits, **options) for bits in (8, 4)}
    found = qinvert.compare(model, {**plans, "T = I": no_inverse}, unseen, **SIZE)
    kl = {name: evaluation.kl for name, evaluation in found.items()}
    assert found[8].loss < 1.3
    assert kl[8] <= 1e-5
    assert kl[4] <= 1e-3
    assert kl["T = I"] >= 10 * kl[4]
