"""`qinvert.export.lint`: does a graph keep to the rules of an export profile?

The rules are `qinvert.export.rules.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

import onnx
from onnx.external_data_helper import uses_external_data

from qinvert.errors import ExportError, reason
from qinvert.export.reading import check_model, inlined, parse_model, tensors
from qinvert.export.rules.graph_index import Structure
from qinvert.export.rules.rules import RULES as RULES
from qinvert.export.rules.rules import Case
from qinvert.files import read_bytes
from qinvert.profiles import Profile, find_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place where a graph breaks a rule."""

    #: Node, or tensor where no node is to blame.
    node: str
    #: Name of the rule.
    rule: str
    #: What is there.
    message: str
    #: What to do about it.
    remedy: str

    def __str__(self) -> str:
        return f"{self.node!r} {self.message}; {self.remedy} (rule {self.rule})"


def lint(model: onnx.ModelProto | str | PathLike[str], profile: str | None = None) -> list[Finding]:
    """Return every place where a graph breaks a rule of an export profile.

    Parameters
    ----------
    model : onnx.ModelProto or path
        Any ONNX model; nothing outside the file is read.  Local functions
        are inlined: the names in findings are those of the inlined graph.
    profile : str, optional
        See `qinvert.profiles`; by default what the model's metadata names.

    Returns
    -------
    list of Finding
        Empty if the graph is clean.

    Raises
    ------
    ExportError
        If it is not an ONNX model, or if neither it nor the caller names a profile.
    """
    path = "the model" if isinstance(model, onnx.ModelProto) else model
    if not isinstance(model, onnx.ModelProto):
        model = parse_model(read_bytes(model), model)
    chosen = _profile_of(model) if profile is None else find_profile(profile)
    outside = list(_outside(model))
    if outside:
        # Any further look, onnx's own included, would read the other files.
        return outside
    check_model(model, path)
    model = inlined(model)
    try:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except Exception as error:  # onnx raises unrelated types here
        raise ExportError(
            f"the model's shapes contradict each other ({reason(error)}); export it again"
        ) from None
    return find_faults(model, chosen)


def _profile_of(model: onnx.ModelProto) -> Profile:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if "qinvert.profile" not in metadata:
        raise ExportError("the model does not name a profile; pass for example profile='npu-qdq-int8'")
    return find_profile(metadata["qinvert.profile"])


def _outside(model: onnx.ModelProto) -> Iterator[Finding]:
    for tensor in tensors(model):
        if uses_external_data(tensor):
            yield Finding(
                node=tensor.name,
                rule="self-contained",
                message="lies in another file",
                remedy="store the constant inside the model",
            )


def find_faults(model: onnx.ModelProto, profile: Profile) -> list[Finding]:
    """Do what `lint` does, for a checked model whose tensors all have declared shapes."""
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    case = Case(Structure(model), profile, max(opsets, default=0))
    return [
        Finding(node=node, rule=name, message=message, remedy=remedy)
        for name, (remedy, check) in RULES.items()
        for node, message in check(case)
    ]
