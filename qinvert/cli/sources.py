"""Models and matrices by the names that are typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qinvert.cli.data_options import DataOptions
from qinvert.cli.output import printable
from qinvert.errors import InputError
from qinvert.plan.plan import Plan


def load_model(name: str, given: DataOptions | None = None) -> Any:
    """Load a local model folder, or the embedded one by its name ``recall``, as the options say."""
    from qinvert import recall
    from qinvert.pretrained import PLAIN, Loading, load_pretrained, require_transformers

    loading = PLAIN if given is None else Loading(**given.loading)

    transformers = require_transformers()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return recall.load_model(loading) if name == recall.NAME else load_pretrained(name, loading)


def is_matrix_file(source: str) -> bool:
    """Whether ``source`` names a file of matrices rather than a model."""
    return Path(source).suffix in (".npz", ".safetensors")


def open_pair(source: str, given: DataOptions) -> tuple[Any, Any]:
    """Return (source, data) for the library from what was typed.

    Raises
    ------
    InputError
        If a model comes without data, matrices with data, or an option would change nothing.
    """
    if is_matrix_file(source):
        if given.data is not None:
            raise InputError(f"{source} holds matrices already; leave out --data")
        given.refuse_without_model(f"{source} holds matrices, which no model reads")
        return source, None
    check_exists(source)
    data = given.for_model(source)
    return load_model(source, given), data


def check_exists(source: str) -> None:
    """Refuse a model that is not there, before anything else is missed.

    Raises
    ------
    InputError
        If it is neither a folder nor the embedded model.
    """
    from qinvert import recall

    if source != recall.NAME and not Path(source).exists():
        raise InputError(
            f"there is no {source!r}: pass a model folder, a file of matrices L (.npz, .safetensors), or "
            f"{recall.NAME}"
        )


def open_for_plan(plan: Plan, model: str | None, given: DataOptions) -> tuple[Any, Any]:
    """Return (source, data) for a verb that has a plan; by default with the model it was made from."""
    from qinvert.calibration.data.token_batches import holds_tokens

    if given.data is not None and model is None and not holds_tokens(given.data):
        given.refuse_without_model(f"{given.data} holds matrices, which no model reads")
        return given.data, None
    source = model if model is not None else plan.provenance.get("source")
    if not isinstance(source, str):
        raise InputError("the plan does not name its model; pass --model, or --data with matrices L")
    if model is None and is_matrix_file(source) and given.data is not None:
        raise InputError("the plan was made from matrices; pass --model for text or token ids")
    return open_pair(source, given)


def open_own(plan: Plan, sequences: int) -> tuple[Any, Any]:
    """Return (source, data) of what a plan was made from; a model that makes its own data makes that many."""
    source = plan.provenance.get("source")
    matrices = isinstance(source, str) and is_matrix_file(source)
    return open_for_plan(plan, None, DataOptions() if matrices else DataOptions(sequences=sequences))


def with_source(plan: Plan, source: str) -> Plan:
    """Return the plan with the model or file it was made from, so that other verbs find it."""
    return replace(plan, provenance={**plan.provenance, "source": printable(source)})
