"""Train a model on the recall task, from scratch.

The default takes a few minutes: whole sequences on a GPU, shorter ones and
fewer steps on a CPU.  The result is a Hugging Face folder that ``qinvert
calibrate`` takes.
"""

from __future__ import annotations

import argparse
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from qinvert import recall
from qinvert.calibration.patching import run_model
from qinvert.pretrained import require_transformers


def build_model(seed: int) -> Any:
    """Return an untrained model of the embedded one's architecture.

    Its decay starts slow (half of the state is left after 100 tokens): with the
    library's start the state is gone after one token, and nothing is learned.
    """
    transformers = require_transformers()
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(str(files("qinvert") / "assets" / "recall"))
    config.initializer_range = 0.06
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.zeros_(parameter)
        if name.endswith("dt_bias"):
            torch.nn.init.constant_(parameter, -5.0)
    return model


def recall_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the value after each read key."""
    reads = recall.read_positions(tokens[:, :-1])
    return cross_entropy(logits[:, :-1][reads], tokens[:, 1:][reads])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(model: Any, steps: int, batch: int, pairs: int, peak: float, seed: int, device: str) -> None:
    """Train in place; sequences are fresh in every step."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        # Short sequences first: a key must be recalled at all before it is overwritten often.
        length = min(pairs, max(32, 2 * pairs * (step + 1) // steps))
        tokens = recall.sequences(batch, seed=seed + 1 + step)[:, : 2 * length].to(device)
        loss = recall_loss(model(tokens).logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            print(f"step {step}: {2 * length} tokens, loss {loss.item():.4f}")


def main() -> None:
    """Train, measure the accuracy on unseen sequences, save."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000 if gpu else 200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=recall.PAIRS if gpu else 32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--output", type=Path, default=Path("recall-model"))
    arguments = parser.parse_args()

    model = build_model(arguments.seed)
    train(
        model,
        arguments.steps,
        arguments.batch,
        arguments.pairs,
        arguments.learning_rate,
        1000 * arguments.seed + 10**6,
        arguments.device,
    )
    tokens = recall.sequences(64, seed=arguments.seed)[:, : 2 * arguments.pairs]
    logits = run_model(model.eval(), {"input_ids": tokens}).cpu()
    print(f"accuracy on unseen sequences: {recall.accuracy(logits, tokens):.4f}")
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
