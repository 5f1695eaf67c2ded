"""Shape and name laws of a program, checked once when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qinvert.errors import ProgramError
from qinvert.program.program import Program
from qinvert.program.steps import (
    BETA,
    INPUT,
    MAX_EXPANSION,
    MAX_NAME,
    MAX_RESIDUALS,
    MAX_STEPS,
    Add,
    Axis,
    Concat,
    Mask,
    MatMul,
    Range,
    Rescale,
    Scale,
    Shape,
    Slice,
    Step,
)


def infer_shapes(program: Program) -> Mapping[str, Shape]:
    """Return the shape of every tensor of ``program``.

    Raises
    ------
    ProgramError
        If a name is unknown or defined twice, shapes do not fit, or the
        output is not ``[1, C, C]``.
    """
    whole = Shape(1, program.chunk, program.chunk)
    _check_limits(program)
    _check_vectors(program)
    shapes = {INPUT: whole} | dict.fromkeys(program.vectors, Shape(1, program.chunk, 1))
    zeros = {c.name for c in program.constants if not any(stop > start for start, stop in c.ones)}
    constants = {c.name: Shape(1, c.rows, c.columns) for c in program.constants}
    if len(constants) != len(program.constants) or not shapes.keys().isdisjoint(constants):
        raise ProgramError(f"{program.name}: two constants share a name, or one is called {INPUT!r}")
    for step in program.steps:
        if step.output in shapes or step.output in constants:
            raise ProgramError(f"step {step.output!r}: the name is taken; every step needs a new one")
        for name in step.inputs:
            if name not in shapes and name not in constants:
                raise ProgramError(
                    f"step {step.output!r} reads {name!r}, which no earlier step writes; "
                    "order the steps so that tensors are written first"
                )
        if isinstance(step, Concat):
            _check_zeros(step, set(constants) - zeros)
        _check_readers(step, program.vectors)
        shapes[step.output] = _bounded(step, _output_shape(step, shapes, constants), whole)
    _check_output(program, shapes, whole)
    return shapes


def _check_vectors(program: Program) -> None:
    if program.vectors not in ((), (BETA,)):
        raise ProgramError(f"{program.name}: vectors {program.vectors!r}; use none or ({BETA!r},)")
    if program.vectors and not program.implicit_identity:
        raise ProgramError(
            f"{program.name}: with a vector the result is W = (T - I) / beta, without identity"
        )


def _check_readers(step: Step, vectors: tuple[str, ...]) -> None:
    if isinstance(step, Scale) and step.vector not in vectors:
        raise ProgramError(f"step {step.output!r}: {step.vector!r} is no vector input of the program")
    for name in (step.source,) if isinstance(step, Scale) else step.inputs:
        if name in vectors:
            raise ProgramError(
                f"step {step.output!r} reads the vector input {name!r}; a scale multiplies a tensor by it, "
                "no other step may read it"
            )


def _check_limits(program: Program) -> None:
    # Plans come from files: what a reader allocates must be bounded before it is allocated.
    if len(program.steps) > MAX_STEPS:
        raise ProgramError(f"{program.name}: {len(program.steps)} steps; at most {MAX_STEPS} are legal")
    for name in (program.name, *(c.name for c in program.constants), *(s.output for s in program.steps)):
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ProgramError(
                f"name {name[:MAX_NAME]!r} has {len(name)} characters; use 1 to {MAX_NAME}, all printable"
            )
    for constant in program.constants:
        if constant.rows * constant.columns > MAX_EXPANSION * program.chunk**2:
            raise ProgramError(
                f"constant {constant.name!r} is {constant.rows} x {constant.columns}; "
                f"at most {MAX_EXPANSION} times the size of M is legal"
            )


def _bounded(step: Step, shape: Shape, whole: Shape) -> Shape:
    if math.prod(shape) > MAX_EXPANSION * math.prod(whole):
        raise ProgramError(
            f"step {step.output!r}: shape {shape} has more than {MAX_EXPANSION} times the elements of M; "
            "keep tensors smaller"
        )
    return shape


def _check_zeros(step: Concat, others: set[str]) -> None:
    # A one would mean 1.0 in floating point and one step of the grid in integers.
    for name in step.sources:
        if name in others:
            raise ProgramError(
                f"step {step.output!r}: constant {name!r} is not all zeros; only zeros can be joined"
            )


def _check_output(program: Program, shapes: Mapping[str, Shape], whole: Shape) -> None:
    if shapes.get(program.output) != whole:
        raise ProgramError(
            f"{program.name}: output {program.output!r} must be a tensor of shape {whole}, "
            f"got {shapes.get(program.output)}"
        )


def _output_shape(step: Step, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> Shape:
    match step:
        case MatMul():
            return _matmul_shape(step, *_tensors(step, shapes))
        case Add():
            left, right = _tensors(step, shapes)
            return _same(step, left, right)
        case Rescale():
            (source,) = _tensors(step, shapes)
            return source
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
            raise ProgramError(f"step {step.output!r}: constant {name!r} may only feed a mask or a concat")
    return [shapes[name] for name in step.inputs]


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
    size = source.rows if step.axis == Axis.ROWS else source.columns
    if (source.blocks, size) != vector[:2]:
        raise ProgramError(
            f"step {step.output!r}: {source} has {source.blocks} blocks of {size} {step.axis}, the vector is "
            f"{vector}; scale whole matrices"
        )
    return source


def _mask_shape(step: Mask, shapes: Mapping[str, Shape], constants: Mapping[str, Shape]) -> Shape:
    source, mask = shapes.get(step.source), constants.get(step.constant)
    if source is None or mask is None or source[1:] != mask[1:]:
        raise ProgramError(
            f"step {step.output!r}: needs a tensor and a constant of its size, got {source} and {mask}"
        )
    return source


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
    if step.axis not in list(Axis):
        raise ProgramError(f"step {step.output!r}: axis {step.axis!r} is unknown; use {', '.join(Axis)}")
    axis = list(Axis).index(step.axis)
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
