"""chunks: the loops that keep logits small. Products by XLA, rows by a backend.

Two forms compute gradients. The *forward form* takes chunks of tokens over the whole vocabulary, and computes the
gradients of a loss whose coefficients are known beforehand: three products. The *recompute form* takes larger chunks of
tokens over blocks of the vocabulary, given what a first sweep (`token_stats`) found: four products, the least memory.

With a teacher, the forward form has both models' logits in each chunk, and gradients for the student's: four products.

Tokens that don't count are not computed: those that do are gathered, chunk by chunk, and the loops are as long as
their number asks for.
"""

from jliger.ops.linear_head.chunks.distillation import DistillationMerge as DistillationMerge
from jliger.ops.linear_head.chunks.distillation import distillation_pass as distillation_pass
from jliger.ops.linear_head.chunks.fused import fused_pass as fused_pass
from jliger.ops.linear_head.chunks.recompute import recompute_pass as recompute_pass
from jliger.ops.linear_head.chunks.saved_logits import saved_logits_pass as saved_logits_pass
from jliger.ops.linear_head.chunks.saved_logits import stats_and_logits_pass as stats_and_logits_pass
from jliger.ops.linear_head.chunks.stats import merge_stats as merge_stats
from jliger.ops.linear_head.chunks.stats import shifted_sums as shifted_sums
from jliger.ops.linear_head.chunks.stats import stats_pass as stats_pass
from jliger.ops.linear_head.chunks.types import Stats as Stats
from jliger.ops.linear_head.chunks.types import stats_of as stats_of
from jliger.ops.linear_head.chunks.types import zero_gradients as zero_gradients
from jliger.ops.logits.distillation_types import Comparison as Comparison
