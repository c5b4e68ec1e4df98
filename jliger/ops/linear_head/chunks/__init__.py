"""The loops over chunks of tokens, which bound the memory of logits.

XLA computes the matrix products; a backend (Triton or XLA) computes the row functions on each chunk's logits.

Gradients are computed by one of two passes. The *fused pass* loops over chunks of tokens with all columns. It computes
the gradients together with the loss, whose coefficients must be known beforehand: three matrix products. The *recompute
pass* loops over larger chunks of tokens and, inside, over blocks of columns. It needs the statistics of an earlier pass
(`stats_pass`): four products in total, and the least memory.

The fused pass has two other forms: `skipping_pass` with approximated logit gradients, of which most are not multiplied,
and `float8_pass` with 8-bit products. With 8-bit products, both take the place of the recompute pass, too.

In distillation, the fused pass computes both models' logits in each chunk, and the student's gradients: four
products.

Uncounted tokens are not computed. Each chunk gathers counted tokens, and the number of iterations depends on how many
there are.
"""

from jliger.ops.linear_head.chunks.distillation import DistillationMerge as DistillationMerge
from jliger.ops.linear_head.chunks.distillation import distillation_pass as distillation_pass
from jliger.ops.linear_head.chunks.float8 import float8_pass as float8_pass
from jliger.ops.linear_head.chunks.fused import fused_pass as fused_pass
from jliger.ops.linear_head.chunks.partly_saved import partly_saved_pass as partly_saved_pass
from jliger.ops.linear_head.chunks.partly_saved import stats_and_some_logits_pass as stats_and_some_logits_pass
from jliger.ops.linear_head.chunks.recompute import recompute_pass as recompute_pass
from jliger.ops.linear_head.chunks.saved_logits import saved_logits_pass as saved_logits_pass
from jliger.ops.linear_head.chunks.saved_logits import stats_and_logits_pass as stats_and_logits_pass
from jliger.ops.linear_head.chunks.sizes import saved_tokens as saved_tokens
from jliger.ops.linear_head.chunks.skipping import skipping_pass as skipping_pass
from jliger.ops.linear_head.chunks.stats import merge_stats as merge_stats
from jliger.ops.linear_head.chunks.stats import shifted_sums as shifted_sums
from jliger.ops.linear_head.chunks.stats import stats_pass as stats_pass
from jliger.ops.linear_head.chunks.top_k import top_k_pass as top_k_pass
from jliger.ops.linear_head.chunks.top_k_kl import StudentMerge as StudentMerge
from jliger.ops.linear_head.chunks.top_k_kl import top_k_kl_pass as top_k_kl_pass
from jliger.ops.linear_head.chunks.types import Stats as Stats
from jliger.ops.linear_head.chunks.types import empty_stats as empty_stats
from jliger.ops.linear_head.chunks.types import stats_of as stats_of
from jliger.ops.linear_head.chunks.types import zero_gradients as zero_gradients
from jliger.ops.logits.distillation_types import Comparison as Comparison
