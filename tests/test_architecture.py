"""The rules of CONTRIBUTING.md about which module may do what, read from the syntax trees of all modules.

How many files a method, profile, lowering and runtime take is shown where
each is added as one file: tests/methods/test_discovery.py,
tests/export/test_profile_discovery.py, tests/export/lowering/test_discovery.py,
tests/export/runtimes/test_toy_runtime.py.
"""

import ast
import builtins
import re
from statistics import median, quantiles

import pytest
from import_graph import FUNCTIONS, Package, cycles, shown, upward_imports

#: Rooms from the bottom to the top.  A room may import rooms of lower levels; those of one level do not
#: import each other.  A room is a module or a package with all below it that is in no narrower room.
#: Programs and plans are data at the bottom; what runs them stands above them.  `Program` and `Plan` are
#: those data with methods that run them, so that each stands above what it calls.
ROOMS = (
    (
        "assets",
        "cautions",
        "documents",
        "html_table",
        "errors",
        "model_options",
        "progress",
        "temporaries",
        "version",
    ),
    ("checks", "discovery", "files", "formats", "strict_json"),
    ("numerics", "pretrained", "program"),
    ("matrices", "plan", "recall"),
    ("chunk_step", "profiles", "systems"),
    ("delta_rule", "hardware"),
    ("execution",),
    ("metrics", "program.program", "proof", "stress"),
    ("methods", "program.scale_groups", "program.serialization", "program.transposition"),
    ("chunk_step._key_path", "chunk_step.window", "kernels", "plan.serialization"),
    ("chunk_step._value_path",),
    ("chunk_step.gated_delta_step",),
    ("simulation", "chunk_step.single_token"),
    ("plan.plan",),
    ("calibration.head_names",),
    (
        "calibration.__init__",
        "calibration.choices",
        "calibration.head_errors",
        "calibration.heads",
        "calibration.wrappers",
    ),
    ("calibration.plan_warnings",),
    ("calibration.model_digest",),
    ("calibration.model_identity",),
    ("calibration.chunk_steps",),
    ("calibration.running",),
    ("calibration.patching",),
    ("calibration.data",),
    ("calibration.capture", "calibration.evaluate"),
    ("calibration.sources",),
    ("calibration.observation",),
    ("calibration.growth", "calibration.planning"),
    ("calibration.output_goals",),
    ("calibration.grid_options",),
    ("calibration.inverse_planning",),
    ("calibration.head_splits",),
    ("calibration.chunk_steps.observation",),
    ("calibration.chunk_steps.one_pass", "calibration.chunk_steps.grids"),
    ("calibration.chunk_steps.candidate",),
    ("calibration.chunk_steps.planner", "calibration.chunk_steps.simulate_steps"),
    ("calibration.chunk_steps.calibrate_steps",),
    ("calibration.calibrate", "calibration.simulate"),
    (
        "calibration.figures_of_merit",
        "calibration.matrix_sample",
        "calibration.survey",
        "calibration.tensor_errors",
        "calibration.width_survey",
    ),
    ("plot",),
    ("report_page",),
    ("export.light_models", "export.open_shapes"),
    ("export.graph", "export.options", "export.reading", "export.runtimes"),
    ("export.interface",),
    ("export.lowering", "export.rules", "export.step_interface"),
    ("export.encodings", "export.layer_graph", "export.metadata", "export.step_ends", "export.step_reading"),
    ("export.step_graph",),
    ("export.step_heads",),
    ("export.exporting",),
    ("export.__init__", "export.compiled_cost", "export.functions"),
    ("export.verification",),
    ("export.whole_models",),
    ("export.deployment",),
    ("export.quantizer",),
    ("cli",),
)

#: Modules that open, look for, read or write files by themselves, and why.
TOUCHES_PATHS = {
    "qinvert.files": "writes all results, atomically, and reads files whole",
    "qinvert.temporaries": "makes files that will be renamed, and deletes what killed processes left",
    "qinvert.pretrained": "lets transformers load a folder",
    "qinvert.recall": "knows the folder of the embedded model",
    "qinvert.export.deployment.deploy": "writes the files of a folder that takes its place as a whole",
    "qinvert.export.deployment.weights": "writes a graph that also returns activations, for onnxruntime",
    "qinvert.export.deployment.quantized_products": "reads the graphs of a folder",
    "qinvert.export.deployment.compile_deployment": "reads the graphs of a folder",
    "qinvert.export.open_shapes": "has onnx check a copy beside the weights",
    "qinvert.calibration.data.arrays": "reads .npz and .safetensors, array by array",
    "qinvert.calibration.data.documents": "reads text files line by line, and data sets",
    "qinvert.calibration.data.token_batches": "tells a file from the name of a data set",
    "qinvert.calibration.data.tokenizers": "finds and loads a tokenizer's folder",
    "qinvert.calibration.observation.checkpoint": "asks whether there is a checkpoint; makes its bytes",
    "qinvert.export.runtimes.onnxruntime_cpu": "reads the graph that onnxruntime has optimized",
    "qinvert.export.runtimes.subprocesses": "hands files to a runtime's own process and reads its answer",
    "qinvert.export.runtimes.programs.iree_program": "runs in a process of its own on files",
    "qinvert.export.runtimes.programs.protocol": "runs in a process of its own on files",
    "qinvert.export.runtimes.programs.qnn_program": "runs in a process of its own on files",
    "qinvert.export.runtimes.programs.rknn_program": "runs in a process of its own on files",
    "qinvert.export.runtimes.programs.tvm_program": "runs in a process of its own on files",
    "qinvert.export.runtimes.programs.vela_program": "runs in a process of its own on files",
    "qinvert.export.whole_models.check": "writes a graph beside its weights, for onnxruntime, and removes it",
    "qinvert.export.whole_models.export_model": "writes weights beside a graph, then renames all into place",
    "qinvert.export.whole_models.linear_attention_nodes": "reads a graph whose weights are in other files",
}
FILE_METHODS = (
    "chmod|exists|glob|is_dir|is_file|iterdir|mkdir|open|read_bytes|read_text|rename|rglob|rmdir|stat|touch"
    "|unlink|write_bytes|write_text"
)
PATHS = re.compile(
    rf"open|\*\.({FILE_METHODS})|.*\.from_pretrained|datasets\.load_dataset"
    r"|(tempfile|zipfile|shutil|pathlib\.Path|importlib\.resources)\..*"
    r"|(numpy|torch|onnx|onnx_ir|safetensors)\.(.*\.)?(load|save|memmap|fromfile)(?!_from_string|_model_from).*"
    r"|os\.(chmod|fdopen|link|listdir|makedirs|mkdir|open|remove|rename|replace|rmdir|scandir|unlink)"
)

#: Modules that round, and why.
ROUNDS = {
    "qinvert.numerics.rounding": "the roundings of ONNX, on tensors",
    "qinvert.numerics.scalar": "the same, on Python numbers",
    "qinvert.numerics.hexagon": "the roundings of a processor that differ from those of ONNX",
    "qinvert.numerics.tflite": "the roundings of kernels that differ from those of ONNX",
    "qinvert.numerics.exact": "splits integers into planes, which loses nothing",
    "qinvert.kernels.division": "counts how many steps of a division round as the division does",
    "qinvert.plan.quantization": "finds the integer that is exactly 1.0, if there is one",
    "qinvert.proof.interval_arithmetic": "widens the bounds of a division to integers",
    "qinvert.calibration.capture": "turns a share of the chunks into their number",
    "qinvert.calibration.chunk_steps.candidate": "shows six digits of decibels, and whole costs",
    "qinvert.calibration.chunk_steps.planner": "gives a goal that the best candidate reaches",
    "qinvert.calibration.chunk_steps.grids": "chooses the nearest power of two of a channel",
    "qinvert.calibration.planning.clipping": "finds the place of a percentile",
    "qinvert.calibration.planning.explanation": "shows four digits of a share",
    "qinvert.calibration.planning.scales": "chooses a scale: a power of two, or one over an odd integer",
    "qinvert.calibration.planning.variants": "models the noise of a rounding, for an estimate",
    "qinvert.export.runtimes.programs.tflite_writer": "finds the integer at which ONNX cuts a value",
    "qinvert.export.rules.product_bounds": "bounds what a QuantizeLinear of any graph may write",
}
ROUNDING = re.compile(r"round|.*\.(around|ceil_?|fix|floor_?|rint|round_?|trunc_?)")

PRINTS = re.compile(r"print|(pprint|rich|click)\..*|sys\.__?std(out|err).*|sys\.std(out|err)(?!\.flush).*")

#: Modules that load no torch, with all that they import at once.
LIGHT = re.compile(
    r"qinvert\.(program|plan|methods|chunk_step|profiles|hardware)\b.*|qinvert\.cli(\.(__main__|app|verbs|profiles))?"
)

#: Modules that raise other errors than those of qinvert.errors, and why.
OTHER_ERRORS = {
    "qinvert": "AttributeError is what Python expects of a missing name",
    "qinvert.export": "the same; ImportError where the folder is imported under another name",
    "qinvert.calibration": "ImportError where the folder is imported under another name",
    "qinvert.files": "caught in the same file, which makes one error of it",
    "qinvert.matrices": "caught in the same function, which makes one error of it",
    "qinvert.strict_json": "caught in the same file, which makes one error of it",
    "qinvert.calibration.observation.statistics": "no caller can cause it",
    "qinvert.export.runtimes.programs.iree_program": "ends a process of its own",
    "qinvert.export.runtimes.programs.quantized_graph": "ends a process of its own",
    "qinvert.export.runtimes.programs.qnn_program": "ends a process of its own",
    "qinvert.export.runtimes.programs.rknn_program": "ends a process of its own",
    "qinvert.export.runtimes.programs.vela_program": "ends a process of its own",
}

#: Modules that define an interpreter of their own; others are made from one of these.
INTERPRETERS = {
    "qinvert.program.sparsity",
    "qinvert.execution.tensors",
    "qinvert.hardware._operators",
    "qinvert.kernels.tile_evaluator",
    "qinvert.export.lowering.base",
}

OLD_NAMES = re.compile(r"\bINPUT\b|program\.vectors\b|implicit_identity")
#: Files of the first schema have such keys.
OLD_FILES = {"qinvert/program/serialization.py", "tests/plan/test_serialization.py"}

MAX_LINES, MAX_MEDIAN, MAX_90TH_PERCENTILE = 400, 10, 40


@pytest.fixture(scope="module")
def root(pytestconfig):
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def package(root):
    return Package({
        "qinvert": root / "qinvert",
        "qinvert.calibration": root / "calibration",
        "qinvert.export": root / "export",
    })  # fmt: skip


@pytest.fixture
def toy(tmp_path):
    """Return a function that writes a package ``toy`` of the given modules, by path, and reads it."""

    def write(**sources):
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path.joinpath(*name.split("/")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        return Package({"toy": tmp_path})

    return write


def lines_of(faults):
    return "\n" + "\n".join(faults)


def users(package, pattern):
    """Names that match, with their lines, by the modules that use them."""
    found = {
        module: [f"{name}, line {line}" for name, line in used if pattern.fullmatch(name)]
        for module, used in package.names.items()
    }
    return {module: used for module, used in found.items() if used}


# Which files are read.


def test_every_file_is_read_once(package, root):
    folders = ("qinvert", "calibration", "export")
    files = {path.resolve() for folder in folders for path in (root / folder).rglob("*.py")}
    assert sorted(module.path for module in package.modules.values()) == sorted(files)
    depths = {name.count(".") for name in package.modules}
    assert depths == {0, 1, 2, 3, 4}


# Cycles.


def without_front_door(package):
    # The names of qinvert/__init__.py load on first use, for users; no module of the package imports it.
    arrows = [arrow for arrow in package.imports if "qinvert" not in (arrow.importer, arrow.imported)]
    assert len(arrows) > 500
    return arrows


def test_no_module_imports_the_names_of_the_whole_package(package):
    assert [arrow for arrow in package.imports if arrow.imported == "qinvert"] == []


def test_there_is_no_import_cycle(package):
    found = cycles(without_front_door(package))
    assert not found, lines_of(found)


DEFERRED = "def late():\n    {}\n"
CHECKED = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {}\n"
DISCOVERS = "from pkgutil import iter_modules\n\ndef discover():\n    return [*iter_modules(__path__)]\n"
NAMED = """
from importlib import import_module
NAMES = ("b-c",)
def load(name):
    import_module(f"toy.{name}")
"""


@pytest.mark.parametrize(
    ("sources", "cycle"),
    [
        ({"a": "import toy.b", "b": "from toy import a"}, "toy.a:1 -> toy.b:1 -> toy.a"),
        ({"a": "from . import b", "b": "from .a import f"}, "toy.a:1 -> toy.b:1 -> toy.a"),
        ({"a": "import toy.b", "b": DEFERRED.format("import toy.a")}, "toy.a:1 -> toy.b:2 -> toy.a"),
        ({"a": "import toy.b", "b": CHECKED.format("import toy.a")}, "toy.a:1 -> toy.b:4 -> toy.a"),
        (
            {"a": "import toy.b", "b": "from importlib import import_module\n\nimport_module('toy.a')"},
            "toy.a:1 -> toy.b:3 -> toy.a",
        ),
        ({"a": NAMED, "b_c": "from toy.a import load"}, "toy.a:5 -> toy.b_c:1 -> toy.a"),
        (
            {"a": "import toy.b", "b": "import toy.c", "c": DEFERRED.format("from toy import a")},
            "toy.a:1 -> toy.b:1 -> toy.c:2 -> toy.a",
        ),
        # Through the __init__ of a package, of which the modules take nothing by name.
        (
            {"a": "import toy.s.b", "s/__init__": "import toy.s.c", "s/b": "", "s/c": "import toy.a"},
            "toy.a:1 -> toy.s:1 -> toy.s.c:1 -> toy.a",
        ),
        # A package that discovers its modules, one of which takes a name of the package.
        (
            {"inner/__init__": DISCOVERS, "inner/a": "from toy.inner import discover"},
            "toy.inner:4 -> toy.inner.a:1 -> toy.inner",
        ),
    ],
)  # fmt: skip
def test_a_cycle_is_found_and_shown_as_a_path(toy, sources, cycle):
    assert cycles(toy(**sources).imports) == [cycle]


def test_every_tangle_gives_one_cycle_and_other_imports_none(toy):
    tangles = {"a": "import toy.b, toy.d", "b": "import toy.a", "c": "import toy.d", "d": "import toy.c"}
    shared = {"inner/__init__": "from toy.inner.e import x", "inner/e": "import toy.inner.f", "inner/f": ""}
    found = cycles(toy(**tangles, **shared).imports)
    assert found == ["toy.a:1 -> toy.b:1 -> toy.a", "toy.c:1 -> toy.d:1 -> toy.c"]


# Layers.


def test_no_room_imports_a_higher_one(package):
    faults = upward_imports(package, ROOMS, "qinvert")
    assert not faults, lines_of(faults)


def test_every_room_exists_and_the_layers_are_in_order(package):
    rooms = [room for level in ROOMS for room in level]
    modules = {*package.modules} | {f"{m.name}.__init__" for m in package.modules.values() if m.is_package}
    assert {f"qinvert.{room}" for room in rooms} <= modules
    assert len(set(rooms)) == len(rooms)
    layers = [room.partition(".")[0] for room in rooms]
    upper = ("calibration", "plot", "report_page", "export", "cli")
    order = [layer if layer in upper else "qinvert" for layer in layers]
    assert order == sorted(order, key=("qinvert", *upper).index)


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"low/deep/a": "import toy.high"}, r"low/deep/a\.py:1: toy\.low imports toy\.high of toy\.high"),
        ({"low/a": DEFERRED.format("from toy.high import f")}, r"low/a\.py:2: toy\.low imports toy\.high"),
        ({"low/a": CHECKED.format("from ..high import f")}, r"low/a\.py:4: toy\.low imports toy\.high"),
        (
            {"low/a": "import toy.beside.b", "beside/b": ""},
            r"low/a\.py:1: toy\.low imports toy\.beside\.b of",
        ),
        ({"low/a": "import toy.low.top"}, r"low/a\.py:1: toy\.low imports toy\.low\.top of toy\.low\.top"),
    ],
)
def test_an_upward_import_is_named_with_file_line_and_rooms(toy, sources, fault):
    good = {"high": "import toy.low.top, toy.low.c", "low/top": "import toy.low.c", "low/c": ""}
    rooms = (("low", "beside"), ("low.top",), ("high",))
    assert upward_imports(toy(**good), rooms, "toy") == []
    (found,) = upward_imports(toy(**good, **sources), rooms, "toy")
    assert re.search(fault, found)


def test_a_module_without_a_room_is_named(toy):
    with pytest.raises(KeyError, match=r"toy\.new has no room; give it a place"):
        upward_imports(toy(low="", new="import toy.low"), (("low",),), "toy")


# What loads with what.


def heavy(package, pattern, roots):
    """The way by which each module of that pattern loads one of the outside packages."""
    modules = [name for name in package.modules if pattern.fullmatch(name)]
    ways = [package.loaded(name) for name in modules]
    return [shown(found[root]) for found in ways for root in roots if root in found]


def test_programs_plans_methods_profiles_and_help_load_no_torch(package):
    assert sum(bool(LIGHT.fullmatch(name)) for name in package.modules) > 40
    found = heavy(package, LIGHT, ("torch", "onnx", "onnxruntime", "transformers", "scipy"))
    assert not found, lines_of(found)


def test_programs_import_numpy_for_sparsity_alone_and_torch_nowhere(package):
    real = [arrow for arrow in package.outside if not arrow.unreal]
    found = {
        (arrow.importer, arrow.imported) for arrow in real if arrow.importer.startswith("qinvert.program")
    }
    assert {pair for pair in found if pair[1] in ("torch", "numpy", "onnx")} == {
        ("qinvert.program.sparsity", "numpy")
    }


@pytest.mark.parametrize(
    ("sources", "way"),
    [
        ({"a": "import torch.nn"}, "toy.a:1 -> torch"),
        ({"a": "import toy.b", "b": "from torch import nn"}, "toy.a:1 -> toy.b:1 -> torch"),
        ({"a": "import toy.s.b", "s/__init__": "import torch", "s/b": ""}, "toy.a:1 -> toy.s:1 -> torch"),
        ({"__init__": "import torch", "a": ""}, "toy:1 -> torch"),
        ({"a": "def f():\n    import torch\n\nf()"}, "toy.a:2 -> torch"),
        ({"a": DEFERRED.format("import torch")}, None),
        ({"a": CHECKED.format("import torch")}, None),
    ],
)  # fmt: skip
def test_what_is_loaded_at_once_is_found(toy, sources, way):
    assert heavy(toy(**sources), re.compile(r"toy\.a"), ["torch"]) == ([way] if way else [])


# Who prints, touches paths and rounds.


def test_only_the_command_line_prints(package):
    found = users(package, PRINTS)
    assert {name for name in found if not re.match(r"qinvert\.cli\b", name)} == set()
    assert {"qinvert.cli", "qinvert.cli.output"} <= found.keys()


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "from rich.console import Console\nConsole()",
        "import sys\nsys.stdout.write('x')",
        "from sys import stderr as e\ndef f():\n    e.write('x')",
        "import click\nclick.echo('x')",
    ],
)
def test_what_prints_is_found(toy, source):
    assert users(toy(a=source, b="import sys\nsys.stdout.flush()\nfingerprint()"), PRINTS).keys() == {"toy.a"}


def test_who_touches_paths_is_listed_with_a_reason(package):
    found = users(package, PATHS)
    found = {name: used for name, used in found.items() if not name.startswith("qinvert.cli.")}
    assert found.keys() == TOUCHES_PATHS.keys(), found


@pytest.mark.parametrize(
    "source",
    [
        "open('f')",
        "from pathlib import Path\nPath('f').read_bytes()",
        "def f(path):\n    path.with_suffix('.b').unlink()",
        "import os\nos.replace('a', 'b')",
        "from tempfile import TemporaryDirectory as T\nT()",
        "import numpy as np\nnp.load('f')",
        "import numpy as np\nnp.savez_compressed('f')",
        "import onnx\nonnx.save(1, 'f')",
        "def f(path):\n    from safetensors.torch import load_file\n    load_file(path)",
        "import zipfile\nzipfile.ZipFile('f')",
    ],
)
def test_what_touches_paths_is_found(toy, source):
    harmless = (
        "import onnx, os\nfrom toy.a import read_bytes\nread_bytes(os.fspath(1))\n'a'.replace('a', 'b')\n"
    )
    harmless += "onnx.load_model_from_string(b'')\nonnx.load_from_string(b'')\nos.environ.get('A')\n"
    assert users(toy(a=source, b=harmless), PATHS).keys() == {"toy.a"}


def test_who_rounds_is_listed_with_a_reason(package):
    found = users(package, ROUNDING)
    assert found.keys() == ROUNDS.keys(), found
    # Of a rounding to the nearest on tensors there is one place; the others estimate or count.
    nearest = {n for n, used in found.items() if re.search(r"(\.round_?|rint|around),", " ".join(used))}
    assert nearest == {
        "qinvert.numerics.rounding",
        "qinvert.kernels.division",
        "qinvert.calibration.planning.variants",
    }


@pytest.mark.parametrize(
    "source",
    [
        "round(0.5)",
        "def f(x):\n    return x.round_()",
        "def f(x):\n    return (x / 2).floor()",
        "import torch\nf = torch.round",
        "import numpy as np\nnp.rint(0.5)",
        "from math import ceil as up\nup(0.5)",
    ],
)
def test_what_rounds_is_found(toy, source):
    harmless = "from toy.numerics import rounding\nrounding.quantize(1)\nfloor = 2.0\nprint(floor, x.floor)"
    assert users(toy(a=source, b=harmless), ROUNDING).keys() == {"toy.a"}


def without_twin(tree, *others):
    """Public functions of a module of roundings that no function ``<name>_scalar`` stands beside."""
    defined = {node.name for each in (tree, *others) for node in each.body if isinstance(node, FUNCTIONS)}
    public = {node.name for node in tree.body if isinstance(node, FUNCTIONS) and node.name[0] != "_"}
    return {name for name in public if not name.endswith("_scalar") and f"{name}_scalar" not in defined}


def test_every_rounding_has_a_scalar_twin(package):
    trees = {name: module.tree for name, module in package.modules.items()}
    scalar = trees["qinvert.numerics.scalar"]
    assert without_twin(trees["qinvert.numerics.rounding"], scalar) == set()
    # `cut_bits`, `factor_of` and `adds` work on numbers already.
    assert without_twin(trees["qinvert.numerics.hexagon"]) == {"cut_bits", "factor_of"}
    assert without_twin(trees["qinvert.numerics.tflite"]) == {"adds", "factor_of"}
    assert without_twin(ast.parse("def f(): ...\ndef g(): ...\ndef g_scalar(): ..."), scalar) == {"f"}


# Errors and interpreters.


def with_other_errors(package):
    """Modules that raise an exception of Python's own."""

    def raised(node):
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return getattr(builtins, getattr(error, "id", ""), None)

    return {
        module.name
        for module in package.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Raise) and raised(node)
    }


def test_who_raises_other_errors_is_listed_with_a_reason(package):
    assert with_other_errors(package) == OTHER_ERRORS.keys()


@pytest.mark.parametrize("error", ["ValueError('x')", "KeyError", "TypeError() from None"])
def test_another_error_is_found(toy, error):
    harmless = (
        "from toy.errors import PlanError\ntry:\n    f()\nexcept ValueError:\n    raise\nraise PlanError('x')"
    )
    assert with_other_errors(toy(a=f"raise {error}", b=harmless)) == {"toy.a"}


def interpreters(package):
    """Modules with a class whose base is `Evaluator` itself."""
    classes = (
        (module.name, node)
        for module in package.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    )
    return {
        name for name, node in classes if any(re.match(r"Evaluator\b", ast.unparse(b)) for b in node.bases)
    }


def test_the_interpreters_of_steps_are_listed(package):
    assert interpreters(package) == INTERPRETERS


def test_an_interpreter_is_found(toy):
    sources = {
        "a": "class A(Other, Evaluator[int]): ...",
        "b": "class B(A): ...",
        "c": "class C(Evaluator): ...",
    }
    assert interpreters(toy(**sources)) == {"toy.a", "toy.c"}


# Names and sizes.


def with_old_names(root, folders):
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert files
    named = {path.relative_to(root).as_posix() for path in files if OLD_NAMES.search(path.read_text())}
    return named - {"tests/test_architecture.py"}


def test_no_file_names_the_old_hard_wired_inputs(root):
    folders = ("qinvert", "calibration", "export", "tests", "benchmarks", "examples", "docs")
    assert with_old_names(root, folders) == OLD_FILES


@pytest.mark.parametrize("source", ["steps.INPUT", "if plan.program.vectors: ...", "f(implicit_identity=1)"])
def test_an_old_name_is_found(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text("self.vectors, INPUTS, SOME_INPUT")
    assert with_old_names(tmp_path, ["."]) == {"a.py"}


def sizes(package):
    """Lines of every module by its name, and of every function."""
    trees = [module.tree for module in package.modules.values()]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lines = {name: module.path.read_text().count("\n") for name, module in package.modules.items()}
    return lines, [node.end_lineno - node.lineno + 1 for node in functions]


def test_modules_and_functions_are_short(package):
    modules, functions = sizes(package)
    assert {name: lines for name, lines in modules.items() if lines > MAX_LINES} == {}
    assert median(functions) <= MAX_MEDIAN
    assert quantiles(functions, n=10)[-1] <= MAX_90TH_PERCENTILE


def test_long_modules_and_functions_are_found(toy):
    body = "    x = 1\n"
    package = toy(
        a=f"def f():\n{body * 9}\n\nclass A:\n    async def g(self):\n        y = 1\n        return y\n",
        b="x = 1\n" * 401,
    )
    modules, functions = sizes(package)
    assert modules["toy.b"] == 401 > MAX_LINES
    assert sorted(functions) == [3, 10]


# The page that states the rules.


def test_the_page_is_short_and_names_what_exists(root):
    text = (root / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) <= 40
    named = re.findall(r"`((?:qinvert|calibration|export|tests|benchmarks)/[\w/.]*)`", text)
    assert len(named) > 5
    assert [name for name in named if not (root / name).exists()] == []
    targets = re.findall(r"^([\w.-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE)
    assert {*re.search(r"`make ([\w ]+)`", text)[1].split()} <= {*targets}
