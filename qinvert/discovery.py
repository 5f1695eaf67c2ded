"""Finds what the modules of a package define: methods, profiles, lowerings and runtimes, one per file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Protocol, TypeVar

from qinvert.errors import QInvertError


class Named(Protocol):
    """An object with the name by which callers know it."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def modules(package: str, folders: Iterable[str]) -> Iterator[tuple[str, ModuleType]]:
    """Import the modules of a package in the order of their names; yield each with its name.

    Folders, and modules whose name starts with an underscore, are not entries of the package
    and are left out.

    Parameters
    ----------
    package : str
        Full name of the package.
    folders : iterable of str
        Its ``__path__``.
    """
    names = sorted(module.name for module in iter_modules(folders) if not module.ispkg)
    for name in names:
        if not name.startswith("_"):
            yield name, import_module(f"{package}.{name}")


def definitions(
    package: str,
    folders: Iterable[str],
    attribute: str,
    kind: type[N],
    error: type[QInvertError],
    *,
    required: bool = True,
) -> dict[str, N]:
    """Return the objects that the modules of a package define as ``attribute``, each by its own name.

    Parameters
    ----------
    package, folders
        See `modules`.
    attribute : str
        Name that a module defines, such as ``PROFILE``.
    kind : type
        Type that the object of this name must have.
    error : type
        Class of the error for a module without such an object.
    required : bool
        Whether every module must define the attribute; otherwise modules
        without it hold what the others share.

    Raises
    ------
    QInvertError
        Of the class ``error``, if a module does not define such an object, or if two have the same name.
    """
    found: dict[str, N] = {}
    homes: dict[str, str] = {}
    for _, module in modules(package, folders):
        value = getattr(module, attribute, None)
        if value is None and not required:
            continue
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
