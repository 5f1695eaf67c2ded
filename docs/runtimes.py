"""Write docs/runtimes.md: what each installed runtime makes of each profile, computed anew."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import qinvert
from qinvert import recall
from qinvert.errors import ExportError, VerificationError
from qinvert.export.runtimes import RUNTIMES, installed
from qinvert.export.runtimes.subprocesses import interpreter
from qinvert.export.verification.comparison import Verification
from qinvert.profiles import PROFILES
from qinvert.stress import STRESS, stress_matrices

CHUNK = 64
#: Matrices of each stress set.
COUNT = 4
#: Captured matrices of each layer of the embedded model.
CAPTURED = 64
#: Characters of a refusal that a cell repeats.
REASON = 110
BITS = {"npu-qdq-int4": 4, "npu-qdq-int16": 16, "hexagon-int16": 16}
HEAD = """# Runtimes
Written by `make measure` (`docs/runtimes.py`). The program is block merge with C = {chunk} and base 4. "Trained layers" are
{captured} matrices captured from each layer of the embedded model, with one plan for each layer; "stress" is one plan for
{stress} matrices of `qinvert.stress`. A cell says how many values differ from the simulator, and by how many steps of the
output's grid at most. T leaves QNN and RKNN as float16, so that only differences of at least half a step count there.
`verify` accepts what [the limits](limits.md) say and refuses the rest.
Products are counted by the types in which they run, as the runtime's own compiled graph names them, and for TVM as its
importer leaves them. Runtimes that are not installed here, and so have no row: {missing}.

{versions}
"""
NOTES = """
* QNN compiles context binaries for Hexagon v73, v75, v79 and v81 without CPU fallback; they run in the x86 emulator. Hexagon
  does not round as ONNX says. For int8 and int4 plans whose products are native its rounding is known bit for bit
  (`qinvert.numerics.hexagon`). Inputs become float16 and are multiplied by a float16 reciprocal of the scale, and ties go
  away from zero. An accumulator is cut to a multiple of 2^k, the largest power of two below 1/8 step, and the middle of
  what was cut off is added. The factor has 12 significant bits, and ties go up. `verify` simulates that, as
  `simulate --rounding hexagon` does, so 0 means that every integer is the emulator's. Of int16 by int8 products the last
  8 bits of the accumulator are cut off and no middle is added, which is -128 units on average; `verify` compares those
  products in `npu-qdq-int16` with ONNX's integers. Of int16 by int16 products 16 bits are cut off,
  `floor((S - 2^15 (h mod 2)) / 2^16)` with the sum h of the right operand's column; that operand ends at 32,639; then
  the factor has 22 bits, and 7 bits are kept below one step. 1,440 products, half on random scales and half on powers of two,
  1 to 128 deep, half of them with a right operand of 8 bits, gave no other value (17.7M on v73, as many on v81). A
  product with a mask whose 1 is the integer 1 is wrong by up to 11 steps on 16 bits; with integers from 16 on it was
  exact for all 65,536 values, so graphs write 2^14 with the scale 2^-14. Left and right eliminations of 16 and 64 tokens with
  integers at the ends then agree with the simulation in all 6,684,672 values on v73, v75, v79 and v81. The rows above of
  `hexagon-int16` on qnn were measured with float ends and before that.
* Whole chunk steps run on onnxruntime, OpenVINO and QNN, where the runtime itself hands the state on: [step.md](step.md)
  has what differs there. Hexagon's rounding is not known for them, so that `verify` counts differences and bounds them.
* RKNN compiles `.rknn` files for RK3588, RK3576 and RK3568; they run in the toolkit's simulator. L enters the NPU as
  float16, so `verify` gives it numbers of that precision, and simulates with the same. The toolkit multiplies the scale of
  every symmetric tensor by 128/127, also in the compiled file. It takes constants of Add and Mul as they are, and rounds
  constants of Concat to the new grid. For that reason its program (`export/runtimes/programs/rknn_program.py`) first
  multiplies all scales by 127/128, except those of constants of Add and Mul, and writes constants of Concat with their
  greatest common divisor in the scale. It also gives every reader its own DequantizeLinear: the compiler crashes where one
  DequantizeLinear serves both a float addition and an int8 product. Do the same before you load a graph yourself.
  Products that a float addition follows run in float16.
* Vela compiles TFLite files for Ethos-U85 and Ethos-U55; the values are those of TFLite's reference kernels, with which
  Arm compares its NPUs bit for bit. No converter that we found keeps QDQ products as integers, so that its program
  (`export/runtimes/programs/`) writes the file: integers only, on the grids of the graph. Float operators at both ends run
  in NumPy, as ONNX defines them, and are in no compiled file. The kernels round every result twice, to an integer of the
  accumulator times a factor in [1/2, 1), and then to the result: 43/87 becomes 1/2 and then 1. In ONNX's rounding 0.1 % of
  the values of trained layers and 1 to 4 % of those of stress sets would differ, by up to 4 steps, and the sqnr by less
  than 0.25 dB. For int8 plans `verify` simulates the kernels (`qinvert.numerics.tflite`), as `simulate --rounding tflite`
  does, so 0 means every integer. On Ethos-U85 int8 operands of int16 products are widened to int16; an Ethos-U55 leaves
  int16 products to the CPU. Vela's cycles serve its own decisions: compare them within one configuration only.
* IREE fuses QDQ products to int8, and extends the operands of MatMulInteger to int32 first. TVM multiplies what the graph
  says: float32 for QDQ, int32 for MatMulInteger.
"""


def matrices() -> dict[str, dict[str, torch.Tensor]]:
    """Return matrices by layer: what the embedded model's layers compute, and what strains the method."""
    layers = qinvert.capture(recall.load_model(), recall.sequences(CAPTURED // 32))
    trained = {name: lower.reshape(-1, CHUNK, CHUNK)[:CAPTURED] for name, lower in layers}
    stress = torch.cat([stress_matrices(name, COUNT, CHUNK, seed=7) for name in STRESS])
    return {"trained": trained, "stress": {"L": stress}}


@dataclass
class Cell:
    """What one setting of a runtime makes of one set of matrices."""

    state: str
    products: str
    differences: str


def profile_rows(
    profile: str, scales: str, data: dict[str, dict[str, torch.Tensor]], folder: Path
) -> Iterator[list[str]]:
    """Yield the rows of one profile: one per setting of a runtime."""
    found = {name: columns(profile, scales, layers, folder) for name, layers in data.items()}
    trained, stress = found["trained"], found["stress"]
    for setting in dict.fromkeys((*trained, *stress)):
        first, second = trained.get(setting), stress.get(setting)
        shown = [cell.differences if cell else "-" for cell in (first, second)]
        if first and second and first.products != second.products and second.products:
            shown[1] += f" ({second.products})"
        either = first or second
        assert either
        yield [f"`{profile}`", scales, setting, either.state, either.products, *shown]


def columns(profile: str, scales: str, layers: dict[str, torch.Tensor], folder: Path) -> dict[str, Cell]:
    """Return what every setting of every runtime makes of one plan, by the setting's name."""
    method = qinvert.block_merge(CHUNK, base=4)
    bits = BITS.get(profile, 8)
    plan = qinvert.calibrate(layers, method=method, bits=bits, target=profile, scales=scales)
    found = {}
    for runtime in installed():
        try:
            found |= cells(runtime, plan, layers, folder / "t.onnx")
        except VerificationError as error:
            found[runtime] = Cell("compiled", "", short(error))
        except ExportError as error:
            found[runtime] = Cell("refused", short(error), "")
    return found


def cells(runtime: str, plan: qinvert.Plan, layers: dict[str, torch.Tensor], file: Path) -> dict[str, Cell]:
    """Return what one runtime makes of a plan, for all layers together."""
    results: dict[str, list[Verification]] = defaultdict(list)
    for name, lower in layers.items():
        qinvert.export(plan, file, layer=name, batch=8)
        for result in qinvert.verify(file, plan, lower, runtimes=(runtime,)):
            results[result.runtime].append(result)
    return {setting: cell(found) for setting, found in results.items()}


def cell(results: Sequence[Verification]) -> Cell:
    """Join the layers of one setting."""
    products = sum((Counter(result.products) for result in results), Counter[str]())
    elsewhere = sum(len(result.elsewhere) for result in results)
    mismatches, values = (sum(getattr(r, name) for r in results) for name in ("mismatches", "values"))
    steps = f", up to {max(r.max_steps for r in results):.3g} steps" if mismatches else ""
    return Cell(
        f"compiled, {elsewhere} nodes elsewhere" if elsewhere else "compiled",
        ", ".join(f"{count // len(results)} {types}" for types, count in sorted(products.items())),
        f"{mismatches} of {values}{steps}",
    )


def short(error: Exception) -> str:
    """Return the part of a message that says why, on one line, without paths."""
    text = str(error).split("; first at")[0].split("; export it again")[0]
    crash = re.search(r"exit code -\d+", text)
    if crash:
        return f"crashed ({crash[0]})"
    text = re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text.rsplit(" | ", 1)[-1])
    words = ["..." if word.count("/") > 1 else word for word in text.replace("|", "/").split()]
    line = " ".join(words)
    return line if len(line) <= REASON else line[:REASON].rsplit(" ", 1)[0] + " ..."


def versions() -> str:
    """Return the versions of what is installed, as each interpreter tells them."""
    lines = []
    for name in installed():
        runtime = RUNTIMES[name]
        packages = [part.split("[")[0] for part in runtime.requirement.split()]
        code = f"from importlib.metadata import version as v; print(', '.join(p + ' ' + v(p) for p in {packages!r}))"
        python = interpreter(name, runtime.module)
        told = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
        lines.append(f"* {name}: {told.stdout.strip()}")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="append", choices=tuple(PROFILES), help="all by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "runtimes.md")
    arguments = parser.parse_args()
    titles = ["profile", "scales", "runtime", "", "products, or why refused", "trained layers", "stress"]
    lines = [titles, ["---"] * len(titles)]
    data = matrices()
    with TemporaryDirectory() as folder:
        for name in arguments.profile or PROFILES:
            kinds = ("pow2",) if PROFILES[name].power_of_two_scales else ("float", "pow2")
            for scales in kinds if not PROFILES[name].exact else ("float",):
                lines += profile_rows(name, scales, data, Path(folder))
    missing = ", ".join(sorted(set(RUNTIMES) - set(installed()))) or "none"
    head = HEAD.format(
        chunk=CHUNK, stress=COUNT * len(STRESS), captured=CAPTURED, missing=missing, versions=versions()
    )
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    arguments.output.write_text(f"{head}\n{table}{NOTES}")


if __name__ == "__main__":
    main()
