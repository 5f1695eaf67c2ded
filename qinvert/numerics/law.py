"""Whose rounding a simulation follows."""

from __future__ import annotations

from enum import StrEnum

from qinvert.errors import PlanError, lookup


class Rounding(StrEnum):
    """Whose integers a simulation returns."""

    #: Those of ONNX: float32 operations that round half to even.
    ONNX = "onnx"
    #: Those of Qualcomm's Hexagon, for int8 plans; see `qinvert.numerics.hexagon`.
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
        return lookup({str(rounding): rounding for rounding in Rounding}, name, "rounding", PlanError)
