"""Layers for Flax Linen: heads that give logits and losses, losses of heads that a model already has, norms, blocks."""

from jliger.linen.functions import (
    fused_linear_cross_entropy,
    fused_linear_loss,
    fused_linear_top_k_kl,
    linear_logprobs,
    linear_top_k,
)
from jliger.linen.gated_mlp import GatedMLP
from jliger.linen.lm_head import LMHead, TiedLMHead
from jliger.linen.medusa import MedusaHeads
from jliger.linen.norms import LayerNorm, RMSNorm

__all__ = [
    "GatedMLP",
    "LMHead",
    "LayerNorm",
    "MedusaHeads",
    "RMSNorm",
    "TiedLMHead",
    "fused_linear_cross_entropy",
    "fused_linear_loss",
    "fused_linear_top_k_kl",
    "linear_logprobs",
    "linear_top_k",
]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
