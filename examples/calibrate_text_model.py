"""From a text model and a text to an int8 plan, checked on other text.

Without arguments: a small untrained model that reads bytes, and the docstrings
of Python's standard library.  With them: a local Hugging Face folder, and a
text file, .jsonl, or the name of a Hugging Face dataset.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import qinvert
from qinvert.pretrained import load_pretrained, require_transformers


def docstrings() -> Iterator[str]:
    """Stream the docstrings of the standard library: text that every machine has."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                text := ast.get_docstring(node)
            ):
                yield text


def untrained_model() -> Any:
    """Return a model of the Qwen3.5 architecture: a gated-delta layer, an attention layer, 256 tokens."""
    transformers = require_transformers()
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )
    return transformers.Qwen3_5ForCausalLM(config).eval()


def main() -> None:
    """Calibrate on one half of the text, evaluate on the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model")
    parser.add_argument("--data", help="text to calibrate on")
    parser.add_argument("--unseen", help="other text, to evaluate on; --data by default")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("plan.json"))
    arguments = parser.parse_args()

    model = untrained_model() if arguments.model is None else load_pretrained(arguments.model)
    texts = list(docstrings())
    seen = texts[::2] if arguments.data is None else arguments.data
    unseen = texts[1::2] if arguments.data is None else arguments.unseen or arguments.data
    size = {"num_samples": arguments.num_samples, "seq_len": arguments.seq_len}

    plan = qinvert.calibrate(model, seen, **size)
    print(plan)
    evaluation = qinvert.evaluate(model, plan, unseen, **size)
    print(f"{evaluation.tokens} tokens: KL to the exact inverse {evaluation.kl:.2g} nats,", end=" ")
    print(f"loss {evaluation.loss:.4f} {evaluation.loss_delta:+.1e}, top-1 {evaluation.top1_agreement:.4f}")
    for layer, errors in evaluation.layers.items():
        print(f"{layer}: T {errors.t:.1f} dB, output {errors.out:.1f} dB")
    plan.save(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
