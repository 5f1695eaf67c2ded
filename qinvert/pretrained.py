"""Loads Hugging Face models; transformers is imported only here and only when asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch

from qinvert.checks import check_member
from qinvert.errors import InputError, MissingDependencyError, reason
from qinvert.model_options import Device, Dtype

#: Options of every ``from_pretrained``: nothing is downloaded, and no code that a folder holds is
#: run.  Without the second one transformers asks on the terminal, and takes an answer from a pipe.
LOCAL: Final = {"local_files_only": True, "trust_remote_code": False}
#: How attention is computed is transformers' choice: a config.json may name a kernel of the hub, which
#: transformers downloads and runs where the package kernels is installed.
OWN_ATTENTION: Final = {"attn_implementation": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a model is loaded: where its weights are held, and in what type.

    Raises
    ------
    InputError
        If an option is not legal, or there is no such device.
    """

    device: str = Device.CPU
    dtype: str = Dtype.FLOAT32
    #: ``"auto"`` spreads the layers over all cards, then memory, then disk (with accelerate); or a mapping
    #: from names of modules to devices, ``"cpu"`` or ``"disk"``.
    device_map: str | Mapping[str, Any] | None = None
    #: Folder for weights that go to the disk and are not in the model's own files as they are needed.
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("dtype", Dtype)):
            check_member(kind, name, getattr(self, name), InputError)
        if isinstance(self.device_map, str) and self.device_map != "auto":
            raise InputError(f"device_map {self.device_map!r} is unknown; use auto, or leave it out")
        if self.device_map is not None and self.device != Device.CPU:
            raise InputError(
                f"device {str(self.device)!r} is for a whole model, and device_map spreads its layers; leave "
                "one of them out"
            )
        if self.device_map is None and self.offload_folder is not None:
            raise InputError(
                "offload_folder is for weights that device_map='auto' (--device-map auto) puts on the disk; "
                "pass that, or leave offload_folder out"
            )

    @property
    def place(self) -> torch.device:
        """The device of a model that is held in one place.

        Raises
        ------
        InputError
            If there is no such device.
        """
        if self.device == Device.CPU or (self.device == Device.AUTO and not torch.cuda.is_available()):
            return torch.device("cpu")
        # torchrun numbers the processes of one machine.
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise InputError(
                f"process {number} of this machine needs a CUDA card of its own, and there are {count}; "
                "start fewer processes, or use the device cpu"
            )
        return torch.device("cuda", number)

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes.

        Raises
        ------
        MissingDependencyError
            If accelerate is needed and not installed.
        """
        known: dict[str, Any] = {
            Dtype.AUTO: "auto",
            Dtype.BFLOAT16: torch.bfloat16,
            Dtype.FLOAT32: torch.float32,
        }
        found: dict[str, Any] = {"dtype": known[self.dtype]}
        if self.device_map is None:
            return found
        if not find_spec("accelerate"):
            raise MissingDependencyError(
                "a device map needs accelerate, which is not installed; run: pip install 'qinvert[offload]'"
            )
        return found | {"device_map": self.device_map, "offload_folder": self.offload_folder}


#: In float32 on the CPU.
PLAIN: Final = Loading()


def load_pretrained(path: str | PathLike[str], loading: Loading = PLAIN) -> Any:
    """Load a model of text, or of text and images, from a local folder, in eval mode.

    Nothing is downloaded and no code from the folder is run.

    Raises
    ------
    InputError
        If the folder does not hold a model that transformers knows, or there is no such device.
    MissingDependencyError
        If transformers is not installed, or accelerate where it is needed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json; pass a local Hugging Face model"
        )
    transformers, arguments, place = require_transformers(), loading.arguments, loading.place
    try:
        model = _loader(transformers, folder).from_pretrained(
            str(folder), use_safetensors=True, **arguments, **OWN_ATTENTION, **LOCAL
        )
        if loading.device_map is None:
            model = model.to(place)
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
