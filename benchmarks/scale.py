"""What calibrating large models costs: seconds against their own forward pass, memory, and the plan's hash.

    python benchmarks/scale.py                                  # one card or the CPU
    python benchmarks/scale.py --processes 1 2                  # on as many cards, one run
    python benchmarks/scale.py --grow                           # tokens, layers, heads and C by themselves
    python benchmarks/scale.py --offload                        # the same plan from memory and disk

A model of Qwen3.5's shape with random weights; three of four layers apply the delta rule.
Each row is measured by processes of its own.  Seconds are those of the second call, since the first one
loads kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

import qinvert
from qinvert.calibration.data.processes import joined
from qinvert.calibration.data.token_batches import token_batches
from qinvert.calibration.patching import forward
from qinvert.documents import markdown
from qinvert.pretrained import Loading, load_pretrained

VOCABULARY: Final = 1024
#: What is varied by `--grow`, and the values beside the default.
GROWTH: Final[dict[str, tuple[int, ...]]] = {
    "rows": (24, 48, 192),
    "layers": (8, 32),
    "heads": (16, 64),
}


def configuration(arguments: argparse.Namespace) -> Any:
    """Return Qwen3.5's configuration in the size that is asked for."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 256),
        num_key_value_heads=1,
        head_dim=256,
        linear_num_key_heads=max(1, arguments.heads // 2),
        linear_num_value_heads=arguments.heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    )


def random_model(arguments: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Return the model with the same random weights on every machine, drawn on the CPU."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    torch.manual_seed(0)
    # Many CPUs have no product of bfloat16.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Qwen3_5ForCausalLM(configuration(arguments)).to(dtype).to(device).eval()


def random_tokens(arguments: argparse.Namespace) -> torch.Tensor:
    """Return the same token ids on every machine, ``[rows, length]``."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCABULARY, (arguments.rows, arguments.length), generator=draw)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return a call's result and its seconds, with all work of the device done."""
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def peak_mib(device: torch.device) -> float:
    """Peak memory: allocated on the card, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return one row: this process's forward pass over its share, and the calibration of all."""
    place = Loading(device="auto").place
    model = random_model(arguments, place)
    tokens = random_tokens(arguments)
    with joined() as shard:
        own = tokens[shard.rank :: shard.size]

        def pass_over() -> None:
            for batch in token_batches(own, model):
                forward(model, batch)

        def calibrate() -> qinvert.Plan:
            return qinvert.calibrate(model, tokens)

        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        pass_over()
        _, ahead = timed(pass_over, place)
        forward_peak = peak_mib(place)
        if not arguments.once:
            calibrate()
        plan, seconds = timed(calibrate, place)
        # Every process waits for the slowest one.
        ahead, seconds = (max(x) for x in zip(*shard.gather("seconds", (ahead, seconds)), strict=True))
        plans = shard.gather("plans", digest(plan))
        if len(set(plans)) != 1:
            raise SystemExit(f"processes made different plans: {plans}")
        return {
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
            "processes": shard.size,
            "tokens": tokens.numel(),
            "layers": len(plan.layers),
            "heads": arguments.heads,
            "forward s": round(ahead, 2),
            "calibrate s": round(seconds, 2),
            "ratio": round(seconds / ahead, 2),
            "weights MiB": round(weights),
            "forward over weights MiB": round(forward_peak - weights),
            "calibrate over weights MiB": round(peak_mib(place) - weights),
            "plan": plans[0],
        }


def digest(plan: qinvert.Plan) -> str:
    """Return the first digits of the SHA-256 of a plan's file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def offloaded(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row for each place of the weights: memory, CPU and disk by accelerate."""
    tokens = random_tokens(arguments)
    with TemporaryDirectory() as folder:
        random_model(arguments, torch.device("cpu")).save_pretrained(Path(folder) / "model")
        card = torch.cuda.is_available()
        places: dict[str, Any] = {"one device": None, "a quarter on the disk": _on_disk(arguments, card)}
        for name, device_map in places.items():
            options: dict[str, Any] = (
                {"device": "auto"}
                if device_map is None
                else {"device_map": device_map, "offload_folder": str(Path(folder) / "offload")}
            )
            model = load_pretrained(Path(folder) / "model", Loading(dtype="bfloat16", **options))
            plan, seconds = timed(lambda model=model: qinvert.calibrate(model, tokens), torch.device("cpu"))
            yield {"weights": name, "calibrate s": round(seconds, 2), "plan": digest(plan)}
            del model


def _on_disk(arguments: argparse.Namespace, card: bool) -> dict[str, Any]:
    place: Any = 0 if card else "cpu"
    layers = {f"model.layers.{i}": place for i in range(arguments.layers)}
    moved = {f"model.layers.{i}": "disk" for i in range(0, arguments.layers, 4)}
    return (
        layers
        | moved
        | {"model.embed_tokens": place, "model.norm": place, "model.rotary_emb": place}
        | {"lm_head": place}
    )


def in_processes(count: int, given: list[str]) -> dict[str, Any]:
    """Return the row that ``count`` processes under torchrun measure together."""
    command = [sys.executable, __file__, "--worker", *given]
    if count > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *launch, __file__, "--worker", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def options_of(arguments: argparse.Namespace, **changed: int) -> list[str]:
    """Return the options of a worker, some of them changed."""
    given = {name: getattr(arguments, name) for name in ("rows", "length", "layers", "hidden", "heads")}
    listed = [text for name, value in (given | changed).items() for text in (f"--{name}", str(value))]
    return [*listed, "--once"] if arguments.once else listed


def rows_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what the command line asks for."""
    if arguments.offload:
        yield from offloaded(arguments)
        return
    for count in arguments.processes:
        yield in_processes(count, options_of(arguments))
    if arguments.grow:
        for name, values in GROWTH.items():
            for value in values:
                yield in_processes(1, options_of(arguments, **{name: value}))


def main() -> None:
    """Print one row for each measurement, as a table of Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", type=int, default=96, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32, help="value heads of a delta layer")
    parser.add_argument("--grow", action="store_true", help="vary tokens, layers and heads")
    parser.add_argument("--offload", action="store_true", help="compare plans of offloaded weights")
    parser.add_argument("--once", action="store_true", help="time the first calibration, cold")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        row = measured(arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(row))
        return
    rows = []
    for row in rows_of(arguments):
        # A run of many rows takes minutes, and may be cut off.
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    print(markdown([list(rows[0]), *[[str(value) for value in row.values()] for row in rows]]))


if __name__ == "__main__":
    main()
