"""Preference losses, policy-gradient losses and distillation losses.

Preference and policy losses are plain JAX functions of log-probabilities, such as those that `jliger.linear_logprobs`
returns, and do not depend on a model. They return `(loss, metrics)`. A log-probability may be −∞, for example that of
a masked token: values and gradients are then their limits, if the limits are finite. The difference of two equal
infinities is 0.

Distillation losses compare whole distributions. They are fused with the heads of both models, as
`jliger.fused_linear_cross_entropy` is fused with one head.
"""

from jliger.losses.dpo_variants import DPOLossType, dpo
from jliger.losses.kto_loss import KTOMetrics, kto, kto_kl
from jliger.losses.policy import GRPOLossType, PolicyMetrics, grpo, ppo_clip
from jliger.losses.preference_pairs import PreferenceMetrics
from jliger.losses.reference_free import cpo, orpo, simpo
from jliger.losses.sequence import SequenceLogprobs, sequence_logprobs
from jliger.ops.linear_head.distillation import DistillationMetrics, fused_linear_jsd, fused_linear_kl

__all__ = [
    "DPOLossType",
    "DistillationMetrics",
    "GRPOLossType",
    "KTOMetrics",
    "PolicyMetrics",
    "PreferenceMetrics",
    "SequenceLogprobs",
    "cpo",
    "dpo",
    "fused_linear_jsd",
    "fused_linear_kl",
    "grpo",
    "kto",
    "kto_kl",
    "orpo",
    "ppo_clip",
    "sequence_logprobs",
    "simpo",
]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
