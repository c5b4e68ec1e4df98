"""Losses as flat functions of log-probabilities, in plain JAX: preferences and policy gradients; and distillation.

Each of the former gives `(loss, metrics)`. They know nothing of models, and take what `jliger.linear_logprobs` gives.
Where a log-probability is −∞, as of a masked token, values and gradients are their limits if those are finite; two
equal infinities differ by 0.
Distillation compares whole distributions, and is fused with both models' heads, as
`jliger.fused_linear_cross_entropy` is with one.
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
