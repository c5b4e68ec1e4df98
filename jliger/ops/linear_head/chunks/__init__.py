"""chunks: the loops that keep logits small. Products by XLA, rows by a backend.

Two forms compute gradients. The *forward form* takes chunks of tokens over the whole vocabulary, and computes the
gradients of a loss whose coefficients are known beforehand: three products. The *recompute form* takes larger chunks of
tokens over blocks of the vocabulary, given what a first sweep (`token_stats`) found: four products, the least memory.

With a teacher, the forward form has both models' logits in each chunk, and gradients for the student's: four products.

Tokens that don't count are not computed: those that do are gathered, chunk by chunk, and the loops are as long as
their number asks for.
"""

from jliger.core.dtypes import accumulator_dtype as accumulator_dtype
from jliger.ops.linear_head.chunks.distillation import PairMerge as PairMerge
from jliger.ops.linear_head.chunks.distillation import distillation_form as distillation_form
from jliger.ops.linear_head.chunks.fused import forward_form as forward_form
from jliger.ops.linear_head.chunks.recompute import recompute_form as recompute_form
from jliger.ops.linear_head.chunks.saved_logits import kept_form as kept_form
from jliger.ops.linear_head.chunks.saved_logits import kept_stats as kept_stats
from jliger.ops.linear_head.chunks.stats import merge_stats as merge_stats
from jliger.ops.linear_head.chunks.stats import shifted_sums as shifted_sums
from jliger.ops.linear_head.chunks.stats import token_stats as token_stats
from jliger.ops.linear_head.chunks.types import Grads as Grads
from jliger.ops.linear_head.chunks.types import GradTypes as GradTypes
from jliger.ops.linear_head.chunks.types import Head as Head
from jliger.ops.linear_head.chunks.types import Stats as Stats
from jliger.ops.linear_head.chunks.types import TeacherHead as TeacherHead
from jliger.ops.linear_head.chunks.types import Tokens as Tokens
from jliger.ops.linear_head.chunks.types import empty_grads as empty_grads
from jliger.ops.linear_head.chunks.types import stats_of as stats_of
from jliger.ops.logits.distillation_types import Comparison as Comparison
