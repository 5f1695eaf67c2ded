"""Modules that a package finds in a second folder, for as long as a test needs them."""

import sys
from contextlib import contextmanager
from importlib import import_module, invalidate_caches


@contextmanager
def added(package, folder, **sources):
    """Write ``sources`` by module name, let the package read that folder, and put everything back."""
    package = import_module(package)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    package.__path__.append(str(folder))
    invalidate_caches()
    try:
        yield package
    finally:
        package.__path__.remove(str(folder))
        for name in sources:
            sys.modules.pop(f"{package.__name__}.{name}", None)
            vars(package).pop(name, None)
        package.discover()
