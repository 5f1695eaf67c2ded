"""Folders that bring code of their own: it is never run, whatever stands on standard input."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qinvert import recall
from qinvert.calibration.data.documents import dataset_documents
from qinvert.calibration.data.tokenizers import find_tokenizer
from qinvert.errors import InputError
from qinvert.pretrained import LOCAL, load_pretrained

pytest.importorskip("transformers")

#: Writes a file as soon as it is imported.
CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
# Classes of their own: transformers marks what it loads so, and would mark the base of all models.
class EvilConfig(PretrainedConfig): pass
class EvilModel(PreTrainedModel): pass
class EvilTokenizer(PreTrainedTokenizer): pass
"""


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "ran"


def folder_with(path, mark, **files):
    path.mkdir()
    (path / "evil.py").write_text(CODE.format(mark=str(mark)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def model_folder(tmp_path, mark):
    mapping = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    return folder_with(tmp_path / "model", mark, config={"model_type": "evil", "auto_map": mapping})


@pytest.fixture
def tokenizer_folder(tmp_path, mark):
    mapping = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    config = {"tokenizer_class": "EvilTokenizer", "auto_map": mapping}
    return folder_with(tmp_path / "tokenizer", mark, tokenizer_config=config)


def run(*arguments, cache):
    """The command line, with yes on its standard input."""
    cache.mkdir()
    return subprocess.run(
        [sys.executable, "-m", "qinvert.cli", *map(str, arguments), "-o", str(cache / "plan.json")],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        env={"HF_HOME": str(cache), "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
        check=False,
    )


def test_a_model_folder_cannot_run_code(model_folder, mark, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    ended = run("calibrate", model_folder, "--data", tmp_path / "text.txt", cache=tmp_path / "cache")
    assert not mark.exists()
    assert ended.returncode == 2, ended.stderr
    assert "custom code" in ended.stderr
    with pytest.raises(InputError, match="custom code"):
        load_pretrained(model_folder)


def test_a_tokenizer_folder_cannot_run_code(tokenizer_folder, mark, tmp_path):
    (tmp_path / "text.txt").write_text("text " * 100)
    options = ["--data", tmp_path / "text.txt", "--tokenizer", tokenizer_folder]
    ended = run("calibrate", recall.NAME, *options, cache=tmp_path / "cache")
    assert not mark.exists()
    assert ended.returncode == 2, ended.stderr
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        find_tokenizer(None, tokenizer_folder)


def test_the_code_would_run_if_it_were_trusted(model_folder, tokenizer_folder, mark, tmp_path, monkeypatch):
    import transformers
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for auto, folder in (("AutoConfig", model_folder), ("AutoTokenizer", tokenizer_folder)):
        mark.unlink(missing_ok=True)
        try:
            getattr(transformers, auto).from_pretrained(str(folder), trust_remote_code=True)
        except Exception as error:  # what the classes do then is of no interest
            print(error)
        assert mark.exists(), auto


#: Attention that transformers takes from the hub where a package for it is installed.
KERNELS = ("somebody/kernel", "kernels-community/flash-attn2", {"": "somebody/kernel"})


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_model_folder_cannot_name_a_kernel_to_download(kernel, tmp_path, monkeypatch):
    import transformers
    from transformers.integrations import hub_kernels

    asked = []

    def get_kernel(name, **_):
        asked.append(name)
        raise ValueError("is downloaded")

    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    for module in (hub_kernels, transformers.modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    recall.load_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attn_implementation": kernel}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert not asked
    # What would happen otherwise.
    with pytest.raises(ValueError, match="is downloaded"):
        transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), **LOCAL)
    assert asked


def test_weights_that_are_pickles_are_never_loaded(tmp_path, mark):
    class Evil:
        def __reduce__(self):
            return mark.write_text, ("ran",)

    recall.load_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="cannot load the model"):
        load_pretrained(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("known", [True, False])
def test_scripts_of_datasets_are_refused_where_a_version_would_run_them(known, monkeypatch):
    given = {}

    def load_2(path, name, split, streaming, trust_remote_code=None):
        given.update(trust_remote_code=trust_remote_code)
        return []

    def load_4(path, name, split, streaming, **config):
        given.update(config)
        return []

    module = SimpleNamespace(load_dataset=load_2 if known else load_4)
    monkeypatch.setitem(sys.modules, "datasets", module)
    list(dataset_documents("name", "train", None))
    assert given == ({"trust_remote_code": False} if known else {})
