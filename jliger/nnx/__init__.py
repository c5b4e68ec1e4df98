"""Heads for Flax NNX: modules that give logits and losses, and losses of heads that a model already has."""

from jliger.nnx.functions import fused_linear_cross_entropy as fused_linear_cross_entropy
from jliger.nnx.functions import linear_logprobs as linear_logprobs
from jliger.nnx.lm_head import LMHead as LMHead
from jliger.nnx.lm_head import TiedLMHead as TiedLMHead
from jliger.nnx.medusa import MedusaHeads as MedusaHeads
