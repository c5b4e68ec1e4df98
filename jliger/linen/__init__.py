"""Heads for Flax Linen: modules that give logits and losses, and losses of heads that a model already has."""

from jliger.linen.functions import fused_linear_cross_entropy, fused_linear_loss, linear_logprobs
from jliger.linen.lm_head import LMHead, TiedLMHead
from jliger.linen.medusa import MedusaHeads

__all__ = [
    "LMHead",
    "MedusaHeads",
    "TiedLMHead",
    "fused_linear_cross_entropy",
    "fused_linear_loss",
    "linear_logprobs",
]


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
