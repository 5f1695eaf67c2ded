import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qinvert
from qinvert import recall
from qinvert.calibration.model_digest import model_digest
from qinvert.calibration.observation.checkpoint import HEADER, SCHEMA_VERSION, load
from qinvert.errors import InputError
from qinvert.stress import stress_matrices

BATCHES = [stress_matrices("wide_gates", 20, 16, seed=i).reshape(2, 2, 5, 16, 16) for i in range(5)]
OPTIONS = {"method": "block_merge", "bits": 8, "granularity": "head"}


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


def cut(items, count):
    for i, item in enumerate(items):
        if i == count:
            raise Stop
        yield item


def interrupted(path, count, items=BATCHES, **options):
    with pytest.raises(Stop):
        qinvert.calibrate(cut(items, count), checkpoint=path, **OPTIONS | options)


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr("qinvert.calibration.observation.checkpoint.Checkpoint.due", True)


@pytest.fixture(scope="module")
def expected():
    return qinvert.calibrate(BATCHES, **OPTIONS).to_bytes()


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_an_interrupted_calibration_goes_on_to_the_same_plan(tmp_path, expected, count):
    path, seen = tmp_path / "checkpoint", []
    interrupted(path, count) if count < 5 else qinvert.calibrate(BATCHES, checkpoint=path, **OPTIONS)
    assert path.exists() == (count > 0)
    plan = qinvert.calibrate(BATCHES, checkpoint=path, progress=lambda *x: seen.append(x), **OPTIONS)
    assert plan.to_bytes() == expected
    assert len(seen) == 2 * (5 - count)
    # Nothing but the checkpoint is left.
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_it_may_be_interrupted_again_and_again(tmp_path, expected):
    for count in (1, 2, 2, 4):
        interrupted(tmp_path / "c", count)
    assert qinvert.calibrate(BATCHES, checkpoint=tmp_path / "c", **OPTIONS).to_bytes() == expected


def test_other_goals_plan_from_a_finished_checkpoint(tmp_path):
    path, seen = tmp_path / "c", []
    options = {"method": "block_merge", "target": "int-ops"}
    qinvert.calibrate(BATCHES, checkpoint=path, **options)
    wide = qinvert.calibrate(
        BATCHES, bits="8x2", checkpoint=path, progress=lambda *x: seen.append(x), **options
    )
    assert seen == []
    assert wide.to_bytes() == qinvert.calibrate(BATCHES, bits="8x2", **options).to_bytes()
    # Methods offer other programs where a chip's costs are known.
    with pytest.raises(
        InputError, match="other programs; pass the same method, factored, target and hardware"
    ):
        qinvert.calibrate(BATCHES, method="block_merge", target="npu-qdq-int8", checkpoint=path)


def test_beta_is_part_of_the_checkpoint(tmp_path):
    items = [(lower.abs(), lower.new_ones(lower.shape[:-1])) for lower in BATCHES]
    interrupted(tmp_path / "c", 3, items, factored=True)
    plan = qinvert.calibrate(items, checkpoint=tmp_path / "c", factored=True, **OPTIONS)
    assert plan.to_bytes() == qinvert.calibrate(items, factored=True, **OPTIONS).to_bytes()


def test_seen_batches_do_not_go_through_the_model_again(tmp_path):
    pytest.importorskip("transformers")
    model, calls = recall.load_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    batches = [recall.sequences(2, seed)[:, :128] for seed in range(3)]
    options = {"method": "block_merge", "bits": 8}
    with pytest.raises(Stop):
        qinvert.calibrate(model, cut(batches, 2), checkpoint=tmp_path / "c", **options)
    assert len(calls) == 2
    plan = qinvert.calibrate(model, batches, checkpoint=tmp_path / "c", **options)
    assert len(calls) == 3
    assert plan.to_bytes() == qinvert.calibrate(model, batches, **options).to_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": BATCHES[::-1]}, "other data"),
        ({"data": BATCHES[:2]}, "other data"),
        ({"data": [x.double() for x in BATCHES]}, "other data"),
        ({"data": [{"layer": x} for x in BATCHES[1:]]}, "other data"),
        ({"seed": 1}, r"made with seed=0, granularity=head, not seed=1"),
        ({"granularity": "tensor"}, "same model and options"),
        ({"method": "neumann"}, "other programs"),
        ({"method": qinvert.block_merge(16, 4)}, "other programs"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_other_data_and_options_are_refused(tmp_path, change, match):
    path = tmp_path / "c"
    interrupted(path, 3)
    before = path.read_bytes()
    arguments = {"data": BATCHES, **OPTIONS} | change
    with pytest.raises(InputError, match=match):
        qinvert.calibrate(arguments.pop("data"), checkpoint=path, **arguments)
    assert path.read_bytes() == before


def rewritten(path, change):
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(arrays[HEADER].tobytes())
    change(SimpleNamespace(header=header, arrays=arrays))
    arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


DAMAGE = {
    "newer": lambda file: file.header.update(schema_version=SCHEMA_VERSION + 1),
    "no layers": lambda file: file.header.pop("layers"),
    "layers of another kind": lambda file: file.header.update(layers=3),
    "no sample": lambda file: file.arrays.pop("0.lower"),
    "another size": lambda file: file.header["layers"][0].update(chunk=32),
    "short keys": lambda file: file.arrays.update({"0.keys": file.arrays["0.keys"][:-1]}),
    "not triangular": lambda file: file.arrays.update({"0.lower": file.arrays["0.lower"] + 1}),
    "negative range": lambda file: file.header["layers"][0]["largest"].update(M=-1.0),
    "nan range": lambda file: file.header["layers"][0]["ranges"][0].update(M=float("nan")),
    "lost range": lambda file: file.header["layers"][0]["ranges"][0].popitem(),
    "negative": lambda file: file.header["layers"][0].update(matrices=-1),
    "no items": lambda file: file.header.update(items=0),
    "keys beyond 1": lambda file: file.arrays.update({"0.keys": file.arrays["0.keys"] + 1}),
    "short heads": lambda file: file.arrays.update({"0.held_heads": file.arrays["0.held_heads"][:-1]}),
    "held out, not triangular": lambda file: file.arrays.update(
        {"0.held_lower": file.arrays["0.held_lower"] + 1}
    ),
    "one half": lambda file: file.header["layers"][0].update(halves=[1.0]),
    "text": lambda file: file.header["layers"][0].update(matrices="many"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = tmp_path / "c"
    interrupted(path, 2)
    rewritten(path, DAMAGE[damage])
    with pytest.raises(InputError, match="checkpoint"):
        qinvert.calibrate(BATCHES, checkpoint=path, **OPTIONS)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_other_files_are_no_checkpoints(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(InputError, match=r"is not a checkpoint: .*delete it to start anew"):
        qinvert.calibrate(BATCHES, checkpoint=tmp_path / "c", **OPTIONS)
    assert (tmp_path / "c").read_bytes() == content


def test_a_checkpoint_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        qinvert.calibrate(BATCHES, checkpoint=tmp_path / "nowhere" / "c", **OPTIONS)


SCRIPT = """
import signal, sys, time
# A process started in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, "")
import qinvert
from qinvert.stress import stress_matrices

def slow():
    for i in range(5):
        if i == 3:
            print("waiting", flush=True)
            time.sleep(60)
        yield stress_matrices("wide_gates", 20, 16, seed=i).reshape(2, 2, 5, 16, 16)

try:
    plan = qinvert.calibrate(slow(), method="block_merge", bits=8, granularity="head", checkpoint=sys.argv[1])
    plan.save(sys.argv[2])
except KeyboardInterrupt:
    sys.exit(2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_a_whole_checkpoint_and_no_plan(tmp_path, expected, how):
    script, path = tmp_path / "script.py", tmp_path / "c"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(path), str(tmp_path / "plan.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pathlib.Path.cwd()) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(how)
        assert process.wait(30) == (2 if how == signal.SIGINT else -how)
    assert sorted(os.listdir(tmp_path)) == ["c", "script.py"]
    # The first save is at once, the later ones take a small share of the time.
    assert 1 <= load(path).items <= 3
    assert qinvert.calibrate(BATCHES, checkpoint=path, **OPTIONS).to_bytes() == expected


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.undo()
    writes = []
    monkeypatch.setattr(
        "qinvert.calibration.observation.checkpoint.save", lambda *_: writes.append(time.sleep(0.02))
    )
    qinvert.calibrate(BATCHES * 2, checkpoint=tmp_path / "c", **OPTIONS)
    # At once and at the end; one more where the ten batches took long.
    assert 2 <= len(writes) <= 4


def test_all_kinds_of_batches_are_recognized(tmp_path):
    pytest.importorskip("transformers")
    model = recall.load_model()
    tokens = recall.sequences(2, 0)[:, :64]
    mask = torch.ones_like(tokens)
    for i, (first, other) in enumerate(
        [
            (
                {"input_ids": tokens, "attention_mask": mask},
                {"input_ids": tokens, "attention_mask": mask * 0},
            ),
            ({"input_ids": tokens, "use_cache": False}, {"input_ids": tokens, "use_cache": True}),
            (tokens, tokens.flip(0)),
        ]
    ):
        path = tmp_path / str(i)
        options = {"method": "block_merge", "bits": 8, "checkpoint": path}
        plan = qinvert.calibrate(model, [first], **options)
        assert qinvert.calibrate(model, [first], **options).to_bytes() == plan.to_bytes()
        with pytest.raises(InputError, match="other data"):
            qinvert.calibrate(model, [other], **options)


def halved(model):
    return model.to(torch.bfloat16)


def nudged(model):
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[1].add_(1e-3)
    return model


def swapped(model):
    weight = max(model.parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    return model


@pytest.mark.parametrize("change", [halved, nudged, swapped])
def test_another_model_is_refused(tmp_path, change):
    pytest.importorskip("transformers")
    data, path, options = recall.sequences(2)[:, :64], tmp_path / "c", {"method": "block_merge", "bits": 8}
    expected = qinvert.calibrate(recall.load_model(), data, checkpoint=path, **options)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"model=\w+ \w{16}, not .* pass the same model and options"):
        qinvert.calibrate(change(recall.load_model()), data, checkpoint=path, **options)
    assert path.read_bytes() == before
    again = qinvert.calibrate(recall.load_model(), data, checkpoint=path, **options)
    assert again.to_bytes() == expected.to_bytes()


def offloaded(model):
    """The model as accelerate leaves it: meta tensors, and hooks that know where the values are."""
    for module in list(model.modules()):
        kept = {name: x.detach() for name, x in module.named_parameters(recurse=False)}
        kept |= dict(module.named_buffers(recurse=False))
        module._hf_hook = SimpleNamespace(weights_map=kept)
    return model.to("meta")


def test_weights_that_are_elsewhere_are_compared_all_the_same():
    def built(fill):
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).apply(
            lambda module: [x.data.fill_(fill) for x in module.parameters()]
        )

    expected = model_digest(built(0.5))
    assert model_digest(offloaded(built(0.5))) == expected
    assert model_digest(offloaded(built(0.25))) != expected
    # Without a hook nobody knows the values.
    assert model_digest(built(0.5).to("meta")) == model_digest(built(0.25).to("meta")) != expected


def test_a_digest_depends_on_the_bits_alone():
    model = torch.nn.Linear(300, 200).to(torch.bfloat16)
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("empty", torch.empty(0))
    expected = model_digest(model)
    model.weight.data = model.weight.data.T.contiguous().T
    assert model_digest(model) == expected
    model.weight.data[7, 7] += 1
    assert model_digest(model) != expected
    assert model_digest(model.to("meta")).startswith("Linear ")
