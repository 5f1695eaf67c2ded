"""Compiles the integers of a QDQ graph with Arm's Vela for Ethos-U, and runs TFLite's reference kernels.

An Ethos-U has no float operators.  What stands before the first QuantizeLinear and behind the last
DequantizeLinear runs here in NumPy, as ONNX defines it, and is in no compiled file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ethosu.vela import vela
from protocol import Answer, Array, main, request
from quantized_graph import QuantizedGraph, read, stored_once
from tflite_writer import operand_element, write


@dataclass(frozen=True, slots=True)
class Chip:
    """A configuration of Vela, with the names of its file ``Arm/vela.ini``."""

    system: str
    memory: str
    #: Whether constants that are alike for all matrices are stored once.  It halves the cycles of dense
    #: elimination on an Ethos-U85, which reads them from DRAM, and costs some programs a quarter on a U55.
    once: bool


CHIPS = {
    "ethos-u85-256": Chip("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB", once=True),
    "ethos-u55-128": Chip("Ethos_U55_High_End_Embedded", "Shared_Sram", once=False),
}
#: Columns of Vela's summary by what they are, in bytes.
TRAFFIC = {
    "SRAM": "sram_total_bytes",
    "DRAM": "dram_total_bytes",
    "on-chip flash": "on_chip_flash_total_bytes",
    "off-chip flash": "off_chip_flash_total_bytes",
}
#: The same, in cycles.
PARTS = {
    "NPU": "cycles_npu",
    "SRAM": "cycles_sram_access",
    "DRAM": "cycles_dram_access",
    "on-chip flash": "cycles_on_chip_flash_access",
    "off-chip flash": "cycles_off_chip_flash_access",
}


def run(model: Path, feeds: list[dict[str, Array]], folder: Path) -> Iterator[Answer]:
    """Compile for every chip, or without feeds for those that are asked for."""
    asked, keep = request(folder)
    given = read(onnx.load(model))
    for hardware in CHIPS if feeds else asked:
        graph = stored_once(given) if CHIPS[hardware].once else given
        content = write(graph) if graph.operators else b""
        outputs = executed(graph, content, feeds)
        left, answer = graph.float_products(), dict[str, Any]()
        if content:
            file = compiled(hardware, content, folder)
            others = cpu_operators(file)
            left = [*left, *others]
            answer["kept"] = [file.name] if keep else []
            if hardware in asked:
                answer["estimate"] = {"hardware": hardware, "uncosted": len(others), **cost(hardware, folder)}
        elif hardware in asked:
            raise SystemExit(f"the graph has no operators on integers: nothing of it runs on {hardware}")
        yield hardware, outputs, products(graph), left, answer


def executed(graph: QuantizedGraph, content: bytes, feeds: list[dict[str, Array]]) -> list[Array]:
    """Return the graph's first output for every call."""
    given = [graph.quantized(feed) for feed in feeds]
    if not content:
        return [graph.returned(feed, integers)[0] for feed, integers in zip(feeds, given, strict=True)]
    kernels = OpResolverType.BUILTIN_REF
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    return [
        graph.returned(feed, invoked(interpreter, integers))[0]
        for feed, integers in zip(feeds, given, strict=True)
    ]


def invoked(interpreter: Any, integers: dict[str, Array]) -> dict[str, Array]:
    """Return every output of one call by its name."""
    for given in interpreter.get_input_details():
        interpreter.set_tensor(given["index"], integers[given["name"]])
    interpreter.invoke()
    return {made["name"]: interpreter.get_tensor(made["index"]) for made in interpreter.get_output_details()}


def compiled(hardware: str, content: bytes, folder: Path) -> Path:
    """Return the file that Vela makes for a chip; its reports are beside it."""
    source, chip = folder / f"{hardware}.tflite", CHIPS[hardware]
    source.write_bytes(content)
    options = {
        "--accelerator-config": hardware,
        "--config": "Arm/vela.ini",
        "--system-config": chip.system,
        "--memory-mode": chip.memory,
        "--output-dir": str(folder),
    }
    words = [word for option in options.items() for word in option]
    # In this process: Vela takes longer to start than to compile a graph.
    vela.main([str(source), *words])
    target = folder / f"{hardware}_vela.tflite"
    if not target.is_file():
        raise SystemExit(f"Vela leaves no file for {hardware}")
    return target


def cpu_operators(file: Path) -> list[str]:
    """Operators of a compiled file that no NPU runs, by the names of what they write."""
    model = schema.ModelT.InitFromPackedBuf(file.read_bytes())
    (part,) = model.subgraphs
    codes = [model.operatorCodes[operator.opcodeIndex] for operator in part.operators]
    return [
        part.tensors[operator.outputs[0]].name.decode()
        for operator, code in zip(part.operators, codes, strict=True)
        if code.customCode != b"ethos-u"
    ]


def cost(hardware: str, folder: Path) -> dict[str, Any]:
    """What Vela's summary says of the graph, with the names of the protocol."""
    chip = CHIPS[hardware]
    with (folder / f"{hardware}_summary_{chip.system}.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    source = (
        f"estimated by Arm's Vela compiler {version('ethos-u-vela')} for {hardware} ({chip.system}, "
        f"{chip.memory}), for its own decisions and not measured; compare within one configuration only"
    )
    return {
        "cycles": int(row["cycles_total"]),
        "parts": {name: int(row[column]) for name, column in PARTS.items() if int(row[column])},
        "traffic": {name: int(row[column]) for name, column in TRAFFIC.items() if int(row[column])},
        "source": source,
    }


def products(graph: QuantizedGraph) -> dict[str, str]:
    """Types of the operands of every product, by node."""
    found = dict.fromkeys(graph.float_products(), "float32 x float32")
    for operator in graph.operators:
        if operator.kind == "MatMul":
            found[operator.name] = f"{operand_element(operator)} x {operand_element(operator)}"
    return found


if __name__ == "__main__":
    main(run)
