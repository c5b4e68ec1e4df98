"""Timing in bursts: many calls without waiting, as in a training loop, and one wait at the end.

A wait after each call would add the host's latency to each: gaps between device kernels would be hidden behind it, and
a method of three calls would pay for three waits.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timed(NamedTuple):
    """A call to time.

    Attributes:
      call: starts the work and returns its result, which may not be ready yet.
      wait: waits for a result.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


class Effort(NamedTuple):
    """How long to measure: the number of bursts of each call, and the minimum seconds of a burst."""

    bursts: int = 5
    seconds: float = 0.25


def time_in_turn(things: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """The seconds per call of each thing, one number per burst. Bursts alternate, so that all run at the same clocks.

    Each thing must have been called before, because a first call may compile.
    """
    calls = {name: _calls_a_burst(thing, effort.seconds) for name, thing in things.items()}
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(effort.bursts):
        for name, thing in things.items():
            seconds[name].append(_burst(thing, calls[name]))
    return seconds


def first_call(thing: Timed) -> float:
    """The seconds of one call, including the wait for its result."""
    return _burst(thing, 1)


def median(values: list[float]) -> float:
    return statistics.median(values)


def _calls_a_burst(thing: Timed, seconds: float) -> int:
    """The number of calls that take `seconds`, estimated from the time of two."""
    return max(1, math.ceil(seconds / _burst(thing, 2)))


def _burst(thing: Timed, calls: int) -> float:
    result = None
    start = time.perf_counter()
    for _ in range(calls):
        result = None  # frees the previous result, so that its memory can be reused
        result = thing.call()
    thing.wait(result)
    return (time.perf_counter() - start) / calls
