import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from qinvert.discovery import definitions, modules
from qinvert.errors import ProgramError


@dataclass
class Thing:
    name: str


THING = "from test_things import Thing\n\nTHING = Thing({!r})\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that makes a package of the given modules and returns its folders."""
    home, shared = ModuleType("things"), ModuleType("test_things")
    home.__path__, shared.Thing = [str(tmp_path)], Thing
    monkeypatch.setitem(sys.modules, "things", home)
    monkeypatch.setitem(sys.modules, "test_things", shared)

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        return home.__path__

    yield write
    for name in [name for name in sys.modules if name.startswith("things.")]:
        del sys.modules[name]


def test_modules_come_in_the_order_of_their_names_and_private_ones_do_not(package):
    folders = package(second="", first="", _private="raise AssertionError")
    assert [name for name, _ in modules("things", folders)] == ["first", "second"]


def test_definitions_are_found_by_the_name_that_they_have(package):
    folders = package(first=THING.format("z"), second=THING.format("a"))
    assert definitions("things", folders, "THING", Thing, ProgramError) == {"z": Thing("z"), "a": Thing("a")}


@pytest.mark.parametrize("source", ["", "THING = 'first'", "THING = str"])
def test_a_module_without_a_definition_is_an_error_that_says_what_to_add(package, source):
    folders = package(first=THING.format("a"), second=source)
    with pytest.raises(ProgramError, match=r"things\.second defines no THING of type Thing; add THING = Th"):
        definitions("things", folders, "THING", Thing, ProgramError)


def test_two_definitions_of_one_name_are_an_error_that_names_both_modules(package):
    folders = package(first=THING.format("a"), second=THING.format("a"))
    with pytest.raises(ProgramError, match=r"things\.first and things\.second both define 'a'; rename one"):
        definitions("things", folders, "THING", Thing, ProgramError)
