"""Triangular inverses of delta-rule linear attention as low-bit integer MatMuls.

``qinvert.calibrate`` measures the ranges of a model's matrices and returns a
`Plan`; ``simulate`` runs it bit-exactly, ``export`` writes it as ONNX,
``verify`` compares it with runtimes, ``estimate`` asks compilers for its cycles,
and ``patched`` and ``evaluate`` put it into the model.

Names load on first use, so that ``import qinvert`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qinvert.version import __version__ as __version__

if TYPE_CHECKING:
    from qinvert.calibration.calibrate import calibrate as calibrate
    from qinvert.calibration.capture import capture as capture
    from qinvert.calibration.capture import capture_details as capture_details
    from qinvert.calibration.chunk_steps.options import ChunkOptions as ChunkOptions
    from qinvert.calibration.data.token_data import TokenData as TokenData
    from qinvert.calibration.evaluate import Evaluation as Evaluation
    from qinvert.calibration.evaluate import LayerErrors as LayerErrors
    from qinvert.calibration.evaluate import compare as compare
    from qinvert.calibration.evaluate import evaluate as evaluate
    from qinvert.calibration.growth import RangeGrowth as RangeGrowth
    from qinvert.calibration.growth import range_growth as range_growth
    from qinvert.calibration.patching import patched as patched
    from qinvert.calibration.simulate import LayerReport as LayerReport
    from qinvert.calibration.simulate import Report as Report
    from qinvert.calibration.simulate import simulate as simulate
    from qinvert.cautions import DataWarning as DataWarning
    from qinvert.cautions import MissedGoalWarning as MissedGoalWarning
    from qinvert.cautions import QInvertWarning as QInvertWarning
    from qinvert.chunk_step.gated_delta_step import gated_delta_step as gated_delta_step
    from qinvert.delta_rule.rule import chunk_gated_delta_rule as chunk_gated_delta_rule
    from qinvert.errors import ExportError as ExportError
    from qinvert.errors import InputError as InputError
    from qinvert.errors import MissingDependencyError as MissingDependencyError
    from qinvert.errors import PlanError as PlanError
    from qinvert.errors import ProgramError as ProgramError
    from qinvert.errors import QInvertError as QInvertError
    from qinvert.errors import VerificationError as VerificationError
    from qinvert.export.compiled_cost import compiled_cost as compiled_cost
    from qinvert.export.deployment.deploy import deploy as deploy
    from qinvert.export.deployment.deployment import Deployment as Deployment
    from qinvert.export.functions import export_layers as export_layers
    from qinvert.export.rules.doctor import Diagnosis as Diagnosis
    from qinvert.export.rules.doctor import doctor as doctor
    from qinvert.export.runtimes.estimates import CycleEstimate as CycleEstimate
    from qinvert.export.verification.comparison import Verification as Verification
    from qinvert.export.verification.cycles import estimate as estimate
    from qinvert.export.verification.verify import verify as verify
    from qinvert.export.whole_models.export_model import export_model as export_model
    from qinvert.export.whole_models.graft import graft as graft
    from qinvert.formats import IntFormat as IntFormat
    from qinvert.matrices import exact_inverse as exact_inverse
    from qinvert.methods.banded_residual import banded_residual as banded_residual
    from qinvert.methods.block_merge import block_merge as block_merge
    from qinvert.methods.column_sweep import column_sweep as column_sweep
    from qinvert.methods.elimination import elimination as elimination
    from qinvert.methods.forward_substitution import forward_substitution as forward_substitution
    from qinvert.methods.neumann import neumann as neumann
    from qinvert.methods.neumann_doubling import neumann_doubling as neumann_doubling
    from qinvert.methods.newton_schulz import newton_schulz as newton_schulz
    from qinvert.plan.plan import LayerPlan as LayerPlan
    from qinvert.plan.plan import Plan as Plan
    from qinvert.plan.quantization import Quantization as Quantization
    from qinvert.program.program import Program as Program
    from qinvert.program.residual_sums import residuals_as_sums as residuals_as_sums
    from qinvert.report_page.report import report as report

#: Public name -> module that defines it.
_HOMES = {
    "ChunkOptions": "calibration.chunk_steps.options",
    "CycleEstimate": "export.runtimes.estimates",
    "DataWarning": "cautions",
    "Deployment": "export.deployment.deployment",
    "Diagnosis": "export.rules.doctor",
    "Evaluation": "calibration.evaluate",
    "ExportError": "errors",
    "InputError": "errors",
    "IntFormat": "formats",
    "LayerErrors": "calibration.evaluate",
    "LayerPlan": "plan.plan",
    "LayerReport": "calibration.simulate",
    "MissedGoalWarning": "cautions",
    "MissingDependencyError": "errors",
    "Plan": "plan.plan",
    "PlanError": "errors",
    "Program": "program.program",
    "ProgramError": "errors",
    "QInvertError": "errors",
    "QInvertWarning": "cautions",
    "Quantization": "plan.quantization",
    "RangeGrowth": "calibration.growth",
    "Report": "calibration.simulate",
    "TokenData": "calibration.data.token_data",
    "Verification": "export.verification.comparison",
    "VerificationError": "errors",
    "banded_residual": "methods",
    "block_merge": "methods",
    "calibrate": "calibration.calibrate",
    "capture": "calibration.capture",
    "capture_details": "calibration.capture",
    "chunk_gated_delta_rule": "delta_rule.rule",
    "column_sweep": "methods",
    "compare": "calibration.evaluate",
    "compiled_cost": "export.compiled_cost",
    "deploy": "export.deployment.deploy",
    "doctor": "export.rules.doctor",
    "elimination": "methods",
    "estimate": "export.verification.cycles",
    "evaluate": "calibration.evaluate",
    "exact_inverse": "matrices",
    "export_layers": "export.functions",
    "export_model": "export.whole_models.export_model",
    "forward_substitution": "methods",
    "gated_delta_step": "chunk_step.gated_delta_step",
    "graft": "export.whole_models.graft",
    "neumann": "methods",
    "neumann_doubling": "methods",
    "newton_schulz": "methods",
    "patched": "calibration.patching",
    "range_growth": "calibration.growth",
    "report": "report_page.report",
    "residuals_as_sums": "program.residual_sums",
    "simulate": "calibration.simulate",
    "verify": "export.verification.verify",
}
#: Packages that are public as a whole; ``export`` can also be called.
_PACKAGES = ("calibration", "export", "hardware", "plot", "stress")

__all__ = ["__version__", *sorted(_HOMES), *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"qinvert.{name}")
    if name not in _HOMES:
        raise AttributeError(
            f"module 'qinvert' has no attribute {name!r}; the public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(f"qinvert.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
