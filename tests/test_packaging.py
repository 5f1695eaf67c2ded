import os
import subprocess
import sys
import tomllib
import venv

import pytest

import qinvert


@pytest.fixture(scope="module")
def settings(pytestconfig):
    return tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_the_package_list_is_in_step_with_the_folders(settings, pytestconfig):
    found = set()
    for package, folder in settings["package-dir"].items():
        for path, _, files in os.walk(pytestconfig.rootpath / folder):
            if "__init__.py" in files:
                inner = os.path.relpath(path, pytestconfig.rootpath / folder)
                found.add(package if inner == "." else f"{package}.{inner.replace(os.sep, '.')}")
    assert found == set(settings["packages"])


@pytest.mark.parametrize("name", ["calibration", "export"])
def test_the_top_level_folders_refuse_a_second_identity(name, pytestconfig):
    code = f"import {name}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"write `import qinvert.{name}`" in result.stderr


def test_the_links_are_relative(pytestconfig):
    for name in ("calibration", "export"):
        assert os.readlink(pytestconfig.rootpath / "qinvert" / name) == f"../{name}"


def test_a_wheel_from_the_sdist_is_whole(pytestconfig, tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    result = subprocess.run([*build, str(pytestconfig.rootpath)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    assert {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")} <= {"qinvert", "bin"}
    code = (
        "import qinvert, qinvert.calibration, qinvert.export; from importlib.resources import files;"
        "assert (files('qinvert') / 'assets' / 'recall' / 'model.safetensors').is_file();"
        "assert (files('qinvert') / 'py.typed').is_file();"
        "print(qinvert.__version__, qinvert.calibrate.__module__, qinvert.__file__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown[0] == qinvert.__version__
    assert shown[1] == "qinvert.calibration.calibrate"
    assert shown[2].startswith(str(target))
