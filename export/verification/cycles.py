"""`qinvert.estimate`: what exported graphs cost on chips, as the chips' compilers predict it."""

from __future__ import annotations

from os import PathLike

from qinvert.export import runtimes
from qinvert.export.exporting import serialize
from qinvert.export.functions import single_layer
from qinvert.export.reading import read_model
from qinvert.export.runtimes import CycleEstimate
from qinvert.files import read_bytes


def estimate(
    path: str | PathLike[str],
    hardware: str,
    *,
    layer: str | None = None,
    keep: str | PathLike[str] | None = None,
) -> CycleEstimate:
    """Return the cycles of one call of an ONNX graph, as a vendor's compiler predicts them.

    Nothing is measured, and no value is compared: `verify` does that.  A
    prediction says something beside others of the same `CycleEstimate.source`.

    Parameters
    ----------
    path : path
        Path of an .onnx file; any graph that the compiler takes.
    hardware : str
        A key of `qinvert.export.runtimes.estimators`, such as ``"hexagon-v81"``.
    layer : str, optional
        The function to compile, alone and inlined, of a file with a function per layer.
    keep : path, optional
        Folder that gets what the compiler made.

    Raises
    ------
    ExportError
        If the file is not a model, the chip is unknown, its toolkit is not
        installed or refuses the graph, or has no cost for some operators.
    """
    content = read_bytes(path)
    whole = read_model(content, path)
    model = single_layer(whole, layer)
    return runtimes.estimate(content if model is whole else serialize(model), hardware, keep=keep)
