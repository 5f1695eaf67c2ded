"""Deployed graphs against the patched model: families, text of a byte model, weights, and a large export.

    python benchmarks/deployments.py families
    python benchmarks/deployments.py text MODEL TEXT
    python benchmarks/deployments.py weights MODEL TEXT
    python benchmarks/deployments.py large --layers 24 --hidden 1024

``families`` deploys a tiny model with random weights of every family (`tests/tiny_models.py`) for windows of
1, 2 and 4 chunks, and compares logits at lengths from 1 to 500.  ``text`` compares the loss of a byte-level
model and greedy tokens.  ``weights`` compares quantized weights with float ones.  ``large`` exports random
weights, and prints time and memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import qinvert
from qinvert import ChunkOptions, Deployment, Plan, QInvertError
from qinvert.calibration.patching import run_model
from qinvert.documents import markdown
from qinvert.export.whole_models.topk_ties import LowestIndexFirst
from qinvert.metrics import norm_share
from qinvert.pretrained import load_pretrained

LENGTHS = (1, 63, 64, 65, 200, 500)
CHUNKS = (1, 2, 4)
TARGET = "npu-qdq-int16"
WIDE = ChunkOptions(value_bits=16, state_bits=16)


def planned(model: Any, tokens: torch.Tensor) -> Plan:
    """Plan of chunk steps whose values and states have 16 bits."""
    return qinvert.calibrate(model, tokens, scope="chunk", target=TARGET, chunk=WIDE)


@contextmanager
def deployed(model: Any, plan: Plan, **options: Any) -> Iterator[tuple[Deployment, float]]:
    """Yield a deployment in a temporary folder, and the seconds that writing it took."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        qinvert.deploy(model, plan, Path(folder) / "out", **options)
        yield Deployment(Path(folder) / "out", threads=1), time.perf_counter() - start


def log_probabilities(deployment: Deployment, rows: torch.Tensor) -> torch.Tensor:
    """Of every token of every row, each from empty states."""
    found = []
    for row in rows:
        deployment.reset()
        found.append(torch.from_numpy(deployment.prefill(row.numpy())))
    return torch.stack(found).to(torch.float64).log_softmax(-1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """``KL(wanted || found)`` in nats per token, and the share with the same most likely token."""
    loss = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return loss, float((wanted.argmax(-1) == found.argmax(-1)).to(torch.float64).mean())


def patched_logits(model: Any, plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the patched model; of equal scores of sparse attention the first count."""
    with qinvert.patched(model, plan), LowestIndexFirst():
        return run_model(model, {"input_ids": tokens}).to(torch.float64).log_softmax(-1)


def families(arguments: argparse.Namespace) -> None:
    """Print one row for each family: the worst of all lengths and windows."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_models import CONFIGS, VOCABULARY, build, of_both

    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (2, 512), generator=draw)
    rows = []
    for family in arguments.only or CONFIGS:
        model = build(family, **of_both(family))
        try:
            plan = planned(model, tokens[:1])
            found = [row for chunks in CHUNKS for row in compared(model, plan, tokens[1:], chunks)]
        except QInvertError as error:
            rows.append([family, "-", "-", "-", str(error)[:100]])
            continue
        worst = [max(x[0] for x in found), min(x[1] for x in found), max(x[2] for x in found)]
        rows.append([family, f"{worst[0]:.1e}", f"{worst[1]:.3f}", f"{worst[2]:.1e}", "written"])
        print(family, "done", file=sys.stderr)
    columns = ["family", "worst KL, nats a token", "least agreement", "largest share of logits", "deploy"]
    print(markdown([columns, *rows]))


def compared(
    model: Any, plan: Plan, tokens: torch.Tensor, chunks: int
) -> Iterator[tuple[float, float, float]]:
    """Yield KL, agreement and the distance of logits as a share, for every length."""
    with deployed(model, plan, chunks=chunks, cache=1024) as (deployment, _):
        for length in LENGTHS:
            wanted = patched_logits(model, plan, tokens[:, :length])
            found = log_probabilities(deployment, tokens[:, :length])
            yield (*divergence(wanted, found), norm_share(found, wanted))


def byte_rows(path: str, count: int, length: int = 512) -> torch.Tensor:
    """Cut a file into rows of bytes."""
    data = np.frombuffer(Path(path).read_bytes()[: count * length], np.uint8)
    return torch.from_numpy(data.astype(np.int64)).reshape(count, length)


def text(arguments: argparse.Namespace) -> None:
    """Print losses, and how many of 200 greedy tokens agree after each of three prompts."""
    model = load_pretrained(arguments.model)
    rows = byte_rows(arguments.text, 12)
    plan, test = planned(model, rows[:8]), rows[8:]
    with deployed(model, plan, chunks=2, cache=1024) as (deployment, _):
        wanted, found = patched_logits(model, plan, test), log_probabilities(deployment, test)
        for name, values in (("patched model", wanted), ("graphs", found)):
            loss = -values[:, :-1].gather(-1, test[:, 1:, None]).mean()
            print(f"loss of the {name}: {float(loss):.6f} nats a byte")
        kl, agreement = divergence(wanted, found)
        print(f"KL {kl:.1e} nats a byte, the same most likely byte at {agreement:.4f}")
        for row in test[:3]:
            prompt = row[:200]
            deployment.reset()
            ours = deployment.generate(prompt.numpy(), 200)
            theirs, logits = greedy(model, plan, prompt)
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            print(f"{same} of {len(ours)} greedy bytes are those of generate() of the patched model")
            print(first_difference(deployment, model, prompt, (ours, theirs), logits))


def greedy(model: Any, plan: Plan, prompt: torch.Tensor, count: int = 200) -> tuple[list[int], np.ndarray]:
    """The patched model's own continuation, and the logits that each token was chosen by."""
    with qinvert.patched(model, plan), torch.no_grad():
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        found = model.generate(prompt[None], **options, return_dict_in_generate=True, output_logits=True)
    tokens: list[int] = found.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(found.logits).numpy()


def first_difference(
    deployment: Deployment, model: Any, prompt: torch.Tensor, pair: tuple[list[int], list[int]], wanted: Any
) -> str:
    """Compare the gap of the two likeliest tokens, where two texts part, with the errors of the logits there.

    A gap below twice the error is a tie that roundings may turn.  The plan's own error, that of the patched
    model against the model, says how much of an error there is to expect.
    """
    ours, theirs = pair
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs) - 1)
    # Up to there both read the same tokens, so that their logits belong to the same text.
    found, tokens = replayed(deployment, prompt, theirs[:at]), torch.tensor(theirs[:at], dtype=torch.int64)
    exact = run_model(model, {"input_ids": torch.cat([prompt, tokens])[None]})[0, len(prompt) - 1 :].numpy()
    wanted = wanted[: at + 1]
    ranked = np.sort(wanted, -1)
    gaps = ranked[:, -1] - ranked[:, -2]
    errors, own, whole = (
        np.abs(x - y).max(-1) for x, y in ((found, wanted), (wanted, exact), (found, exact))
    )
    where = f"they part at byte {at}" if ours != theirs else "they never part; at the last byte"
    return (
        f"  {where}: gap of the two likeliest {gaps[at]:.3g}, logits off by {errors[at]:.3g}, the "
        f"plan's own error {own[at]:.3g}, the graphs off the model by {whole[at]:.3g}; largest up to there "
        f"{errors.max():.3g}, {own.max():.3g} and {whole.max():.3g}"
    )


def replayed(deployment: Deployment, prompt: torch.Tensor, tokens: list[int]) -> np.ndarray:
    """Logits of the graphs behind a prompt and behind each of these tokens."""
    deployment.reset()
    return np.stack([deployment.prefill(prompt.numpy())[-1], *map(deployment.decode, tokens)])


def weights(arguments: argparse.Namespace) -> None:
    """Print KL and agreement of quantized weights against those in float32."""
    model = load_pretrained(arguments.model)
    rows = byte_rows(arguments.text, 12)
    plan, test = planned(model, rows[:8]), rows[8:]
    with deployed(model, plan) as (deployment, _):
        wanted = log_probabilities(deployment, test)
    for kind, bits in (("w8", 16), ("w4", 16), ("w8", 8), ("w4", 8)):
        with deployed(model, plan, weights=kind, activation_bits=bits, data=rows[:8]) as (deployment, _):
            kl, agreement = divergence(wanted, log_probabilities(deployment, test))
        print(f"{kind}, activations of {bits} bits: KL {kl:.2g} nats a token, agreement {agreement:.4f}")


def random_model(layers: int, hidden: int) -> tuple[Any, torch.Tensor]:
    """A model of Qwen3.5's architecture with random weights, the last of every four layers attention."""
    import transformers

    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = transformers.AutoConfig.for_model(
        "qwen3_5_text",
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        # From the end: transformers does not run a model without attention on its cache.
        layer_types=(kinds * layers)[-layers:],
        vocab_size=4096,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(0))


def large(arguments: argparse.Namespace) -> None:
    """Print the seconds and the largest memory of a deployment of random weights."""
    model, tokens = random_model(arguments.layers, arguments.hidden)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = timed("calibrating", lambda: planned(model, tokens))
    options = {} if arguments.weights == "none" else {"data": tokens}
    with TemporaryDirectory(dir=arguments.folder) as folder:
        out = Path(folder) / "out"
        manifest = timed(
            "deploying",
            lambda: qinvert.deploy(model, plan, out, weights=arguments.weights, cache=1024, **options),
        )
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(
        f"{parameters:,} parameters; nodes: { {n: g['nodes'] for n, g in manifest.facts['graphs'].items()} }"
    )
    print({name: f"{size / 2**20:.1f} MiB" for name, size in sizes.items()})


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Do some work, and print its seconds and the largest memory of the process so far."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: {seconds:.1f} s, at most {peak:.1f} GiB so far", flush=True)
    return result


def main() -> None:
    """Run what the command line asks for."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("families")
    verb.add_argument("--only", nargs="*", default=[])
    verb.set_defaults(run=families)
    for name, run in (("text", text), ("weights", weights)):
        verb = verbs.add_parser(name)
        verb.add_argument("model")
        verb.add_argument("text")
        verb.set_defaults(run=run)
    verb = verbs.add_parser("large")
    verb.add_argument("--layers", type=int, default=24)
    verb.add_argument("--hidden", type=int, default=1024)
    verb.add_argument("--weights", default="none")
    verb.add_argument("--folder")
    verb.set_defaults(run=large)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
