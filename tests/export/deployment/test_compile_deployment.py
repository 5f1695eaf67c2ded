"""Deployed graphs through the compilers of chips: a counting one, and Qualcomm's where it is installed."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from counting_runtimes import counting_runtime, kept_files
from deployments import CACHE
from tiny_models import build, of_layers

import qinvert
from qinvert import ExportError, recall
from qinvert.cli.app import cli
from qinvert.export.deployment.compile_deployment import compile_deployment, planned_chips
from qinvert.export.runtimes import RUNTIMES, CycleEstimate, Execution, Runtime, installed

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")
CHIPS = {"hexagon-v81", "hexagon-v73"}


@pytest.fixture
def counting(monkeypatch):
    """A chip whose compiler says that a graph costs its bytes, but for one operator, and takes 50 us."""

    def compiles(content, feeds, request):
        kept = kept_files(content, request)
        if refused and refused[0] in content:
            raise ExportError("counting refuses the graph: it leaves 1 nodes to the CPU: node_7")
        yield Execution(
            setting="chip",
            outputs=[],
            estimate=CycleEstimate(
                hardware="chip", cycles=len(content), microseconds=50, uncosted=1, source="counted", kept=kept
            ),
        )

    refused = []
    monkeypatch.setitem(RUNTIMES, "counting", counting_runtime(lambda *_: iter(()), compiles))
    return refused


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny deployment, as if it had been planned for the counting chip."""
    copy = shutil.copytree(tiny.folder, tmp_path / "out")
    manifest = json.loads((copy / "manifest.json").read_bytes()) | {"hardware": "chip"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def verify(*arguments):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_both_graphs_are_compiled_and_kept_apart(folder, counting, tmp_path):
    assert planned_chips(folder) == ("chip",)
    prefill, decode = compile_deployment(folder, "chip", keep=tmp_path / "kept")
    assert (prefill.file, prefill.tokens, decode.file, decode.tokens) == (
        "prefill.onnx",
        64,
        "decode.onnx",
        1,
    )
    for graph in (prefill, decode):
        assert graph.estimate.cycles == (folder / graph.file).stat().st_size
        # 50 microseconds of a call; what has no cost is counted, and no reason to refuse.
        assert graph.tokens_per_second == pytest.approx(graph.tokens * 20_000)
        assert (graph.estimate.uncosted, graph.refused) == (1, "")
        file = tmp_path / "kept" / graph.file.removesuffix(".onnx") / "chip.bin"
        assert list(graph.estimate.kept) == [str(file)]
        assert file.read_bytes() == (folder / graph.file).read_bytes()


def test_a_refusal_is_the_graphs_own(folder, counting):
    counting.append((folder / "decode.onnx").read_bytes())
    prefill, decode = compile_deployment(folder, "chip")
    assert prefill.estimate is not None
    assert decode.estimate is decode.tokens_per_second is None
    assert "node_7" in decode.refused


def test_verify_compiles_for_the_chip_of_the_plan(folder, counting, tmp_path):
    shown = verify(folder, "--keep", tmp_path / "kept")
    assert shown.exit_code == 0, shown.output
    for words in ("prefill.onnx", "1,280,000", "20,000", "counted", "with a loader"):
        assert words in shown.output
    assert {
        path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.bin")
    } == {
        "chip/prefill/chip.bin",
        "chip/decode/chip.bin",
    }


def test_verify_names_what_the_chip_does_not_take_and_fails(folder, counting):
    counting.append((folder / "decode.onnx").read_bytes())
    shown = verify(folder)
    assert shown.exit_code == 1
    assert "decode.onnx is not compiled for chip: counting refuses the graph" in shown.output
    assert "node_7" in shown.output
    rows = json.loads(verify(folder, "--json").stdout)["compiled"]
    assert [bool(row["refused"]) for row in rows] == [False, True]


def test_only_chips_with_a_compiler_here_are_compiled_for(tiny, folder, monkeypatch):
    # A plan without a chip, a chip without a compiler, and one whose toolkit is not installed.
    assert planned_chips(tiny.folder) == planned_chips(folder) == ()
    with pytest.raises(ExportError, match="unknown hardware 'chip'"):
        compile_deployment(folder, "chip")
    absent = Runtime(
        name="absent", execute=lambda *_: iter(()), summary="", module="no_such_toolkit", requirement="kit",
        compile=lambda *_: iter(()), hardware={"chip": "Chip"},
    )  # fmt: skip
    monkeypatch.setitem(RUNTIMES, "absent", absent)
    assert planned_chips(folder) == ()
    with pytest.raises(ExportError, match="pip install kit"):
        compile_deployment(folder, "chip")
    refused = verify(folder, "--hardware", "chip")
    assert (refused.exit_code, refused.output.count("\n")) == (2, 1)
    assert "pip install kit" in refused.output


def needed():
    if "qnn" not in installed():
        pytest.skip("qnn is not installed")


@pytest.mark.parametrize("name", ["recall", "attention"])
def test_qualcomms_compiler_takes_whole_models(name, tmp_path):
    needed()
    if name == "recall":
        model, tokens = recall.load_model(), recall.sequences(1)
    else:
        model = build("qwen3_5", **of_layers("linear_attention", "full_attention"))
        tokens = torch.randint(0, 64, (1, 128), generator=torch.Generator().manual_seed(0))
    qinvert.deploy(model, tokens, tmp_path / "out", hardware="hexagon-v81", cache=CACHE)
    for chip in sorted(CHIPS):
        for graph in compile_deployment(tmp_path / "out", chip, keep=tmp_path / chip):
            assert not graph.refused
            assert 1000 < graph.estimate.lower <= graph.estimate.cycles
            assert graph.tokens_per_second > 0
            assert list((tmp_path / chip / graph.file.removesuffix(".onnx")).iterdir())


def test_qualcomms_compiler_names_what_it_leaves_to_the_cpu(tmp_path):
    needed()
    plan = qinvert.calibrate(
        recall.load_model(),
        recall.sequences(1),
        scope="chunk",
        hardware="hexagon-v81",
        target="hexagon-int16",
    )
    qinvert.deploy(recall.load_model(), plan, tmp_path / "out")
    for graph in compile_deployment(tmp_path / "out", "hexagon-v81"):
        assert "nodes to the CPU" in graph.refused
        assert "chain_0/D/exponential/float" in graph.refused
