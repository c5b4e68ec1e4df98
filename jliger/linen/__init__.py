"""Heads for Flax Linen: modules that give logits and losses, and losses of heads that a model already has."""

from jliger.linen.functions import fused_linear_cross_entropy as fused_linear_cross_entropy
from jliger.linen.functions import linear_logprobs as linear_logprobs
from jliger.linen.lm_head import LMHead as LMHead
from jliger.linen.lm_head import TiedLMHead as TiedLMHead
from jliger.linen.medusa import MedusaHeads as MedusaHeads
