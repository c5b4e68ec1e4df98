"""Timing in turn: a GPU's clock drifts from one minute to the next, so only what was timed side by side compares."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Sample(NamedTuple):
    """Times of one function, in seconds.

    Attributes:
      median: over the rounds.
      least, most: over the rounds.
      rounds: how many.
    """

    median: float
    least: float
    most: float
    rounds: int


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int = 10, least_seconds: float = 0.05
) -> dict[str, Sample]:
    """Times functions one after the other, round by round, after a first call of each that isn't timed.

    Args:
      functions: compiled functions of no arguments that return arrays.
      rounds: how often each is timed.
      least_seconds: short functions are called so often in a round that it lasts this long; their results are dropped
        as they come, and only the last is waited for.
    """
    repeats = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        seconds = _seconds(function, 1)
        repeats[name] = max(1, round(least_seconds / seconds))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, repeats[name]))
    return {name: Sample(statistics.median(t), min(t), max(t), rounds) for name, t in times.items()}


def _seconds(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats
