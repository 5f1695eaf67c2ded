"""Programs and plans as ONNX graphs: export, verification on runtimes.

The package is callable: ``qinvert.export(plan, path)`` is
`qinvert.export.exporting.export`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

if __name__ != "qinvert.export":
    raise ImportError("this folder is the package qinvert.export; write `import qinvert.export`")


class _CallablePackage(ModuleType):
    """A package that is also the verb of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from qinvert.export.exporting import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
