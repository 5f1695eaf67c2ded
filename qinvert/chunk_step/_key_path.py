"""Everything of a chunk step that needs no values: decays, M, scores, and the keys that meet values.

A *stored* tensor is transposed where the step holds values first, because then
values are the left operands of all products.
"""

from __future__ import annotations

from dataclasses import dataclass

from qinvert.chunk_step._constants import (
    below_pivots,
    full,
    identity,
    sums_to_pivots,
    triangle,
)
from qinvert.chunk_step.ports import BETA, KEY, LOG_DECAY, MAX_LOG_DECAY, NEGATIVE_BETA, QUERY, StepSizes
from qinvert.program.builder import StepBuilder
from qinvert.program.steps import Constant

#: What the name of an exponential ends with that is stored as wide as its source.
EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True, kw_only=True)
class Oriented:
    """Appends steps on matrices that are stored as they are, or all transposed."""

    steps: StepBuilder
    sizes: StepSizes
    #: Largest beta.
    max_beta: float

    @property
    def flipped(self) -> bool:
        """Whether matrices are stored transposed."""
        return self.sizes.values_first

    def product(self, name: str, left: str, right: str, bound: float | None = None) -> str:
        """``left @ right`` of stored matrices."""
        first, second = (right, left) if self.flipped else (left, right)
        return self.steps.matmul(name, first, second, bound=bound)

    def exponential(self, name: str, source: str) -> str:
        """``exp(source)``, on a grid of its own first: targets keep the width of an exponential's source."""
        return self.steps.rescale(name, self.steps.exponential(f"{name}/{EXPONENTIAL}", source), bound=1.0)

    def for_values(self, source: str, bound: float) -> str:
        """Return a factor of values on a grid of its own: it needs their width, and keys need another one."""
        return self.steps.rescale(f"{source}/for_values", source, bound=bound)

    def lower(self, name: str, source: str, *, strict: bool, bound: float) -> str:
        """Keep what lies below the diagonal."""
        constant = triangle(self.sizes.chunk, upper=self.flipped, strict=strict)
        return self.steps.mask(name, source, constant, bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decays:
    """Exponentials of sums of log decays; a number for each token, or one for each of its channels."""

    #: ``exp(G_i)``, a factor of row i of keys and queries that read the old state; stored.
    reads: str
    #: ``exp(G_C - G_j)``, a factor of row j of keys that write the new state; along columns.
    writes: str
    #: ``exp(G_C)``, a factor of the rows of the state; stored.
    kept: str


def append_decays(o: Oriented, g: str) -> Decays:
    """Append the decays to and from the ends of the chunk; ``g`` is ``[1, C]`` or ``[Dk, C]``."""
    c = o.sizes.chunk
    reads = _exponential(o, "decay_reads", g, triangle(c, upper=True, strict=False), turned=not o.flipped)
    # Rows of tokens are what stored keys have, or what is transposed after they were multiplied.
    column = o.flipped and not o.sizes.keys_first
    writes = _exponential(o, "decay_writes", g, triangle(c, upper=False, strict=True), turned=column)
    return Decays(reads=reads, writes=writes, kept=_kept(o, g))


def _exponential(o: Oriented, name: str, g: str, sums: Constant, *, turned: bool) -> str:
    """``exp(g @ sums)``, transposed if it is turned."""
    total = o.steps.matmul(f"{name}/log", g, sums, bound=MAX_LOG_DECAY)
    result = o.exponential(f"{name}/row" if turned else name, total)
    return o.steps.transpose(name, result, 1.0) if turned else result


def _kept(o: Oriented, g: str) -> str:
    sizes = o.sizes
    # One number for each row of the state, where it is stored whole; else one that all of them share.
    wide = 1 if sizes.per_channel else (sizes.key_size if o.flipped else sizes.value_size)
    total = o.steps.matmul("decay_kept/log", g, full(sizes.chunk, wide), bound=MAX_LOG_DECAY)
    turned = sizes.per_channel and o.flipped
    result = o.exponential("decay_kept/column" if turned else "decay_kept", total)
    return o.steps.transpose("decay_kept", result, 1.0) if turned else result


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Decayed products of keys with keys and with queries; stored."""

    #: M, strictly lower triangular.
    matrix: str
    #: ``tril(q k^T D)``.
    scores: str


def append_products(o: Oriented, g: str, keys: Keys) -> Products:
    """Append M and the scores."""
    negative = o.steps.rescale(NEGATIVE_BETA, BETA, -1.0, o.max_beta)
    if o.sizes.per_channel:
        return _by_halves(o, g, keys, negative)
    decay = _segments(o, g)
    gram = o.steps.matmul("gram", keys.plain[KEY], keys.turned[KEY], bound=1.0)
    factors = o.steps.multiply("D/beta", decay, negative, o.max_beta)
    whole = o.steps.multiply("M/whole", gram, factors, o.max_beta)
    products = _whole_scores(o, "scores/decayless", keys)
    kept = o.lower("D/lower", decay, strict=False, bound=1.0)
    return Products(
        matrix=o.lower("M", whole, strict=True, bound=o.max_beta),
        scores=o.steps.multiply("scores", products, kept, query_bound(o)),
    )


def _segments(o: Oriented, g: str) -> str:
    """``D[i, j] = exp(sum_{j < l <= i} g_l)``, stored; 1 above the diagonal."""
    c = o.sizes.chunk
    # Row i of the first matrix holds the log decays up to i, the second one adds those after j.
    until = triangle(c, upper=o.flipped, strict=o.flipped)
    after = triangle(c, upper=o.flipped, strict=not o.flipped)
    masked = o.steps.mask("D/terms", g, until, MAX_LOG_DECAY)
    total = o.steps.matmul("D/log", masked, after, bound=MAX_LOG_DECAY)
    return o.exponential("D", total)


def _by_halves(o: Oriented, g: str, keys: Keys, negative: str) -> Products:
    """Sum the products over pivots, level by level: no exponential of a positive number."""
    grams, scores, half = [], [_diagonal(o, keys)], 1
    while half < o.sizes.chunk:
        level = f"level_{2 * half}"
        log = o.steps.matmul(f"{level}/log", g, sums_to_pivots(o.sizes.chunk, half), bound=MAX_LOG_DECAY)
        decay = o.exponential(f"{level}/decay", log)
        k, q = (o.steps.multiply(f"{level}/{n}/turned", keys.turned[n], decay, 1.0) for n in (KEY, QUERY))
        rows = {n: o.steps.transpose(f"{level}/{n}", x, 1.0) for n, x in ((KEY, k), (QUERY, q))}
        keep = below_pivots(o.sizes.chunk, half, transposed=o.flipped)
        gram = o.steps.matmul(f"{level}/gram", rows[KEY], k, bound=1.0)
        grams.append(o.steps.mask(f"{level}/gram/kept", gram, keep, 1.0))
        score = _scores(o, f"{level}/scores", rows[KEY], q, rows[QUERY], k)
        scores.append(o.steps.mask(f"{level}/scores/kept", score, keep, query_bound(o)))
        half *= 2
    total = _sum(o, "gram", grams, 1.0)
    return Products(
        matrix=o.steps.multiply("M", total, negative, o.max_beta),
        scores=_sum(o, "scores", scores, query_bound(o)),
    )


def _diagonal(o: Oriented, keys: Keys) -> str:
    whole = _whole_scores(o, "scores/whole", keys)
    return o.steps.mask("scores/diagonal", whole, identity(o.sizes.chunk), query_bound(o))


def _whole_scores(o: Oriented, name: str, keys: Keys) -> str:
    first, second = (KEY, QUERY) if o.flipped else (QUERY, KEY)
    return o.steps.matmul(name, keys.plain[first], keys.turned[second], bound=query_bound(o))


def _scores(o: Oriented, name: str, k: str, q_turned: str, q: str, k_turned: str) -> str:
    first, second = (k, q_turned) if o.flipped else (q, k_turned)
    return o.steps.matmul(name, first, second, bound=query_bound(o))


def _sum(o: Oriented, name: str, terms: list[str], bound: float) -> str:
    total = terms[0]
    for i, term in enumerate(terms[1:], start=2):
        last = i == len(terms)
        # No two terms meet in one place, so that the sum has the range of each.
        total = o.steps.add(name if last else f"{name}/sum_{i}", total, term, bound)
    return total


def query_bound(o: Oriented) -> float:
    """Largest product of a unit key with a scaled query."""
    return float(o.sizes.key_size**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Keys and queries both ways, by the names of their ports."""

    #: ``[C, Dk]``.
    plain: dict[str, str]
    #: ``[Dk, C]``.
    turned: dict[str, str]


def append_keys(o: Oriented) -> Keys:
    """Append the transposed keys and queries."""
    bounds = {KEY: 1.0, QUERY: query_bound(o)}
    given = {name: name for name in bounds}
    if o.sizes.keys_first:
        return Keys(plain=_transposed(o, {KEY: 1.0} if o.flipped else bounds, "plain"), turned=given)
    return Keys(plain=given, turned=_transposed(o, bounds, "turned"))


def _transposed(o: Oriented, bounds: dict[str, float], suffix: str) -> dict[str, str]:
    return {name: o.steps.transpose(f"{name}/{suffix}", name, bound) for name, bound in bounds.items()}


def append_log_decays(o: Oriented) -> str:
    """Append the log decays with tokens along the columns, ``[1, C]`` or ``[Dk, C]``."""
    if o.sizes.per_channel and not o.sizes.keys_first:
        return o.steps.transpose("g/turned", LOG_DECAY, MAX_LOG_DECAY)
    return LOG_DECAY
