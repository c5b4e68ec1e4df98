"""Liger kernels for JAX: a language model's last layer and its loss, without the logits ever existing whole."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jliger import accumulation, losses, reference
from jliger.accumulation import accumulate_gradients, weighted_multi_steps
from jliger.core.backend import compute_capability
from jliger.labels import shift_labels
from jliger.ops.gated_mlp.api import gated_mlp
from jliger.ops.gated_mlp.products import geglu, swiglu
from jliger.ops.linear_head.adapter import LinearAdapter
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, fused_linear_cross_entropy
from jliger.ops.linear_head.logprob_loss import fused_linear_loss
from jliger.ops.linear_head.logprobs import LinearLogprobs, linear_logprobs
from jliger.ops.linear_head.top_k import LinearTopK, linear_top_k
from jliger.ops.logits.cross_entropy import softmax_cross_entropy
from jliger.ops.norms.api import layer_norm, rms_norm
from jliger.ops.rope.api import apply_rope

if TYPE_CHECKING:
    from jliger import linen, nnx

__all__ = [
    "CrossEntropyMetrics",
    "LinearAdapter",
    "LinearLogprobs",
    "LinearTopK",
    "__version__",
    "accumulate_gradients",
    "accumulation",
    "apply_rope",
    "compute_capability",
    "fused_linear_cross_entropy",
    "fused_linear_loss",
    "gated_mlp",
    "geglu",
    "layer_norm",
    "linear_logprobs",
    "linear_top_k",
    "linen",
    "losses",
    "nnx",
    "reference",
    "rms_norm",
    "shift_labels",
    "softmax_cross_entropy",
    "swiglu",
    "weighted_multi_steps",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Modules for Flax, imported on first use: importing Flax takes about as long as all the rest."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jliger.{name}")
    raise AttributeError(f"module 'jliger' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public."""
    return list(__all__)
