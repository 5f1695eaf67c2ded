"""Programs of inverses, built step by step."""

from qinvert.program.ports import Meaning, inverse_inputs, inverse_output
from qinvert.program.program import Program
from qinvert.program.steps import check_chunk


def inverse_program(
    *steps, chunk=4, name="test", output=None, constants=(), factored=False, identity=False, **fields
):
    """A program that returns ``output``, or its last step, as S, as W if factored, or as T."""
    form = Meaning.FACTORED_INVERSE if factored else Meaning.INVERSE if identity else Meaning.STRICT_INVERSE
    check_chunk(chunk)
    output = output or (steps[-1].output if steps else "M")
    return Program(
        name=name,
        chunk=chunk,
        inputs=inverse_inputs(chunk, factored),
        outputs=(inverse_output(chunk, output, form),),
        constants=tuple(constants),
        steps=steps,
        **fields,
    )
