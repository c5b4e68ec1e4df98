"""accumulation: gradients of a batch in parts, weighed by what the parts weigh.

Within a step, `accumulate_gradients`: a loop over microbatches of one batch. Across steps, `weighted_multi_steps`: an
optimizer that is called with each part's gradients and their weight.
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
