"""Losses as flat functions of log-probabilities, in plain JAX: preferences and policy gradients; and distillation.

Each of the former gives `(loss, metrics)`. They know nothing of models, and take what `jliger.linear_logprobs` gives.
Where a log-probability is −∞, as of a masked token, values and gradients are their limits if those are finite; two
equal infinities differ by 0.
Distillation compares whole distributions, and is fused with both models' heads, as
`jliger.fused_linear_cross_entropy` is with one.
"""

from jliger.losses.dpo_variants import DPOLossType as DPOLossType
from jliger.losses.dpo_variants import dpo as dpo
from jliger.losses.kto_loss import KTOMetrics as KTOMetrics
from jliger.losses.kto_loss import kto as kto
from jliger.losses.kto_loss import kto_kl as kto_kl
from jliger.losses.policy import GRPOLossType as GRPOLossType
from jliger.losses.policy import PolicyMetrics as PolicyMetrics
from jliger.losses.policy import grpo as grpo
from jliger.losses.policy import ppo_clip as ppo_clip
from jliger.losses.preference_pairs import PreferenceMetrics as PreferenceMetrics
from jliger.losses.reference_free import cpo as cpo
from jliger.losses.reference_free import orpo as orpo
from jliger.losses.reference_free import simpo as simpo
from jliger.losses.sequence import SequenceLogprobs as SequenceLogprobs
from jliger.losses.sequence import sequence_logprobs as sequence_logprobs
from jliger.ops.linear_head.distillation import DistillationMetrics as DistillationMetrics
from jliger.ops.linear_head.distillation import fused_linear_jsd as fused_linear_jsd
from jliger.ops.linear_head.distillation import fused_linear_kl as fused_linear_kl
