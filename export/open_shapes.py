"""Inputs and outputs without a shape, which onnxruntime runs and onnx's checker refuses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import onnx

#: Name of the copy that is checked, beside the model itself.
CHECKED: Final = "checked.onnx"


def without_shape(values: Iterable[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    """Tensors of a number of axes that is not known."""
    return [
        value
        for value in values
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]


def set_shapes(model: onnx.ModelProto, known: Iterable[onnx.ValueInfoProto]) -> None:
    """Give inputs and outputs without a shape that of the value of their name, if it is known."""
    shapes = {value.name: value.type.tensor_type for value in known}
    for value in without_shape([*model.graph.input, *model.graph.output]):
        if value.name in shapes and shapes[value.name].HasField("shape"):
            value.type.tensor_type.shape.CopyFrom(shapes[value.name].shape)


def check_content(model: onnx.ModelProto, *, full: bool) -> None:
    """Check a model by onnx; what it says on missing shapes is left out.

    Without the shape of an input onnx infers nothing, so that the check is not ``full`` then.

    Raises
    ------
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError
        If onnx finds it illegal.
    """
    onnx.checker.check_model(_checkable(model), full_check=full and not without_shape(model.graph.input))


def check_file(path: Path) -> None:
    """Do the same with a file whose weights lie beside it: onnx reads them only there.

    Raises
    ------
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError
        If onnx finds it illegal.
    """
    model = onnx.load(os.fspath(path), load_external_data=False)
    if without_shape([*model.graph.input, *model.graph.output]):
        full, path = not without_shape(model.graph.input), path.with_name(CHECKED)
        path.write_bytes(_checkable(model).SerializeToString())
    else:
        full = True
    onnx.checker.check_model(os.fspath(path), full_check=full)


def _checkable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model, or a copy of it in which every input and output has a shape."""
    inputs, outputs = (without_shape(values) for values in (model.graph.input, model.graph.output))
    if not inputs and not outputs:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = [value for value in result.graph.output if value.type.tensor_type.HasField("shape")]
    del result.graph.output[:]
    result.graph.output.extend(kept)
    for value in without_shape(result.graph.input):
        # Some number of axes: no shape is inferred from it.
        value.type.tensor_type.shape.SetInParent()
    return result
