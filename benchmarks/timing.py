"""The timing loop that all benchmarks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

K = TypeVar("K")
Call = Callable[[], Any]
#: Seconds between two calls: threads of the runtime before spin for a moment.
PAUSE = 0.05


def interleaved(
    calls: Mapping[K, Call], rounds: int, *, repeat: int = 1, pause: float = PAUSE, limit: float = math.inf
) -> dict[K, list[float]]:
    """Return the seconds of each call in every round, after one round to warm up.

    Calls take turns, so that a drift of the machine hits all of them alike; a
    turn is ``repeat`` calls in a row.  A call that has taken ``limit`` seconds
    sits out the later rounds.
    """
    times: dict[K, list[float]] = {key: [] for key in calls}
    for i in range(rounds + 1):
        for key, call in calls.items():
            if sum(times[key]) < limit:
                time.sleep(pause)
                turn = _turn(call, repeat if i else 1)
                times[key] += turn if i else []
    return times


def _turn(call: Call, repeat: int) -> list[float]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
