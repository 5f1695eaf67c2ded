"""Names of layers inside wrappers: a model that is compiled or parallel keeps the names of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

#: Where `torch.compile` keeps the module that it wraps; its other attributes are those of that module.
COMPILED: Final = "_orig_mod"
#: Names of what single layers are wrapped in.
INSIDE: Final = frozenset({COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: What the class of every model of transformers has.
MARK: Final = "base_model_prefix"


def own_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return what the outermost model of transformers calls each of these modules.

    A plan is then the same for a model and for what `torch.compile`, DataParallel,
    FSDP, PEFT or a class of the user's makes of it.  Where two modules would have
    the same name, as in a pair of models, all names stay as they are.
    """
    own = {name: _own(model, name) for name in names}
    return own if len(set(own.values())) == len(own) else {name: name for name in own}


def _own(model: torch.nn.Module, name: str) -> str:
    parts, place = name.split("."), model
    for i in range(len(parts)):
        # Not hasattr of the module itself: wrappers pass attributes of what they wrap on.
        if hasattr(type(place), MARK):
            return _without_wrappers(parts[i:])
        place = place.get_submodule(parts[i])
    return _without_wrappers(parts)


def _without_wrappers(parts: Iterable[str]) -> str:
    return ".".join(part for part in parts if part not in INSIDE)
