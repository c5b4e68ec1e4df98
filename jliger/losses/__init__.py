"""Preference losses, policy-gradient losses and distillation losses.

Preference and policy losses are plain JAX functions of log-probabilities, such as those that `jliger.linear_logprobs`
returns, and do not depend on a model. They return `(loss, metrics)`; `sampler_correction` returns `(weights, metrics)`.
A log-probability may be −∞, for example that of a masked token: values and gradients are then their limits, if the
limits are finite. The difference of two equal infinities is 0.

The losses that are called `fused_linear_...` are the same, fused with a linear head: three matrix products instead of
four.

Distillation losses compare whole distributions. They are fused with the heads of both models, as
`jliger.fused_linear_cross_entropy` is fused with one head; `fused_linear_top_k_kl` with the student's alone, and the
teacher's largest log-probabilities.
"""

from jliger.losses.dpo_variants import DPODivergence, DPOLossType, dpo
from jliger.losses.fused_policy import fused_linear_grpo, fused_linear_ppo_clip
from jliger.losses.fused_preference import (
    fused_linear_cpo,
    fused_linear_dpo,
    fused_linear_kto,
    fused_linear_orpo,
    fused_linear_simpo,
)
from jliger.losses.kto_loss import KTOMetrics, kto, kto_kl
from jliger.losses.policy import GRPOLossType, PolicyMetrics, grpo, ppo_clip
from jliger.losses.preference_pairs import PreferenceMetrics
from jliger.losses.reference_free import cpo, orpo, simpo
from jliger.losses.sampler import SamplerMetrics, sampler_correction
from jliger.losses.sequence import SequenceLogprobs, sequence_logprobs
from jliger.ops.linear_head.distillation import DistillationMetrics, fused_linear_jsd, fused_linear_kl
from jliger.ops.linear_head.top_k_kl import fused_linear_top_k_kl

__all__ = [
    "DPODivergence",
    "DPOLossType",
    "DistillationMetrics",
    "GRPOLossType",
    "KTOMetrics",
    "PolicyMetrics",
    "PreferenceMetrics",
    "SamplerMetrics",
    "SequenceLogprobs",
    "cpo",
    "dpo",
    "fused_linear_cpo",
    "fused_linear_dpo",
    "fused_linear_grpo",
    "fused_linear_jsd",
    "fused_linear_kl",
    "fused_linear_kto",
    "fused_linear_orpo",
    "fused_linear_ppo_clip",
    "fused_linear_simpo",
    "fused_linear_top_k_kl",
    "grpo",
    "kto",
    "kto_kl",
    "orpo",
    "ppo_clip",
    "sampler_correction",
    "sequence_logprobs",
    "simpo",
]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
