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
    functions: Mapping[str, Callable[[], Any]], *, least_rounds: int = 5, seconds: float = 10
) -> dict[str, Sample]:
    """Times functions one after the other, one call each a round, from the call to its result.

    Args:
      functions: compiled functions of no arguments that return arrays. A first call of each isn't timed.
      least_rounds: how often each is timed at least.
      seconds: what all rounds together may take, beyond `least_rounds`.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    spent, rounds = 0.0, 0
    while rounds < least_rounds or spent < seconds:
        for name, function in functions.items():
            times[name].append(_seconds(function))
            spent += times[name][-1]
        rounds += 1
    return {name: Sample(statistics.median(t), min(t), max(t), rounds) for name, t in times.items()}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
