import ast
import json
import subprocess
import sys
from importlib.util import resolve_name

import click
import pytest
from click.shell_completion import ShellComplete

from qinvert.cli.app import cli
from qinvert.cli.verbs import VERBS, load_verb

HEAVY = {"torch", "numpy", "scipy", "onnx", "onnxruntime", "transformers", "safetensors"}


def loaded(*arguments):
    """Run the command line in a process of its own; return its exit code and the packages it loads."""
    code = (
        "import json, sys\n"
        "from qinvert.cli import main\n"
        f"sys.argv = {['qinvert', *arguments]!r}\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)\n"
        "else:\n    print(json.dumps([0, sorted(sys.modules)]), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(result.stderr.splitlines()[-1])
    return exit_code, set(modules)


@pytest.mark.parametrize("name", VERBS)
def test_the_line_of_a_verb_is_the_first_sentence_of_its_help(name):
    verb = load_verb(name)
    assert verb.name == name
    assert VERBS[name] == " ".join(verb.help.partition("\n\n")[0].split())
    # Cut as click cuts the verb's own.
    stand_in = cli.get_command(click.Context(cli), name)
    for limit in (45, 60):
        assert stand_in.get_short_help_str(limit) == verb.get_short_help_str(limit)


def test_every_module_that_is_named_like_a_verb_is_one(pytestconfig):
    folder = pytestconfig.rootpath / "qinvert" / "cli"
    verbs = {file.stem for file in folder.glob("*.py") if "@click.command(" in file.read_text()}
    assert verbs == {name.replace("-", "_") for name in VERBS}


@pytest.mark.parametrize("name", VERBS)
def test_no_verb_imports_another(name, pytestconfig):
    modules = {f"qinvert.cli.{verb.replace('-', '_')}" for verb in VERBS}
    file = pytestconfig.rootpath / "qinvert" / "cli" / f"{name.replace('-', '_')}.py"
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), "qinvert.cli")
            imported |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    assert not imported & modules


def test_help_loads_no_verb_and_nothing_heavy():
    exit_code, modules = loaded("--help")
    assert exit_code == 0
    assert not modules & HEAVY
    assert not modules & {f"qinvert.cli.{name.replace('-', '_')}" for name in VERBS}


@pytest.mark.parametrize("arguments", [("profiles",), ("calibrate", "--help"), ("verify", "--help")])
def test_profiles_and_help_on_a_verb_load_nothing_heavy(arguments):
    exit_code, modules = loaded(*arguments)
    assert exit_code == 0
    assert not modules & (HEAVY - {"numpy"})


def test_completion_lists_verbs_and_completes_their_options():
    complete = ShellComplete(cli, {}, "qinvert", "_QINVERT_COMPLETE")
    verbs = [item.value for item in complete.get_completions([], "e")]
    assert verbs == ["evaluate", "export", "export-model"]
    assert [item.value for item in complete.get_completions(["profiles"], "--q")] == ["--quiet"]


@pytest.mark.parametrize("package", ["click", "rich"])
def test_a_missing_package_is_one_line(package):
    code = f"import sys; sys.modules[{package!r}] = None; from qinvert.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (f"qinvert: the command line needs {package}; run: pip install 'qinvert[cli]'\n")


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "qinvert.cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "version" in result.stdout


@pytest.mark.parametrize(
    ("verb", "old", "python"),
    [
        ("calibrate", "--min-sqnr", "min_sqnr_db"),
        ("calibrate", "--min-output-sqnr", "min_output_sqnr_db"),
        ("calibrate", "--max-loss", "max_loss_db"),
        ("simulate", "--min-sqnr", "min_sqnr_db"),
        ("verify", "--min-sqnr", "min_sqnr_db"),
    ],
)
def test_options_have_the_names_of_python_and_their_old_ones(verb, old, python):
    (option,) = [option for option in load_verb(verb).params if old in option.opts]
    assert f"--{python.replace('_', '-')}" in option.opts
