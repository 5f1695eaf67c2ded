"""A quantizer for the ONNX exporter of transformers: ``OnnxConfig(quantizer=TriangularQuantizer(plan))``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qinvert.calibration.calibrate import calibrate
from qinvert.errors import ExportError, MissingDependencyError
from qinvert.export.exporting import profile_for
from qinvert.export.whole_models.export_model import plain_experts
from qinvert.export.whole_models.tracing import attach_functions, forget_sources, require_onnx_ir, traceable
from qinvert.plan.plan import Plan

try:
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers.base import ExportQuantizer
except ImportError:
    raise MissingDependencyError(
        "this needs the exporters of transformers, which are not installed; "
        "run: pip install 'qinvert[model]' 'transformers>=5.23'"
    ) from None


class TriangularQuantizer(ExportQuantizer):
    """Puts every layer's integer program into a model that transformers exports.

        quantizer = TriangularQuantizer(plan)
        with quantizer.tracing(model):
            config = OnnxConfig(dynamic=True, quantizer=quantizer)
            exported = OnnxExporter().export(model, inputs, config=config)

    The exporter calls `quantize` on the finished graph.  The ``with`` block is
    needed because the graph gets its calls of functions while it is traced.

    Parameters
    ----------
    plan : Plan, optional
        Plan of the model; by default it is made in `tracing` from the calibration data.
    calibration_dataset : iterable of dict, optional
        Keyword arguments of the model, as for other quantizers of transformers.
    profile : str, optional
        Export profile of the functions; the plan's target if left out.
    options
        Options of `qinvert.calibrate`, where there is no plan.

    Raises
    ------
    ExportError
        If there is neither a plan nor data, or if options come with a plan.
    """

    supported_formats: tuple[Any, ...] = (ExportFormat.ONNX,)
    required_packages: tuple[str, ...] = ("onnx", "onnxscript")

    def __init__(
        self,
        plan: Plan | None = None,
        calibration_dataset: Iterable[dict[str, Any]] | None = None,
        *,
        profile: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(calibration_dataset)
        if plan is None and calibration_dataset is None:
            raise ExportError("pass a plan, or a calibration_dataset to make one from")
        if plan is not None and options:
            raise ExportError(
                f"{', '.join(options)} are options of calibration, but a plan was passed; leave them out"
            )
        self.plan = plan
        self._profile = profile
        self._options = options

    @contextmanager
    def tracing(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Make ``model`` ready for the exporter inside a ``with`` block; calibrate first, without a plan.

        Raises
        ------
        InputError, PlanError
            See `qinvert.patched` and `qinvert.calibrate`.
        """
        require_onnx_ir()
        if self.plan is None:
            self.plan = calibrate(model, self.calibration_dataset, target=self._profile, **self._options)
        with plain_experts(model), traceable(model, self.plan):
            yield model

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: Any) -> Any:
        """Add the layers' programs to a graph.

        Raises
        ------
        ExportError
            If the model was not traced inside `tracing`.
        """
        if self.plan is None:
            raise ExportError("there is no plan yet; export the model inside `with quantizer.tracing(model)`")
        attach_functions(model, self.plan, profile_for(self.plan, self._profile))
        forget_sources(model)
        return model
