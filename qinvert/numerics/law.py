"""Whose rounding a simulation follows."""

from __future__ import annotations

from enum import StrEnum

from qinvert.checks import check_member
from qinvert.errors import PlanError


class Rounding(StrEnum):
    """Whose integers a simulation returns."""

    #: Those of ONNX: float32 operations that round half to even.
    ONNX = "onnx"
    #: Those of Qualcomm's Hexagon, for int8 plans and plans of products int16 x int16; see
    #: `qinvert.numerics.hexagon`.
    HEXAGON = "hexagon"
    #: Those of TFLite and of Arm's Ethos-U, for int8 plans; see `qinvert.numerics.tflite`.
    TFLITE = "tflite"

    @staticmethod
    def named(name: str) -> Rounding:
        """Return the member of that name.

        Raises
        ------
        PlanError
            If there is no such member.
        """
        return check_member(Rounding, "rounding", name, PlanError)
