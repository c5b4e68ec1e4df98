"""Gradient accumulation over microbatches, weighted by their numbers of tokens.

`accumulate_gradients` accumulates within a step: it loops over the microbatches of one batch. `weighted_multi_steps`
accumulates across steps: it is an optimizer that is called with each microbatch's gradients and their weight.
"""

from jliger.accumulation.gradients import AccumulatedLoss, accumulate_gradients
from jliger.accumulation.multi_steps import WeightedMultiStepsState, weighted_multi_steps

__all__ = [
    "AccumulatedLoss",
    "WeightedMultiStepsState",
    "accumulate_gradients",
    "weighted_multi_steps",
]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
