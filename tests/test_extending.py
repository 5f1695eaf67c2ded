"""Every example and every list of files in docs/extending.md."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from pkgutil import walk_packages

import torch
from added_modules import added
from pages import ROOT, code, page, quoted, rows, sections

import qinvert
from qinvert import formats, hardware, methods, profiles
from qinvert.calibration import choices
from qinvert.calibration.planning.candidates import candidate_programs
from qinvert.export import lowering, runtimes
from qinvert.formats import FORMATS
from qinvert.program.evaluator import Evaluator
from qinvert.program.serialization import OPERATIONS
from qinvert.stress import stress_matrices

PAGE = page("extending.md")
SECTIONS = sections(PAGE)
#: Source of every example by the file that its first line names.
EXAMPLES = {source.splitlines()[0].removeprefix("# "): source for source in code(PAGE, "python")}
LOWER = stress_matrices("correlated_keys", 8, 16)
FOLDERS = ("qinvert", "calibration", "export", "benchmarks")


def example(*paths):
    """The sources of modules by their names, as `added` takes them."""
    return {path.rpartition("/")[2].removesuffix(".py"): EXAMPLES[path] for path in paths}


def verified(plan, folder, **options):
    qinvert.export(plan, folder / "t.onnx", batch=4)
    return qinvert.verify(folder / "t.onnx", plan, LOWER, **options)


def test_every_example_is_run_here():
    source = inspect.getsource(sys.modules[__name__])
    assert [path for path in EXAMPLES if source.count(f'"{path}"') != 1] == []


def test_examples_are_no_wider_than_the_code():
    assert max(len(line) for source in EXAMPLES.values() for line in source.splitlines()) <= 110


def test_the_method_is_planned_simulated_and_verified(tmp_path):
    with added("qinvert.methods", tmp_path, **example("qinvert/methods/four_terms.py")) as package:
        method = package.discover()["four_terms"]
        assert "four_terms(chunk=16)" in [program.title for program in candidate_programs("auto", 16)]
        plan = qinvert.calibrate(LOWER, method="four_terms", min_sqnr_db=0)
        assert plan.layer().program == method.build(16)
        assert all(result.max_steps <= 1 for result in verified(plan, tmp_path))
        lower = stress_matrices("half_random", 4, 4).double()
        exact = method.build(4).run(lower, dtype=torch.float64)
        assert torch.allclose(exact, qinvert.exact_inverse(lower))
        for word in ("Cost:", "Range:", "Stability:", "References"):
            assert word in method.build.__doc__
    assert "four_terms" not in methods.METHODS


def test_the_profile_is_a_target(tmp_path):
    with added("qinvert.profiles", tmp_path, **example("qinvert/profiles/old_ops.py")) as package:
        package.discover()
        plan = qinvert.calibrate(LOWER, target="old-ops")
        assert all(result.exact and not result.mismatches for result in verified(plan, tmp_path))
        assert qinvert.export(plan, tmp_path / "t.onnx").opset_import[0].version == 18
    assert "old-ops" not in profiles.PROFILES


def test_the_chip_is_one_that_plans_are_made_for(tmp_path):
    with added("qinvert.hardware", tmp_path, **example("qinvert/hardware/counting_chip.py")) as package:
        chip = package.discover()["counting-chip"]
        plan = qinvert.calibrate(LOWER, hardware="counting-chip", batch=4)
        assert (plan.provenance["hardware"], plan.provenance["batch"]) == ("counting-chip", 4)
        assert plan.provenance["cost_unit"] == "microseconds for 4 matrices"
        assert plan.target == "npu-qdq-int8"
        assert all(result.max_steps <= 1 for result in verified(plan, tmp_path))
        # The cost is what the operators of the graph add up to.
        ends = {"input": "M", "input_type": "integers", "output": "integers"}
        kinds = [
            node.op_type for node in qinvert.export(plan, tmp_path / "s.onnx", batch=4, **ends).graph.node
        ]
        others = sum(kinds.count(kind) for kind in ("Add", "Sub", "Mul", "Slice", "Concat"))
        cost = plan.layer().provenance["cost"]
        assert cost == chip.cost(plan.layer(), 4) == 10 + 2 * kinds.count("MatMul") + others
    assert "counting-chip" not in hardware.HARDWARE


def test_the_lowering_is_found_by_the_name_in_a_profile(tmp_path):
    home, data = tmp_path / "lowering", tmp_path / "profiles"
    home.mkdir()
    data.mkdir()
    with (
        added("qinvert.export.lowering", home, **example("export/lowering/cast_mul.py")),
        added("qinvert.profiles", data, **example("qinvert/profiles/cast_ops.py")) as package,
    ):
        package.discover()
        plan = qinvert.calibrate(LOWER, target="cast-ops")
        assert all(result.exact and not result.mismatches for result in verified(plan, tmp_path))
        kinds = [node.op_type for node in qinvert.export(plan, tmp_path / "t.onnx").graph.node]
        assert "DequantizeLinear" not in kinds
    assert "cast_mul" not in lowering.discover()


def test_the_runtime_verifies_a_graph(tmp_path):
    with added("qinvert.export.runtimes", tmp_path, **example("export/runtimes/reference.py")) as package:
        package.discover()
        assert "reference" in package.installed()
        plan = qinvert.calibrate(LOWER, target="int-ops")
        (result,) = verified(plan, tmp_path, runtimes=("reference",))
        assert (result.runtime, result.mismatches, result.exact) == ("reference (reference)", 0, True)
    assert "reference" not in runtimes.RUNTIMES


def test_the_interpreter_counts_what_the_cost_counts():
    names = {}
    exec(compile(EXAMPLES["product_depth.py"], "product_depth", "exec"), names)
    for name in ("block_merge", "neumann", "neumann_doubling", "banded_residual"):
        program = getattr(qinvert, name)(16)
        assert names["depth"](program) == {"S": program.cost().depth}


def test_the_format_is_planned_saved_and_verified(tmp_path, monkeypatch):
    for module, table, path in (
        (formats, "FORMATS", "qinvert/formats.py"),
        (choices, "BITS", "calibration/choices.py"),
    ):
        # Entries that the example adds are gone after the test.
        for name in ("int6", "6"):
            monkeypatch.setitem(getattr(module, table), name, None)
            monkeypatch.delitem(getattr(module, table), name)
        exec(compile(EXAMPLES[path], path, "exec"), dict(vars(module)))
    with added("qinvert.profiles", tmp_path, **example("qinvert/profiles/npu_qdq_int6.py")) as package:
        package.discover()
        found = {
            bits: qinvert.calibrate(
                LOWER, bits=bits, target=f"npu-qdq-int{bits}", method=qinvert.block_merge(16)
            )
            for bits in (4, 6, 8)
        }
        assert found[6].layer().formats == "int6"
        found[6].save(tmp_path / "plan.json")
        assert qinvert.Plan.load(tmp_path / "plan.json") == found[6]
        errors = [qinvert.simulate(plan, LOWER).layers["layer"].sqnr_db for plan in found.values()]
        assert errors == sorted(errors)
        assert all(result.max_steps <= 1 for result in verified(found[6], tmp_path))
    monkeypatch.undo()
    assert "int6" not in FORMATS
    assert "6" not in choices.BITS
    assert "npu-qdq-int6" not in profiles.PROFILES


def trees():
    """The parsed modules of the package, by path; its two links lead to folders that are read themselves."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = file.relative_to(ROOT)
            if path.parts[:2] not in (("qinvert", "calibration"), ("qinvert", "export")):
                yield str(path), ast.parse(file.read_text())


def listed(heading, table):
    """Files in the first column of a table of a section."""
    tables = [part for part in re.split(r"\n\n", SECTIONS[heading]) if part.startswith("| file")]
    return [quoted(row["file"])[0] for row in rows(tables[table])]


def interpreters(kind=Evaluator):
    """Every class that interprets steps, in whatever module of the package."""
    for part in walk_packages(qinvert.__path__, "qinvert."):
        if (
            ".kernels." not in part.name
            and ".programs" not in part.name
            and not part.name.endswith("__main__")
        ):
            import_module(part.name)
    import_module("qinvert.kernels.tile_evaluator")
    for below in kind.__subclasses__():
        yield below
        yield from interpreters(below)


def kinds_of_steps(tree):
    """Kinds of steps that a module imports."""
    names = {"Step", "MOVES", *(kind.__name__ for kind in OPERATIONS.values())}
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "qinvert.program.steps"
        for alias in node.names
        if alias.name in names
    }


def test_the_files_of_a_kind_of_step_are_those_that_name_kinds():
    always, sometimes = listed("A kind of step", 0), listed("A kind of step", 1)
    named = {path for path, tree in trees() if kinds_of_steps(tree)}
    assert {*always, *sometimes} == named | {"qinvert/program/steps.py"}
    assert not set(always) & set(sometimes)
    assert len(always) + len(sometimes) == len({*always, *sometimes})


def test_every_interpreter_is_among_the_files_that_change_for_every_kind():
    always = {str((ROOT / path).resolve()) for path in listed("A kind of step", 0)}
    found = [kind for kind in interpreters() if kind.__module__.startswith("qinvert.")]
    assert len(found) >= 10
    # Rescale stands for all kinds that round: who gives it a meaning must give one to the next.
    homes = {str((ROOT / inspect.getfile(kind)).resolve()) for kind in found if "rescale" in vars(kind)}
    assert homes
    assert homes <= always
    for kind in found:
        left = Evaluator.__abstractmethods__ & getattr(kind, "__abstractmethods__", frozenset())
        assert not left or kind.__subclasses__(), kind


def test_files_that_never_change_read_moves_or_drive_any_step():
    parsed = dict(trees())
    tables = [part for part in re.split(r"\n\n", SECTIONS["A kind of step"]) if part.startswith("| file")]
    for row in rows(tables[1]):
        (path,) = quoted(row["file"])
        if row["when it changes"].startswith("never"):
            assert kinds_of_steps(parsed[path]) <= {"MOVES", "Step"}, path


def decides_by_format(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("container_bits", "planes"):
            return True
        if isinstance(node, ast.Name) and node.id in ("PLANE_RATIO", "INT4", "INT16", "INT8X2", "UINT8"):
            return True
    return False


def test_the_files_of_a_wide_format_are_those_that_decide_by_it():
    found = {path for path, tree in trees() if decides_by_format(tree)}
    found = {
        path
        for path in found
        if not path.startswith("benchmarks/")
        and (not path.startswith("qinvert/profiles/") or path.endswith("_profile.py"))
    }
    wide = listed("A format", 0)
    assert set(wide) == found
    assert len(wide) == len(found)
