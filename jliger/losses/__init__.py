"""Preference losses, policy-gradient losses and distillation losses.

Preference and policy losses are plain JAX functions of log-probabilities, such as those that `jliger.linear_logprobs`
returns, and do not depend on a model. They return `(loss, metrics)`. A log-probability may be −∞, for example that of
a masked token: values and gradients are then their limits, if the limits are finite. The difference of two equal
infinities is 0.

Distillation losses compare whole distributions. They are fused with the heads of both models, as
`jliger.fused_linear_cross_entropy` is fused with one head.
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
