"""Gradient accumulation over microbatches, weighted by their numbers of tokens.

`accumulate_gradients` accumulates within a step: it loops over the microbatches of one batch. `weighted_multi_steps`
accumulates across steps: it is an optimizer that is called with each microbatch's gradients and their weight.
"""

from jliger.accumulation.gradients import AccumulatedLoss as AccumulatedLoss
from jliger.accumulation.gradients import accumulate_gradients as accumulate_gradients
from jliger.accumulation.multi_steps import WeightedMultiStepsState as WeightedMultiStepsState
from jliger.accumulation.multi_steps import weighted_multi_steps as weighted_multi_steps
