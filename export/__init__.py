"""Programs and plans as ONNX graphs: export, rules, verification on runtimes.

The package is callable: ``qinvert.export(plan, path)`` is
`qinvert.export.exporting.export`; ``qinvert.export.lint`` checks any graph.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from qinvert.export.rules.lint import Finding as Finding
    from qinvert.export.rules.lint import lint as lint

if __name__ != "qinvert.export":
    raise ImportError("this folder is the package qinvert.export; write `import qinvert.export`")


def __getattr__(name: str) -> Any:
    # Loaded on first use, as the verbs of the package above.
    if name not in ("Finding", "lint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; use Finding or lint")
    from qinvert.export.rules import lint

    return getattr(lint, name)


class _CallablePackage(ModuleType):
    """A package that is also the verb of its name, with the verb's arguments and help."""

    @property
    def __signature__(self) -> Signature:
        """Arguments of the verb, for `inspect.signature`, `help` and editors; it is loaded when they ask."""
        from inspect import signature

        from qinvert.export.exporting import export

        return signature(export)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        from qinvert.export.exporting import export

        return f"{vars(self)['__doc__']}\n\nexport{self.__signature__}\n\n{export.__doc__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from qinvert.export.exporting import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
