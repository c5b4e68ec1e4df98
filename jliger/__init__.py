"""Liger kernels for JAX: a language model's last layer and its loss, without the logits ever existing whole."""

from jliger import reference as reference
from jliger.api import CrossEntropyMetrics as CrossEntropyMetrics
from jliger.api import fused_linear_cross_entropy as fused_linear_cross_entropy
from jliger.platform import compute_capability as compute_capability

__version__ = "0.1.0"
