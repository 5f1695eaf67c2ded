import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qinvert
from qinvert import recall
from qinvert.calibration.data.processes import Shard
from qinvert.calibration.observation.statistics import LayerObserver, merged
from qinvert.cli.app import cli
from qinvert.methods import block_merge, neumann
from qinvert.stress import stress_matrices
from qinvert.systems import Systems

PROGRAMS = (block_merge(8, base=2), block_merge(8, base=2, corrections=1), neumann(8, 3))
CAPACITY = 5


def assert_same_state(found, expected):
    assert (found.matrices, found.observed) == (expected.matrices, expected.observed)
    assert found.largest == expected.largest
    assert list(found.ranges) == list(expected.ranges)
    assert torch.equal(found.keys, expected.keys)
    assert len(found.sample) == len(expected.sample)
    assert all(map(torch.equal, found.sample, expected.sample))


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    processes=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_shared_matrices_end_in_the_state_of_one_observer(counts, processes, seed):
    batches = [stress_matrices("correlated_keys", n, 8, seed=i) * (i + 1) for i, n in enumerate(counts)]
    whole = LayerObserver(PROGRAMS, CAPACITY, seed)
    parts = [LayerObserver(PROGRAMS, CAPACITY, seed) for _ in range(processes)]
    for i, batch in enumerate(batches):
        whole.update(Systems(lower=batch))
        for rank, part in enumerate(parts):
            if i % processes == rank:
                part.update(Systems(lower=batch))
            else:
                part.skip(len(batch))
    found = merged([part.state() for part in parts], CAPACITY)
    assert_same_state(found, whole.state())
    fresh = LayerObserver(PROGRAMS, CAPACITY, seed)
    fresh.restore(found)
    # What is drawn from here on is the same, too.
    for observer in (whole, fresh):
        observer.update(Systems(lower=batches[0]))
    assert_same_state(fresh.state(), whole.state())


def test_another_seed_or_a_lost_batch_ends_in_another_state():
    batches = [stress_matrices("correlated_keys", 40, 8, seed=i) for i in range(3)]
    observers = [LayerObserver(PROGRAMS, CAPACITY, seed) for seed in (0, 1, 0)]
    for i, batch in enumerate(batches):
        for observer in observers[:2]:
            observer.update(Systems(lower=batch))
        observers[2].skip(40) if i == 1 else observers[2].update(Systems(lower=batch))
    first, other, lost = (observer.state() for observer in observers)
    assert not torch.equal(first.keys, other.keys)
    assert lost.matrices == first.matrices
    assert lost.observed < first.observed


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_take_every_item_once_in_rounds(size):
    shares = [list(Shard(rank=rank, size=size).slices("abcdefg")) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    taken = [item for turn in zip(*shares, strict=True) for item in turn if item is not None]
    assert taken == list("abcdefg")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def in_two_processes(script, tmp_path):
    """Run a script as torchrun would; return the exit codes and what was printed."""
    file, port = tmp_path / "script.py", str(free_port())
    file.write_text(script)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(file), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=pathlib.Path.cwd(),
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=120)[0] for process in running]
    return [process.returncode for process in running], texts


SETUP = """
import sys
sys.path.insert(0, "")
import torch
import qinvert
from qinvert import recall
from qinvert.calibration.data.processes import joined
from qinvert.stress import stress_matrices
from qinvert.systems import Systems
torch.set_num_threads(1)
FOLDER = sys.argv[1]
"""

CASES = """
def streamed():
    for seed in range(5):
        yield {"b" if seed % 2 else "a": stress_matrices("wide_gates", 40, 16, seed).reshape(4, 2, 5, 16, 16)}

def cases():
    yield "streamed", lambda: qinvert.calibrate(streamed(), granularity="head")
    yield "resumed", lambda: qinvert.calibrate(streamed(), granularity="head")
    yield "one", lambda: qinvert.calibrate({"only": stress_matrices("wide_gates", 80, 16)}, seed=3)
"""


INTERRUPTION = """
def cut():
    for i, item in enumerate(streamed()):
        if i == 4:
            raise RuntimeError("no more")
        yield item

def resumed(rank):
    file = f"{FOLDER}/checkpoint"
    try:
        qinvert.calibrate(cut(), granularity="head", checkpoint=file)
    except RuntimeError:
        pass
    if rank == 0:
        shutil.copy(file, f"{FOLDER}/half")
    return qinvert.calibrate(streamed(), granularity="head", checkpoint=file)
"""

FAILURES = """
def spoiled():
    for seed in range(8):
        lower = stress_matrices("wide_gates", 8, 16, seed)
        # The fourth item is the second process's.
        yield lower * float("nan") if seed == 3 else lower

def sources(rank):
    yield "spoiled", spoiled()
    yield "unequal", [stress_matrices("wide_gates", 8, 16)] * (2 + 4 * rank)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes wrote: plans of all cases, and what they were told about failures."""
    folder = tmp_path_factory.mktemp("shards")
    script = f"""{SETUP}{CASES}{INTERRUPTION}{FAILURES}
import pathlib, shutil
from qinvert.calibration.observation import checkpoint
from qinvert.systems import Systems
# Save at every occasion.
checkpoint.SHARE = 1e9
with joined() as shard:
    assert shard.size == 2
    for name, source in sources(shard.rank):
        try:
            qinvert.calibrate(source)
        except qinvert.InputError as error:
            pathlib.Path(FOLDER, f"{{name}}-{{shard.rank}}.txt").write_text(str(error))
    for name, plan in cases():
        plan = resumed(shard.rank) if name == "resumed" else plan()
        plan.save(f"{{FOLDER}}/{{name}}-{{shard.rank}}.json")
"""
    codes, texts = in_two_processes(script, folder)
    assert codes == [0, 0], texts
    return folder


@pytest.fixture(scope="module")
def space():
    names = {"qinvert": qinvert, "stress_matrices": stress_matrices}
    exec(CASES, names)
    return names


@pytest.mark.parametrize("name", ["streamed", "resumed", "one"])
def test_two_processes_plan_as_one(two_processes, space, name, tmp_path):
    dict(space["cases"]())[name]().save(tmp_path / "plan.json")
    expected = (tmp_path / "plan.json").read_bytes()
    for rank in range(2):
        assert (two_processes / f"{name}-{rank}.json").read_bytes() == expected


def test_one_process_goes_on_from_the_checkpoint_of_two(two_processes, space):
    seen = []
    plan = qinvert.calibrate(
        space["streamed"](),
        granularity="head",
        checkpoint=two_processes / "half",
        progress=lambda *args: seen.append(args),
    )
    assert plan.to_bytes() == (two_processes / "streamed-0.json").read_bytes()
    # Four of five items were in it.
    assert seen == [("a/head_0", 60), ("a/head_1", 60)]


def test_a_failure_in_one_process_ends_the_other(two_processes):
    first, second = ((two_processes / f"spoiled-{rank}.txt").read_text() for rank in range(2))
    assert second.startswith("L of layer 'layer' holds 2048 NaN or Inf values")
    assert first == f"process 1 of 2 failed: {second}"


def test_processes_with_other_data_are_told(two_processes):
    for rank in range(2):
        told = (two_processes / f"unequal-{rank}.txt").read_text()
        assert "pass the same data and options to every process" in told


def test_torchrun_calibrates_a_model_to_the_plan_of_one_process(tmp_path):
    pytest.importorskip("transformers")
    np.savez(tmp_path / "tokens.npz", input_ids=recall.sequences(20, seed=5).numpy())
    arguments = ["calibrate", "recall", "--data", str(tmp_path / "tokens.npz"), "--method", "block_merge"]
    arguments += ["--bits", "8", "--json", "-o"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "qinvert.cli", *arguments, str(tmp_path / "two.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    cli([*arguments, str(tmp_path / "one.json")])
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    # One process prints.
    assert json.loads(done.stdout)["plan"] == str(tmp_path / "two.json")
