"""Shape and name laws of a program, checked once when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from qinvert.checks import check_member
from qinvert.errors import ProgramError
from qinvert.program.ports import MAX_PORTS, Meaning, Port, check_name
from qinvert.program.steps import (
    MAX_CHUNK,
    MAX_EXPANSION,
    MAX_MACS,
    MAX_RESIDUALS,
    MAX_STEPS,
    MAX_WORK,
    Add,
    Axis,
    Concat,
    Constant,
    Exponential,
    Mask,
    MatMul,
    Multiply,
    Range,
    Rescale,
    Scale,
    Shape,
    Slice,
    Step,
    Subtract,
    Transpose,
)


def infer_shapes(
    name: str, inputs: Sequence[Port], constants: Sequence[Constant], steps: Sequence[Step]
) -> Mapping[str, Shape]:
    """Return the shape of every tensor of a program, its inputs included.

    Parameters
    ----------
    name : str
        Name of the program, for messages.
    inputs, constants, steps
        See `qinvert.program.step_list.StepList`.

    Raises
    ------
    ProgramError
        If a name is unknown or defined twice, or shapes do not fit.
    """
    _check_limits(name, inputs, constants, steps)
    shapes = {port.name: port.shape for port in inputs}
    largest = max(math.prod(port.shape) for port in inputs)
    zeros = {c.name for c in constants if not any(stop > start for start, stop in c.ones)}
    known = {c.name: Shape(1, c.rows, c.columns) for c in constants}
    if len({*shapes, *known}) != len(inputs) + len(constants):
        raise ProgramError(f"{name}: two inputs or constants share a name; give each its own name")
    vectors, work = vector_inputs(inputs, steps), 0
    for step in steps:
        _check_names(step, shapes, known)
        _check_readers(step, inputs, vectors)
        if isinstance(step, Concat):
            _check_zeros(step, set(known) - zeros)
        shapes[step.output] = _bounded(step, _output_shape(step, shapes, known), largest)
        work += _work(step, shapes, max(largest, _square(inputs)))
    if work > MAX_MACS:
        raise ProgramError(
            f"{name}: {work:,} multiply-accumulates for one matrix; at most {MAX_MACS:,} are legal"
        )
    return shapes


def check_outputs(
    name: str, outputs: Sequence[Port], shapes: Mapping[str, Shape], vectors: Collection[str]
) -> None:
    """Refuse outputs that no step writes, that are vectors, or that do not have the shape of their port.

    Raises
    ------
    ProgramError
        With the port and what is there.
    """
    if not 0 < len(outputs) <= MAX_PORTS or len({port.name for port in outputs}) != len(outputs):
        raise ProgramError(f"{name}: {len(outputs)} outputs; use 1 to {MAX_PORTS}, each with its own name")
    for port in outputs:
        if port.tensor in vectors:
            raise ProgramError(f"{name}: output {port.tensor!r} is a vector input; return a tensor of a step")
        if shapes.get(port.tensor) != port.shape:
            raise ProgramError(
                f"{name}: output {port.tensor!r} must be a tensor of shape {port.shape}, "
                f"got {shapes.get(port.tensor)}"
            )


def check_partial(name: str, outputs: Sequence[Port], partial: Collection[str]) -> None:
    """Refuse outputs that are partial: what leaves a program has to be right everywhere.

    Raises
    ------
    ProgramError
        With the port.
    """
    for port in outputs:
        if port.tensor in partial:
            raise ProgramError(
                f"{name}: output {port.tensor!r} is partial, so that some of its values may be wrong; "
                "return a tensor of a step that is not"
            )


def _check_names(step: Step, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> None:
    if step.output in shapes or step.output in constants:
        raise ProgramError(f"step {step.output!r}: the name is taken; every step needs a new one")
    for name in step.inputs:
        if name not in shapes and name not in constants:
            raise ProgramError(
                f"step {step.output!r} reads {name!r}, which no earlier step writes; "
                "order the steps so that tensors are written first"
            )


def vector_inputs(inputs: Sequence[Port], steps: Sequence[Step]) -> set[str]:
    """Return the names of the inputs by which scales multiply, and always that of beta."""
    scaled = {step.vector for step in steps if isinstance(step, Scale)}
    return {port.name for port in inputs if port.meaning is Meaning.BETA} | scaled


def _check_readers(step: Step, inputs: Sequence[Port], vectors: Collection[str]) -> None:
    if isinstance(step, Scale) and step.vector not in {port.name for port in inputs}:
        raise ProgramError(
            f"step {step.output!r}: {step.vector!r} is not a vector input of the program; "
            "scale by an input with one column"
        )
    # Graphs hold a vector twice, along rows and along columns, and not as it was given.
    for name in (step.source,) if isinstance(step, Scale) else step.inputs:
        if name in vectors:
            raise ProgramError(
                f"step {step.output!r} reads the vector input {name!r}; a scale multiplies a tensor "
                "by it, and no other step may read it"
            )


def _check_limits(
    name: str, inputs: Sequence[Port], constants: Sequence[Constant], steps: Sequence[Step]
) -> None:
    # Plans come from files, so every size must be checked before memory is allocated for it.
    if not 0 < len(inputs) <= MAX_PORTS:
        raise ProgramError(f"{name}: {len(inputs)} inputs; a program has 1 to {MAX_PORTS}")
    if len(steps) > MAX_STEPS:
        raise ProgramError(f"{name}: {len(steps)} steps; at most {MAX_STEPS} are legal")
    for text in (name, *(c.name for c in constants), *(s.output for s in steps)):
        check_name(text)
    largest = MAX_EXPANSION * max(math.prod(port.shape) for port in inputs)
    for constant in constants:
        if constant.rows * constant.columns > largest:
            raise ProgramError(
                f"constant {constant.name!r} is {constant.rows} x {constant.columns}; "
                f"at most {MAX_EXPANSION} times the size of the largest input is legal"
            )


def _bounded(step: Step, shape: Shape, largest: int) -> Shape:
    if math.prod(shape) > MAX_EXPANSION * largest:
        raise ProgramError(
            f"step {step.output!r}: shape {shape} has more than {MAX_EXPANSION} times the elements of the "
            "largest input; keep tensors smaller"
        )
    return shape


def _square(inputs: Sequence[Port]) -> int:
    """Elements of a square matrix as wide as the longest input: a chunk step multiplies tokens by tokens."""
    longest = max(max(port.shape.rows, port.shape.columns) for port in inputs)
    return min(longest, MAX_CHUNK) ** 2


def _work(step: Step, shapes: Mapping[str, Shape], largest: int) -> int:
    """Multiply-accumulates of a step, checked: the size of its tensors does not bound them."""
    if not isinstance(step, MatMul):
        return 0
    work = math.prod(shapes[step.output]) * shapes[step.left].columns
    most = MAX_WORK * largest * math.isqrt(largest)
    if work > max(most, MAX_WORK * largest):
        raise ProgramError(
            f"step {step.output!r} takes {work:,} multiply-accumulates; a product may take {MAX_WORK} times "
            f"those of square matrices as large or as wide as the largest input, {most:,} here; split it"
        )
    return work


def _check_zeros(step: Concat, others: set[str]) -> None:
    # A one would mean 1.0 in floating point and one step of the grid in integers.
    for name in step.sources:
        if name in others:
            raise ProgramError(
                f"step {step.output!r}: constant {name!r} is not all zeros; only zeros can be joined"
            )


def _output_shape(step: Step, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> Shape:
    match step:
        case MatMul():
            return _matmul_shape(step, *_operands(step, shapes, constants))
        case Add() | Subtract():
            left, right = _operands(step, shapes, constants)
            return _same(step, left, right)
        case Multiply():
            return _broadcast(step, *_tensors(step, shapes))
        case Rescale() | Exponential():
            (source,) = _tensors(step, shapes)
            return source
        case Transpose():
            (source,) = _tensors(step, shapes)
            return Shape(source.blocks, source.columns, source.rows)
        case Scale():
            return _scale_shape(step, *_tensors(step, shapes))
        case Mask():
            return _mask_shape(step, shapes, constants)
        case Slice():
            (source,) = _tensors(step, shapes)
            ranges = (step.blocks, step.rows, step.columns)
            if ranges == (None, None, None):
                raise ProgramError(f"step {step.output!r}: a slice needs a range on at least one axis")
            return Shape(*(_extent(step, r, n) for r, n in zip(ranges, source, strict=True)))
        case Concat():
            return _concat_shape(step, shapes, constants)


def _tensors(step: Step, shapes: Mapping[str, Shape]) -> list[Shape]:
    for name in step.inputs:
        if name not in shapes:
            raise ProgramError(
                f"step {step.output!r}: constant {name!r} may only feed a mask or a concat, or be the right "
                "operand of a product or sum"
            )
    return [shapes[name] for name in step.inputs]


def _operands(
    step: MatMul | Add | Subtract, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]
) -> list[Shape]:
    """Shapes of what a product or sum reads: its right operand may be a constant, which all blocks share."""
    if step.right not in constants or step.left in constants:
        return _tensors(step, shapes)
    if isinstance(step, MatMul) and (step.add or step.subtract):
        raise ProgramError(
            f"step {step.output!r} adds residual terms to a product with the constant {step.right!r}; "
            "add them in a step of their own"
        )
    left, _ = _tensors(replace(step, right=step.left), shapes)
    return [left, constants[step.right]._replace(blocks=left.blocks)]


def _broadcast(step: Multiply, left: Shape, right: Shape) -> Shape:
    sizes = [max(a, b) if 1 in (a, b) or a == b else 0 for a, b in zip(left[1:], right[1:], strict=True)]
    if left.blocks != right.blocks or 0 in sizes:
        raise ProgramError(
            f"step {step.output!r}: cannot multiply {left} by {right} elementwise; sizes must agree, "
            "or one of them must be 1"
        )
    return Shape(left.blocks, *sizes)


def _matmul_shape(step: MatMul, left: Shape, right: Shape, *residuals: Shape) -> Shape:
    if left.blocks != right.blocks or left.columns != right.rows:
        raise ProgramError(f"step {step.output!r}: cannot multiply {left} by {right}; inner sizes must agree")
    shape = Shape(left.blocks, left.rows, right.columns)
    if len(residuals) > MAX_RESIDUALS:
        raise ProgramError(f"step {step.output!r}: more than {MAX_RESIDUALS} residual terms; split the sum")
    for residual in residuals:
        _same(step, shape, residual)
    return shape


def _same(step: Step, left: Shape, right: Shape) -> Shape:
    if left != right:
        raise ProgramError(f"step {step.output!r}: shapes {left} and {right} differ; a sum needs equal ones")
    return left


def _scale_shape(step: Scale, source: Shape, vector: Shape) -> Shape:
    if step.axis not in (Axis.ROWS, Axis.COLUMNS):
        raise ProgramError(f"step {step.output!r}: axis {step.axis!r} cannot be scaled; use rows or columns")
    if vector.columns != 1:
        raise ProgramError(
            f"step {step.output!r}: {step.vector!r} is not a vector input: it has the shape {vector}; "
            "scale by an input with one column"
        )
    size = source.rows if step.axis == Axis.ROWS else source.columns
    if (source.blocks, size) != vector[:2]:
        raise ProgramError(
            f"step {step.output!r}: {source} has {source.blocks} blocks of {size} {step.axis}, but the "
            f"vector is {vector}; scale whole matrices"
        )
    return source


def _mask_shape(step: Mask, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> Shape:
    source, mask = shapes.get(step.source), constants.get(step.constant)
    if source is None or mask is None or not _repeats(source[1:], mask[1:]):
        raise ProgramError(
            f"step {step.output!r}: needs a tensor and a constant of its size, got {source} and {mask}"
        )
    return mask._replace(blocks=source.blocks)


def _repeats(given: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a block of the given size can be repeated to the other one."""
    return all(a in (1, b) for a, b in zip(given, sizes, strict=True))


def _extent(step: Slice, span: Range | None, size: int) -> int:
    if span is None:
        return size
    start, stop = span
    if not 0 <= start < stop <= size:
        raise ProgramError(f"step {step.output!r}: range {span} is empty or outside [0, {size}]")
    return stop - start


def _concat_shape(step: Concat, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> Shape:
    tensors = [shapes[name] for name in step.sources if name in shapes]
    if not tensors:
        raise ProgramError(f"step {step.output!r}: a concat needs at least one tensor source")
    # A constant takes the number of blocks of the tensors it is joined with.
    parts = [
        shapes[name] if name in shapes else constants[name]._replace(blocks=tensors[0].blocks)
        for name in step.sources
    ]
    axis = list(Axis).index(check_member(Axis, f"step {step.output!r}: axis", step.axis, ProgramError))
    if axis == 0 and len(parts) != len(tensors):
        raise ProgramError(f"step {step.output!r}: constants cannot be stacked on the batch axis")
    rest = {part[:axis] + part[axis + 1 :] for part in parts}
    if len(rest) != 1:
        raise ProgramError(
            f"step {step.output!r}: cannot join {', '.join(map(str, parts))} along {step.axis}; "
            "all other axes must agree"
        )
    sizes = list(parts[0])
    sizes[axis] = sum(part[axis] for part in parts)
    return Shape(*sizes)
