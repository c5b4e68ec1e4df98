"""Timing in bursts: many calls without waiting, as a training step queues them, with one wait at the end.

A call that is waited for hides the gaps on the device behind the host, and charges a program of three calls for three.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timed(NamedTuple):
    """What is timed.

    Attributes:
      call: starts the work and returns its result, which need not be ready.
      wait: waits for a result.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


class Effort(NamedTuple):
    """How long to measure: so many bursts of each thing, of at least so many seconds."""

    bursts: int = 5
    seconds: float = 0.25


def time_in_turn(things: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Seconds a call of each thing, one figure a burst; bursts alternate, so that all see the same clock.

    Each thing has been called before: a first call may compile.
    """
    calls = {name: _calls_a_burst(thing, effort.seconds) for name, thing in things.items()}
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(effort.bursts):
        for name, thing in things.items():
            seconds[name].append(_burst(thing, calls[name]))
    return seconds


def first_call(thing: Timed) -> float:
    """Seconds of a call that is waited for."""
    return _burst(thing, 1)


def median(values: list[float]) -> float:
    return statistics.median(values)


def _calls_a_burst(thing: Timed, seconds: float) -> int:
    """As many calls as fill `seconds`, by the time of two."""
    return max(1, math.ceil(seconds / _burst(thing, 2)))


def _burst(thing: Timed, calls: int) -> float:
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = None  # frees the last call's result, which the device may overwrite as soon as it is done with it
        result = thing.call()
    thing.wait(result)
    return (time.perf_counter() - start) / calls
