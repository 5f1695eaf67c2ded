"""What a chip's compiler takes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qinvert.checks import check_integer
from qinvert.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """What a chip's compiler takes of an ONNX graph, and what it makes of it.

    Raises
    ------
    PlanError
        At construction, naming the field and what fits.
    """

    #: Compiler and version with which this was found.
    name: str
    #: Operators that it puts on the chip; those of other domains are written ``domain.Operator``.
    operators: frozenset[str]
    #: Most axes of a tensor that every route to the chip takes.
    max_rank: int
    #: Most axes that this compiler takes.
    most_axes: int
    #: Operators that it refuses beyond `max_rank`.
    refused_beyond: frozenset[str]
    #: Type in which operators on floats run, such as ``float16``; empty where the chip has no floats.
    floats: str
    #: NumPy names of the element types that a graph may compute on.
    elements: frozenset[str]
    #: Latest ONNX operator set, and latest IR version, that it was seen to read.
    opset: int
    ir_version: int
    #: Operators whose values on integer grids are wrong, without an error, and what to do instead.
    wrong: Mapping[str, str] = field(default_factory=dict, hash=False)
    #: Rules of `qinvert.export.lint` whose breach it compiles to wrong values, or not at all.
    rules: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.operators:
            raise PlanError(f"compiler {self.name!r} takes no operator; name those that it takes")
        for name in ("max_rank", "most_axes", "opset", "ir_version"):
            check_integer(name, getattr(self, name), 1, 99, PlanError, f"; see compiler {self.name!r}")
        if self.most_axes < self.max_rank:
            raise PlanError(f"compiler {self.name!r} takes {self.most_axes} axes; max_rank cannot be more")
