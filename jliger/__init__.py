"""Liger kernels for JAX: a language model's last layer and its loss, without the logits ever existing whole."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jliger import accumulation as accumulation
from jliger import losses as losses
from jliger import reference as reference
from jliger.accumulation import accumulate_gradients as accumulate_gradients
from jliger.accumulation import weighted_multi_steps as weighted_multi_steps
from jliger.core.backend import compute_capability as compute_capability
from jliger.labels import shift_labels as shift_labels
from jliger.ops.linear_head.adapter import LinearAdapter as LinearAdapter
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics as CrossEntropyMetrics
from jliger.ops.linear_head.cross_entropy import fused_linear_cross_entropy as fused_linear_cross_entropy
from jliger.ops.linear_head.logprobs import LinearLogprobs as LinearLogprobs
from jliger.ops.linear_head.logprobs import linear_logprobs as linear_logprobs

if TYPE_CHECKING:
    from jliger import linen as linen
    from jliger import nnx as nnx

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Modules for Flax, imported on first use: importing Flax takes about as long as all the rest."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jliger.{name}")
    raise AttributeError(f"module 'jliger' has no attribute {name!r}")
