"""Finds what the modules of a package define: methods, profiles and lowerings, one a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Protocol, TypeVar

from qinvert.errors import QInvertError


class Named(Protocol):
    """What has the name that callers know it by."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def modules(package: str, folders: Iterable[str]) -> Iterator[tuple[str, ModuleType]]:
    """Import the modules of a package in the order of their names; yield each with its name.

    Modules whose name starts with an underscore are not a package's entries and are left out.

    Parameters
    ----------
    package : str
        Full name of the package.
    folders : iterable of str
        Its ``__path__``.
    """
    names = sorted(module.name for module in iter_modules(folders))
    for name in names:
        if not name.startswith("_"):
            yield name, import_module(f"{package}.{name}")


def definitions(
    package: str, folders: Iterable[str], attribute: str, kind: type[N], error: type[QInvertError]
) -> dict[str, N]:
    """Return what every module of a package calls ``attribute``, by the name that it has there.

    Parameters
    ----------
    package, folders
        As `modules` takes them.
    attribute : str
        What each module must define, such as ``PROFILE``.
    kind : type
        Of what it must be.
    error : type
        Raised where it is not.

    Raises
    ------
    QInvertError
        Of the class ``error``, if a module does not define it, or if two define one name.
    """
    found: dict[str, N] = {}
    homes: dict[str, str] = {}
    for _, module in modules(package, folders):
        value = getattr(module, attribute, None)
        if not isinstance(value, kind):
            raise error(
                f"module {module.__name__} defines no {attribute} of type {kind.__name__}; add "
                f"{attribute} = {kind.__name__}(...), or start the file's name with an underscore"
            )
        if value.name in found:
            raise error(
                f"{homes[value.name]} and {module.__name__} both define {value.name!r}; rename one of them"
            )
        found[value.name], homes[value.name] = value, module.__name__
    return found
