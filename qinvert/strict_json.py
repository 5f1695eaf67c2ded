"""Reads JSON from files of any origin: only bounded and finite values of the expected types."""

from __future__ import annotations

import json
import math
from typing import Any, Final, TypeAlias, TypeVar

from qinvert.errors import PlanError

Json: TypeAlias = dict[str, Any]

#: Decibels from here on are infinite, for JSON has no infinity: the noise is zero.
INFINITE: Final = 3e38


T = TypeVar("T")


def require(obj: Any, key: str, kind: type[T]) -> T:
    """Return ``obj[key]`` if ``obj`` is an object and the value has the type ``kind``.

    An integer is accepted for ``float``; a boolean is accepted only for ``bool``.

    Raises
    ------
    PlanError
        With the key, the wanted type and what is there.
    """
    value = obj.get(key) if isinstance(obj, dict) else None
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise PlanError(f"{key!r} must be a {kind.__name__}, got {brief(value)}; is the file damaged?")
    return value  # type: ignore[return-value] # an int where a float is wanted


def brief(value: Any) -> str:
    """Return ``repr(value)``, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


#: Largest depth of nesting in a file.  Plans have 6 levels, and their provenance adds some.
MAX_DEPTH: Final = 50


def parse(content: bytes) -> Json:
    """Return the object that a file holds.

    Raises
    ------
    PlanError
        If it is not a JSON object, or if it has repeated keys, infinities, huge integers or deep nesting.
    """
    try:
        document = json.loads(
            content,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_small_int,
            object_pairs_hook=_unique,
        )
        _check_depth(document)
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PlanError("not a plan file: a text in it is not Unicode (lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a plan file ({error}); is it truncated?") from None
    if not isinstance(document, dict):
        raise PlanError("not a plan file: the top level is not an object; pass a file that Plan.save wrote")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return document


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, depth + 1)


def _refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is not a JSON number")


def _finite_float(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise ValueError(f"{token[:40]} is too large")
    return value


def _small_int(token: str) -> int:
    # No count or index needs more than 64 bits; longer integers can only break readers.
    if len(token) > 19:
        raise ValueError(f"{token[:40]} is too large")
    return int(token)
