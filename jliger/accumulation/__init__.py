"""accumulation: gradients of a batch in parts, weighed by what the parts weigh.

Within a step, `accumulate_gradients`: a loop over microbatches of one batch. Across steps, `weighted_multi_steps`: an
optimizer that is called with each part's gradients and their weight.
"""

from jliger.accumulation.gradients import AccumulatedLoss as AccumulatedLoss
from jliger.accumulation.gradients import accumulate_gradients as accumulate_gradients
from jliger.accumulation.multi_steps import WeightedMultiStepsState as WeightedMultiStepsState
from jliger.accumulation.multi_steps import weighted_multi_steps as weighted_multi_steps
