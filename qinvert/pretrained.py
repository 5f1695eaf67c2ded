"""Loads Hugging Face models; transformers is imported only here and only when asked."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch

from qinvert.errors import InputError, MissingDependencyError, reason

#: Options of every ``from_pretrained``: nothing is downloaded, and no code that a folder holds is
#: run.  Without the second one transformers asks on the terminal, and takes an answer from a pipe.
LOCAL: Final = {"local_files_only": True, "trust_remote_code": False}


def load_pretrained(path: str | PathLike[str]) -> Any:
    """Load a model of text, or of text and images, from a local folder, in float32 and eval mode.

    Nothing is downloaded and no code from the folder is run.

    Raises
    ------
    InputError
        If the folder does not hold a model that transformers knows.
    MissingDependencyError
        If transformers is not installed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json; pass a local Hugging Face model"
        )
    transformers = require_transformers()
    try:
        model = _loader(transformers, folder).from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, **LOCAL
        )
    except Exception as error:  # transformers raises anything from KeyError to RuntimeError here
        raise InputError(f"cannot load the model in {folder}: {reason(error)}") from error
    return model.eval()


def opened(model: Any) -> Any:
    """Return the model of a local folder; anything but the path of a folder as it is.

    Raises
    ------
    InputError, MissingDependencyError
        See `load_pretrained`.
    """
    folder = isinstance(model, (str, PathLike)) and Path(model).is_dir()
    return load_pretrained(model) if folder else model


def _loader(transformers: Any, folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(str(folder), **LOCAL)
    # Some families exist only as models of text and images.
    text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText


def require_transformers() -> Any:
    """Import transformers, or raise an error that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "this needs transformers, which is not installed; run: pip install 'qinvert[hf]'"
        ) from None
    return transformers
