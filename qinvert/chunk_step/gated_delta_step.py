"""`qinvert.gated_delta_step`: the program of a whole chunk step."""

from __future__ import annotations

from typing import Final

from qinvert.checks import check_integer, check_member, check_power_of_two
from qinvert.chunk_step._key_path import (
    Oriented,
    append_decays,
    append_keys,
    append_log_decays,
    append_products,
)
from qinvert.chunk_step._value_path import KeyPath, ValuePath
from qinvert.chunk_step.form import Decay, Form
from qinvert.chunk_step.ports import NAME, StepSizes
from qinvert.errors import ProgramError
from qinvert.program.builder import StepBuilder
from qinvert.program.ports import Meaning
from qinvert.program.program import Program
from qinvert.program.residual_sums import PARAMETER, SUMS, has_sums
from qinvert.program.steps import MAX_BETA, MAX_CHUNK

#: Largest key and value; models use 64 to 256.
MAX_SIZE: Final = 1024


def gated_delta_step(
    inverse: Program,
    key_size: int,
    value_size: int,
    decay: str = "scalar",
    form: str = "folded",
    *,
    values_first: bool = True,
    keys_first: bool | None = None,
    halves: bool = False,
    error_feedback: bool = False,
    max_beta: float = 1.0,
) -> Program:
    """``O = (q e^G) S + tril(q k^T D) V'``, ``S' = e^{G_C} S + (k e^{G_C - G})^T V'`` for one head and chunk.

    With ``G = cumsum(g)``, ``D[i, j] = exp(G_i - G_j)``, ``L = strict_tril(beta k k^T D)`` and
    ``T = (I + L)^-1`` by the steps of ``inverse``,

        V' = T (beta (v - (k e^G) S)).

    With one log decay per channel, every product of keys and queries is
    ``sum_d a_i[d] b_j[d] exp(G_i[d] - G_j[d])``.  It is summed over log2(C) levels: two tokens
    on different sides of the middle p of a block meet over it,
    ``exp(G_i - G_p) exp(G_p - G_j)``.  No exponent is ever positive, and none is a
    difference of two sums: each is a sum over its own tokens, a product with a triangle of ones.

    Parameters
    ----------
    inverse : Program
        Maps M to S of ``T = I + S``, for chunks of C tokens, or of C / 2 with ``halves``.
    key_size, value_size : int
        Dk and Dv.
    decay : {"scalar", "channel"}
        Whether a head has one log decay, or each channel of its keys; see
        `qinvert.chunk_step.form.Decay`.
    form : {"folded", "wy", "state"}
        Where beta and decays enter, see `qinvert.chunk_step.form.Form`.
    values_first : bool
        Whether v, o and the state are stored transposed, ``[Dv, C]`` and ``[Dv, Dk]``.  Values are then
        the left operands of all products: targets multiply 16 bits from the left by 8 from the right.
    keys_first : bool, optional
        Whether q, k, and g of channels are taken transposed, ``[Dk, C]``; as values are, if left out.
        Compilers for NPUs then need one transpose in place of three.
    halves : bool
        Apply the last level of the inverse to values in place of forming T:
        ``x1 = T1 r1``, ``x2 = T2 r2 + (T2 M21) x1``.
    error_feedback : bool
        Round the state once more for the products that read it, onto a grid of its own, and carry it as
        it is: ``S_carried = S_read + E``, and what rounding loses, E, is part of the next state.
    max_beta : float
        Largest beta, at most 2; ranges are proved for it.

    Returns
    -------
    Program
        Inputs ``q`` and ``k`` (queries scaled, keys of norm 1), ``v``, ``state``, ``beta`` (a row or
        column) and ``g`` (``[1, C]``, or a log decay per channel as keys are; at most 0); outputs ``o``
        and ``state``.  Exact in real arithmetic, but that sums of log decays end at -16 in integers.

    Raises
    ------
    ProgramError
        If an option is not legal, or ``inverse`` does not map M to S.

    References
    ----------
    Gated DeltaNet, arXiv 2412.06464, section 3.3; Kimi Linear, arXiv 2510.26692, section 3.
    """
    chunk, mode = _check_inverse(inverse, halves), check_member(Form, "form", form, ProgramError)
    if halves and mode is Form.WY:
        raise ProgramError(
            "halves=True applies T to one tensor, but form 'wy' has two; use 'folded' or 'state'"
        )
    if not isinstance(max_beta, (int, float)) or not 0 < max_beta <= MAX_BETA:
        raise ProgramError(
            f"max_beta {max_beta!r} is not in (0, {MAX_BETA:g}]; 1 fits gates that are sigmoids"
        )
    sizes = StepSizes(
        chunk=chunk,
        key_size=check_integer("key_size", key_size, 1, MAX_SIZE, ProgramError),
        value_size=check_integer("value_size", value_size, 1, MAX_SIZE, ProgramError),
        per_channel=check_member(Decay, "decay", decay, ProgramError) is Decay.CHANNEL,
        values_first=bool(values_first),
        keys_first=bool(values_first if keys_first is None else keys_first),
    )
    steps = StepBuilder()
    oriented = Oriented(steps=steps, sizes=sizes, max_beta=float(max_beta))
    outputs = sizes.outputs(*_append(oriented, inverse, mode, bool(error_feedback)))
    return Program(
        name=NAME,
        chunk=chunk,
        parameters=_parameters(inverse, sizes, mode, halves, error_feedback),
        inputs=sizes.inputs(),
        outputs=outputs,
        constants=tuple(steps.constants.values()),
        steps=tuple(steps.steps),
    )


def _append(o: Oriented, inverse: Program, form: Form, error_feedback: bool) -> tuple[str, str]:
    both, g = append_keys(o), append_log_decays(o)
    products = append_products(o, g, both)
    keys = KeyPath(matrix=products.matrix, scores=products.scores, decays=append_decays(o, g), both=both)
    path = ValuePath(o=o, keys=keys, inverse=inverse, form=form, error_feedback=error_feedback)
    return path.append()


def _parameters(
    inverse: Program, sizes: StepSizes, form: Form, halves: bool, error_feedback: bool
) -> dict[str, int | str]:
    return {
        "inverse": inverse.title,
        "key_size": sizes.key_size,
        "value_size": sizes.value_size,
        "decay": str(Decay.CHANNEL if sizes.per_channel else Decay.SCALAR),
        "form": str(form),
        "values_first": sizes.values_first,
        "keys_first": sizes.keys_first,
        "halves": bool(halves),
        **({"error_feedback": True} if error_feedback else {}),
        **({PARAMETER: SUMS} if has_sums(inverse) else {}),
    }


def _check_inverse(inverse: Program, halves: bool) -> int:
    """Return the size of the chunk."""
    fits = isinstance(inverse, Program) and inverse.is_inverse
    if not fits or inverse.inverse_ports.form is not Meaning.STRICT_INVERSE:
        given = inverse.title if isinstance(inverse, Program) else type(inverse).__name__
        raise ProgramError(
            f"inverse {given} does not map M to S of T = I + S; pass for example elimination(64)"
        )
    return check_power_of_two("chunk", inverse.chunk * (2 if halves else 1), 2, MAX_CHUNK, ProgramError)
