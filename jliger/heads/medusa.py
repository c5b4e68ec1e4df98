"""Medusa heads: several heads on the same hidden states, each of which predicts one token further ahead."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jliger.core import checks
from jliger.heads.linear import LinearHead
from jliger.heads.sum_of_losses import sum_with_eager_gradients
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, CrossEntropyOptions, Loss

# Cai et al., 2024, section 2.2.1: the k-th head's loss has weight DECAY ** k.
DECAY = 0.8

_PER_TOKEN = ("where", "weights", "temperature")
_ARRAYS = (*_PER_TOKEN, "class_weights", "normalizer")


class MedusaHeads(NamedTuple):
    """The linear layers `[K, H, H]` of residual blocks, and the heads `[K, H, V]`; without `K` for a single head."""

    blocks: tuple[LinearHead, ...]
    heads: LinearHead

    def features(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        for block in self.blocks:
            hidden = hidden + jax.nn.silu(block.logits(hidden))
        return hidden

    def logits(self, hidden: Float[Array, "*B H"]) -> Float[Array, "K ... V"]:
        return jax.vmap(lambda head: head.heads.logits(head.features(hidden)))(self)


def loss(
    heads: MedusaHeads,
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "K ..."],
    *,
    head_weights: Sequence[float] | None = None,
    return_metrics: bool = False,
    **options: Unpack[CrossEntropyOptions],
) -> Loss | tuple[Loss, CrossEntropyMetrics]:
    """The weighted sum of the heads' losses; with `return_metrics`, also the stacked metrics of the heads."""
    count = len(heads.heads.kernel)
    hidden, labels = checks.as_array("hidden", hidden), checks.as_array("labels", labels)
    if labels.shape != (count, *hidden.shape[:-1]):
        raise ValueError(
            f"labels got shape {labels.shape}; pass the labels of each head, {(count, *hidden.shape[:-1])}: "
            f"jliger.shift_labels(tokens, mask, by=range(2, {count + 2}))."
        )
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise NotImplementedError(f"reduction got {reduction!r}; pass 'mean' or 'sum': several heads have one loss.")
    head_weights = [DECAY**ahead for ahead in range(1, count + 1)] if head_weights is None else head_weights
    if len(head_weights) != count:
        raise ValueError(f"head_weights got {len(head_weights)} numbers for {count} heads; pass one for each.")

    arguments: dict[str, Any] = {**options}
    contexts = {"labels": labels, "head_weight": jnp.asarray(head_weights, jnp.float32)}
    for name in [name for name in _ARRAYS if arguments.get(name) is not None]:
        if name == "temperature" and isinstance(arguments[name], int | float):
            continue  # a number of all heads is checked with each
        array = checks.as_array(name, arguments.pop(name))
        is_number = name == "temperature" and array.shape == ()
        if name in _PER_TOKEN and not is_number and array.shape not in (labels.shape, labels.shape[1:]):
            shapes = f"{labels.shape}, for each head, or {labels.shape[1:]}"
            raise ValueError(f"{name} got shape {array.shape}; pass {shapes}.")
        if name == "normalizer" and array.shape not in ((), (count,)):
            raise ValueError(
                f"normalizer got shape {array.shape}; pass a scalar, or one number for each head, ({count},)."
            )
        own = array.ndim == labels.ndim if name in _PER_TOKEN else name == "normalizer" and array.ndim == 1
        contexts[name] = array if own else jnp.broadcast_to(array, (count, *array.shape))
    checks.check_precision(arguments.get("precision"))
    term = _HeadLoss(tuple(sorted(arguments.items())))
    total, metrics = sum_with_eager_gradients(term, heads, hidden, contexts)
    return (total, metrics) if return_metrics else total


@dataclasses.dataclass(frozen=True)
class _HeadLoss:
    """One head's term of the sum, and its metrics."""

    options: tuple[tuple[str, Any], ...]

    def __call__(
        self, head: MedusaHeads, hidden: Array, context: dict[str, Array]
    ) -> tuple[Float[Array, ""], CrossEntropyMetrics]:
        options: dict[str, Any] = {**context, **dict(self.options)}
        head_weight, features = options.pop("head_weight"), head.features(hidden)
        value, metrics = head.heads.loss(features, **options, return_metrics=True)
        return head_weight * value, metrics
