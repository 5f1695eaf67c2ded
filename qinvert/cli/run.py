"""The verb run: continues a prompt by deployed graphs."""

from __future__ import annotations

from typing import Any

import click

from qinvert.cli.output import Output, output_options
from qinvert.errors import InputError


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--prompt", help="Text to continue; it needs a tokenizer, or a model of bytes.")
@click.option("--tokens", help="Token ids to continue, with commas between them, in place of text.")
@click.option("--tokenizer", help="Folder of the tokenizer; the model's own by default.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens to write at most.")
@output_options
def run(
    folder: str,
    prompt: str | None,
    tokens: str | None,
    tokenizer: str | None,
    max_new_tokens: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue a prompt by the graphs of a deployed folder, on onnxruntime.

    FOLDER is what `qinvert deploy` wrote.  The prompt goes through the prefill graph
    in windows, then the decode graph writes the most likely token, one by one.

    \b
    Example: qinvert run out/ --prompt "The delta rule"
             qinvert run out/ --tokens 3,140,67 --max-new-tokens 8
    """
    from qinvert.export.deployment.deployment import Deployment

    output = Output(as_json=as_json, quiet=quiet)
    if (prompt is None) == (tokens is None):
        raise InputError("pass either --prompt TEXT or --tokens 1,2,3")
    deployment = Deployment(folder)
    text = None if prompt is None else _tokenizer(deployment, tokenizer)
    ids = _typed(tokens or "") if text is None else text.ids(prompt or "")
    if text is not None and text.decode is None:
        raise InputError("this tokenizer cannot make text of token ids; pass --tokens")
    found = deployment.generate(ids, max_new_tokens)
    written = None if text is None or text.decode is None else text.decode(found)
    output.say(",".join(map(str, found)) if written is None else f"{prompt}{written}")
    output.result({"tokens": found, "text": written, "prompt_tokens": len(ids)})


def _typed(tokens: str) -> Any:
    import numpy as np

    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise InputError(f"--tokens {tokens[:40]!r} is not a list of token ids; pass for example 3,140,67")
    return np.array([int(part) for part in parts])


def _tokenizer(deployment: Any, given: str | None) -> Any:
    from qinvert.calibration.data.tokenizers import tokenizer_for

    source = deployment.manifest.facts.get("source")
    return tokenizer_for(given, source if isinstance(source, str) else "", deployment.manifest.vocabulary)
