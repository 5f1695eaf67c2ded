"""What a caller may choose about how a model is loaded; this module loads nothing heavy."""

from __future__ import annotations

from enum import StrEnum


class Device(StrEnum):
    """Where a whole model runs."""

    #: The process's own CUDA card if there is one, else the CPU.
    AUTO = "auto"
    #: The process's own CUDA card.
    CUDA = "cuda"
    #: The CPU.
    CPU = "cpu"


class Dtype(StrEnum):
    """In what floating-point type the weights are held."""

    #: The type that the model's files have.
    AUTO = "auto"
    #: 8 significant bits; half the memory of float32.
    BFLOAT16 = "bfloat16"
    #: 24 significant bits.
    FLOAT32 = "float32"
