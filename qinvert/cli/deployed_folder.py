"""The verb verify, for folders that `qinvert deploy` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qinvert.cli.output import Output
from qinvert.cli.sources import check_exists, load_model
from qinvert.errors import InputError

if TYPE_CHECKING:
    from qinvert.export.deployment.verify_deployment import DeploymentCheck


def is_deployed(folder: str) -> bool:
    """Whether `qinvert deploy` wrote a folder."""
    from qinvert.export.deployment.manifest import MANIFEST

    return (Path(folder) / MANIFEST).is_file()


def verify_deployed(output: Output, folder: str, model: str | None, runtimes: tuple[str, ...]) -> None:
    """Run both graphs of a folder, compare them with the model, and print how far they are.

    Raises
    ------
    InputError
        If the model is not known, or another runtime than onnxruntime is asked for.
    """
    from qinvert.export.deployment.manifest import Manifest
    from qinvert.export.deployment.verify_deployment import verify_deployment

    if runtimes != ("onnxruntime",):
        raise InputError(
            "deployed folders are verified on onnxruntime; leave out --runtime, --cost and --keep"
        )
    source = model if model is not None else Manifest.load(folder).facts.get("source")
    if not isinstance(source, str):
        raise InputError(f"{folder} does not name its model; pass --model")
    check_exists(source)
    with output.progress("verifying"):
        checks = verify_deployment(folder, load_model(source))
    show_checks(output, checks)
    output.result({"verified": checks})


def show_checks(output: Output, checks: list[DeploymentCheck]) -> None:
    """Print one row for each text and setting."""
    rows = [
        [
            f"{check.prefilled} + {check.decoded}",
            "optimized" if check.optimized else "unoptimized",
            f"{check.logits:.1e}",
            f"{check.states:.1e}",
            f"{max(check.kl, 0.0):.1e}",
            f"{check.top1_agreement:.3f}",
            "" if check.decode_kl is None else f"{max(check.decode_kl, 0.0):.1e}",
        ]
        for check in checks
    ]
    columns = [
        "tokens of prefill + decode",
        "onnxruntime",
        "logits off, share",
        "worst state off, share",
        "KL to the patched model",
        "same next token",
        "KL of decode to the model",
    ]
    output.table("Deployment", columns, rows)
