"""What a chunk step does with values: the right-hand side, T applied to it, outputs and the new state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from qinvert.chunk_step._constants import identity
from qinvert.chunk_step._key_path import Decays, Keys, Oriented, query_bound
from qinvert.chunk_step.form import Form
from qinvert.chunk_step.ports import BETA, KEY, NEW_VALUES, QUERY, READ_STATE, STATE, VALUE
from qinvert.program.ports import MATRIX
from qinvert.program.program import Program
from qinvert.program.steps import Axis
from qinvert.program.transposition import transposed

#: Tensors of the outputs.
NEW_STATE: Final = "state/new"
#: What names of the inverse's tensors begin with.
INVERSE_PREFIX: Final = "inverse/"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPath:
    """What the values meet; stored, see `qinvert.chunk_step._key_path`."""

    #: M, strictly lower triangular.
    matrix: str
    #: ``tril(q k^T D)``.
    scores: str
    decays: Decays
    #: Keys and queries.
    both: Keys


@dataclass(frozen=True, kw_only=True)
class ValuePath:
    """Appends the steps from values and the old state to outputs and the new state."""

    o: Oriented
    keys: KeyPath
    inverse: Program
    form: Form
    #: Whether products read the state on a grid of its own.
    error_feedback: bool

    def append(self) -> tuple[str, str]:
        """Append the steps; return the tensors of the output and of the new state."""
        values = self._new_values()
        return self._output(values), self._state(values)

    @property
    def _folds(self) -> bool:
        """Whether decays are factors of keys, and not of rows of values; those of channels must be."""
        return self.form is not Form.STATE or self.o.sizes.per_channel

    @cached_property
    def _beta(self) -> str:
        return self.o.for_values(BETA, self.o.max_beta)

    @cached_property
    def _reads(self) -> str:
        return self.o.for_values(self.keys.decays.reads, 1.0)

    @cached_property
    def _state_read(self) -> str:
        """The state as products read it."""
        return self.o.steps.rescale(READ_STATE, STATE) if self.error_feedback else STATE

    def _new_values(self) -> str:
        match self.form:
            case Form.FOLDED:
                difference = self.o.steps.subtract("rhs", VALUE, self._predicted())
                return self._solved(NEW_VALUES, difference, folded=True)
            case Form.WY:
                return self._separate()
            case Form.STATE:
                return self._solved(NEW_VALUES, self._right_hand_side(), folded=False)

    def _predicted(self) -> str:
        """``(exp(G) k) S``: what the old state predicts."""
        return self.o.product("v_predicted", self._decayed(KEY, 1.0), self._state_read)

    def _decayed(self, port: str, bound: float) -> str:
        name = self._stored(port)
        return self.o.steps.multiply(f"{port}/decayed", name, self.keys.decays.reads, bound)

    def _stored(self, port: str) -> str:
        """Keys or queries as stored matrices are."""
        return self.keys.both.turned[port] if self.o.flipped else self.keys.both.plain[port]

    def _written(self) -> str:
        """``(exp(G_C - G) k)^T``, stored."""
        steps, both, decay = self.o.steps, self.keys.both, self.keys.decays.writes
        if not self.o.flipped:
            return steps.multiply("k/written", both.turned[KEY], decay, 1.0)
        if not self.o.sizes.keys_first:
            return steps.multiply("k/written", both.plain[KEY], decay, 1.0)
        # A row is repeated at less cost than a column.
        return steps.transpose(
            "k/written", steps.multiply("k/written/turned", both.turned[KEY], decay, 1.0), 1.0
        )

    def _right_hand_side(self) -> str:
        steps = self.o.steps
        if self._folds:
            error = steps.subtract("v_error", VALUE, self._predicted())
            return steps.multiply("rhs", error, self._beta)
        predicted = self.o.product("v_predicted", self._stored(KEY), self._state_read)
        factor = steps.multiply("beta/decayed", self._beta, self._reads, self.o.max_beta)
        return steps.subtract(
            "rhs",
            steps.multiply("v/beta", VALUE, self._beta),
            steps.multiply("v_predicted/beta", predicted, factor),
        )

    def _separate(self) -> str:
        """``U - W S`` with ``U = T (beta v)`` and ``W = T (beta exp(G) k)``."""
        steps = self.o.steps
        keys = steps.multiply("k/decayed/beta", self._decayed(KEY, 1.0), BETA, self.o.max_beta)
        inverse = self._inverse(self.keys.matrix)
        u = self.o.product("U", inverse, steps.multiply("v/beta", VALUE, self._beta))
        # Row i of T diag(beta) is a product of contractions, as those of S are.
        w = self.o.product("W", inverse, keys, self._inverse_bound)
        return steps.subtract(NEW_VALUES, u, self.o.product("v_predicted", w, self._state_read))

    def _solved(self, name: str, source: str, *, folded: bool) -> str:
        if self.inverse.chunk < self.o.sizes.chunk:
            return self._by_halves(name, source, folded=folded)
        inverse = self._inverse(self.keys.matrix)
        if folded:
            inverse = self._times_beta("T/beta", inverse, "")
        return self.o.product(name, inverse, source)

    @property
    def _inverse_bound(self) -> float:
        return max(1.0, self.o.max_beta)

    def _inverse(self, matrix: str, copies: int = 1) -> str:
        """``T = I + S`` of a stored M, for every one of its blocks."""
        program = transposed(self.inverse) if self.o.flipped else self.inverse
        steps, max_beta = self.o.steps, self.o.max_beta
        (strict,) = steps.inline(program, {MATRIX: matrix}, INVERSE_PREFIX, copies, max_beta).values()
        return steps.add("T", strict, identity(self.inverse.chunk), self._inverse_bound)

    def _times_beta(self, name: str, inverse: str, half: str) -> str:
        """``T diag(beta)``."""
        column = f"beta/turned{half}"
        source = self._tokens(f"beta{half}", BETA, lower=half == "/lower") if half else BETA
        self.o.steps.transpose(column, source, self.o.max_beta)
        return self.o.steps.multiply(name, inverse, column, self.o.max_beta * self._inverse_bound)

    def _tokens(self, name: str, source: str, *, lower: bool) -> str:
        """Slice one half of the tokens out of stored rows."""
        half = self.o.sizes.chunk // 2
        span = (half, 2 * half) if lower else (0, half)
        if self.o.flipped:
            return self.o.steps.slice(name, source, columns=span)
        return self.o.steps.slice(name, source, rows=span)

    def _by_halves(self, name: str, source: str, *, folded: bool) -> str:
        """Apply the last level of the inverse to values: ``x1 = T1 r1``, ``x2 = T2 (r2 + M21 x1)``."""
        first, second, below = self._halves(folded=folded)
        upper, lower = (
            self._tokens(f"{source}/{side}", source, lower=side == "lower") for side in ("upper", "lower")
        )
        x1 = self.o.product(f"{name}/upper", first, upper)
        x2 = self.o.steps.add(
            f"{name}/lower",
            self.o.product(f"{name}/lower/below", below, x1),
            self.o.product(f"{name}/lower/diagonal", second, lower),
        )
        return self.o.steps.concat(name, [x1, x2], Axis.COLUMNS if self.o.flipped else Axis.ROWS)

    def _halves(self, *, folded: bool) -> tuple[str, str, str]:
        """T1, T2, each times beta if it is folded, and ``T2 M21``."""
        steps, half = self.o.steps, self.o.sizes.chunk // 2
        upper, lower = (0, half), (half, 2 * half)
        blocks = [
            steps.slice(f"M/{name}", self.keys.matrix, rows=span, columns=span, bound=self.o.max_beta)
            for name, span in (("upper", upper), ("lower", lower))
        ]
        stack = steps.concat("M/blocks", list(blocks), Axis.BLOCKS, self.o.max_beta)
        both = self._inverse(stack, copies=2)
        inverses = [
            steps.slice(f"T/{name}", both, blocks=(i, i + 1), bound=self._inverse_bound)
            for i, name in enumerate(("upper", "lower"))
        ]
        rows, columns = (upper, lower) if self.o.flipped else (lower, upper)
        corner = steps.slice("M/below", self.keys.matrix, rows=rows, columns=columns, bound=self.o.max_beta)
        below = self.o.product("T/below", inverses[1], corner, self.o.max_beta)
        if folded:
            inverses = [
                self._times_beta(f"{tensor}/beta", tensor, side)
                for tensor, side in zip(inverses, ("/upper", "/lower"), strict=True)
            ]
        return inverses[0], inverses[1], below

    def _output(self, values: str) -> str:
        """``O = (exp(G) q) S + scores V'``."""
        if self._folds:
            old = self.o.product("o/old", self._decayed(QUERY, query_bound(self.o)), self._state_read)
        else:
            read = self.o.product("o/read", self._stored(QUERY), self._state_read)
            old = self.o.steps.multiply("o/old", read, self._reads)
        new = self.o.product("o/new", self.keys.scores, values)
        return self.o.steps.add("o", old, new)

    def _state(self, values: str) -> str:
        """``S' = exp(G_C) S + (exp(G_C - G) k)^T V'``."""
        steps, decays, written = self.o.steps, self.keys.decays, self._written()
        old = steps.multiply("state/kept", STATE, decays.kept)
        return steps.add(NEW_STATE, old, self.o.product("state/written", written, values))
