"""Programs as JSON objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final

from qinvert.checks import check_member
from qinvert.errors import PlanError, lookup
from qinvert.program.ports import BETA, InversePorts, Meaning, Port, inverse_inputs, inverse_output
from qinvert.program.program import Program
from qinvert.program.step_list import StepList
from qinvert.program.steps import (
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Rescale,
    Scale,
    Shape,
    Slice,
    Step,
    Subtract,
    Transpose,
    check_chunk,
)
from qinvert.strict_json import Json, brief, require

#: Operation name in files, and the step it stands for.
OPERATIONS: Final[dict[str, type[Step]]] = {
    "matmul": MatMul,
    "add": Add,
    "subtract": Subtract,
    "multiply": Multiply,
    "exponential": Exponential,
    "rescale": Rescale,
    "scale": Scale,
    "mask": Mask,
    "transpose": Transpose,
    "slice": Slice,
    "concat": Concat,
}


#: Kinds of steps that files of the first two versions do not have.
_ADDED_KINDS: Final = (Subtract, Multiply, Exponential, Transpose)

_NAMES: Final = {kind: name for name, kind in OPERATIONS.items()}
#: Keys of the first schema, for the ports of inverses.
_VECTORS: Final = "vectors"
_HOLDS_NO_IDENTITY: Final = "implicit_identity"


def oldest_schema(program: StepList) -> int:
    """Return the version of the oldest plan files that can hold the program, see docs/plan-schema.md."""
    if any(_is_added(program, step) for step in program.steps):
        return 3
    return 1 if program.is_inverse else 2


def _is_added(program: StepList, step: Step) -> bool:
    """Whether readers of version 2 refuse the step."""
    match step:
        case Mask():
            return program.shapes[step.source] != program.shapes[step.output]
        case MatMul() | Add():
            return step.right not in program.shapes
        case _:
            return isinstance(step, _ADDED_KINDS)


def program_to_json(program: StepList) -> Json:
    """Return the program as JSON types."""
    return {
        "name": program.name,
        "chunk": program.chunk,
        "parameters": {k: v if isinstance(v, int) else str(v) for k, v in program.parameters.items()},
        "constants": [
            {"name": c.name, "rows": c.rows, "columns": c.columns, "ones": [list(r) for r in c.ones]}
            for c in program.constants
        ],
        "steps": [_step_to_json(step) for step in program.steps],
        **(_inverse_to_json(program.inverse_ports) if program.is_inverse else _ports_to_json(program)),
    }


def _inverse_to_json(ports: InversePorts) -> Json:
    # The ports of an inverse are written as in all schemas: older versions can read what they can run.
    return {
        "output": ports.result,
        _HOLDS_NO_IDENTITY: not ports.holds_identity,
        **({_VECTORS: [ports.beta]} if ports.beta else {}),
    }


def _ports_to_json(program: StepList) -> Json:
    return {
        "inputs": [_port_to_json(port) for port in program.inputs],
        "outputs": [{**_port_to_json(port), "tensor": port.tensor} for port in program.outputs],
    }


def _port_to_json(port: Port) -> Json:
    _, rows, columns = port.shape
    return {"name": port.name, "rows": rows, "columns": columns, "meaning": str(port.meaning)}


def _step_to_json(step: Step) -> Json:
    entry: Json = {"operation": _NAMES[type(step)]}
    for f in fields(step):
        value = getattr(step, f.name)
        if value != f.default:
            entry[f.name] = list(value) if isinstance(value, tuple) else value
    return entry


def program_from_json(obj: Any) -> Program:
    """Read a program and check it.

    Raises
    ------
    PlanError
        If a field is missing or of the wrong type.
    ProgramError
        If the steps do not fit together.
    """
    parameters = require(obj, "parameters", dict)
    if not all(isinstance(v, (int, str)) for v in parameters.values()):
        raise PlanError("'parameters' must map names to integers or strings")
    chunk = require(obj, "chunk", int)
    inputs, outputs = _inverse_from_json(obj, chunk) if "output" in obj else _ports_from_json(obj)
    return Program(
        name=require(obj, "name", str),
        chunk=chunk,
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        constants=tuple(_constant_from_json(c) for c in require(obj, "constants", list)),
        steps=tuple(_step_from_json(s) for s in require(obj, "steps", list)),
    )


def _inverse_from_json(obj: Any, chunk: int) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    check_chunk(chunk)
    vectors = _texts(_VECTORS, obj.get(_VECTORS, []))
    strict = require(obj, _HOLDS_NO_IDENTITY, bool)
    if vectors not in ((), (BETA,)) or (vectors and not strict):
        raise PlanError(
            f"{_VECTORS!r} is {list(vectors)}; a program takes none, or {BETA!r} with an implicit identity"
        )
    form = Meaning.FACTORED_INVERSE if vectors else Meaning.STRICT_INVERSE if strict else Meaning.INVERSE
    output = inverse_output(chunk, require(obj, "output", str), form)
    return inverse_inputs(chunk, factored=bool(vectors)), (output,)


def _ports_from_json(obj: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    inputs, outputs = (require(obj, key, list) for key in ("inputs", "outputs"))
    return (
        tuple(_port_from_json(port) for port in inputs),
        tuple(_port_from_json(port, require(port, "tensor", str)) for port in outputs),
    )


def _port_from_json(obj: Any, tensor: str = "") -> Port:
    meaning = require(obj, "meaning", str)
    return Port(
        name=require(obj, "name", str),
        shape=Shape(1, require(obj, "rows", int), require(obj, "columns", int)),
        meaning=lookup({str(m): m for m in Meaning}, meaning, "meaning of a port", PlanError),
        tensor=tensor,
    )


def _constant_from_json(obj: Any) -> Constant:
    rows, columns = require(obj, "rows", int), require(obj, "columns", int)
    ones = tuple(_range(r) for r in require(obj, "ones", list))
    return Constant(name=require(obj, "name", str), rows=rows, columns=columns, ones=ones)


def _step_from_json(obj: Any) -> Step:
    operation = require(obj, "operation", str)
    kind = OPERATIONS.get(operation)
    if kind is None:
        raise PlanError(f"operation {operation!r} is unknown; this version has {', '.join(OPERATIONS)}")
    legal = {f.name for f in fields(kind)}
    given = {key: value for key, value in obj.items() if key != "operation"}
    surplus = [key for key in given if key not in legal]
    if surplus:
        raise PlanError(f"step {given.get('output')!r}: {operation} has no field {surplus[0]!r}")
    arguments = {key: _READERS[key](key, value) for key, value in given.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise PlanError(f"step {given.get('output')!r}: {error}") from None


def _text(key: str, value: Any) -> str:
    return require({key: value}, key, str)


def _texts(key: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(key, name) for name in require({key: value}, key, list))


def _span(key: str, value: Any) -> tuple[int, int]:
    return _range(require({key: value}, key, list))


def _range(value: Any) -> tuple[int, int]:
    integers = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not integers or len(value) != 2:
        raise PlanError(f"a range must be two integers, got {brief(value)}")
    return value[0], value[1]


def _axis(_key: str, value: Any) -> Axis:
    return check_member(Axis, "axis", value, PlanError)


def _flag(key: str, value: Any) -> bool:
    found: bool = require({key: value}, key, bool)
    return found


def _number(key: str, value: Any) -> float:
    return float(require({key: value}, key, float))


_READERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "output": _text,
    "left": _text,
    "right": _text,
    "source": _text,
    "vector": _text,
    "constant": _text,
    "add": _texts,
    "subtract": _texts,
    "sources": _texts,
    "blocks": _span,
    "rows": _span,
    "columns": _span,
    "axis": _axis,
    "bound": _number,
    "partial": _flag,
    "factor": _number,
}
