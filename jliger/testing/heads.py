"""Helpers for tests of heads: a problem, a loss of logits, and results by name. Not part of the wheel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jliger.testing.promotion import with_promotion

HIDDEN_SIZE, VOCAB, BATCH = 6, 11, (3, 5)


def make_hidden(seed: int = 0, dtype: Any = jnp.float32, batch: tuple[int, ...] = BATCH) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(*batch, HIDDEN_SIZE)), dtype)


def make_labels(seed: int = 0, batch: tuple[int, ...] = BATCH) -> jax.Array:
    """Random labels, some of which do not count."""
    random = np.random.default_rng(seed)
    return jnp.asarray(np.where(random.random(batch) < 0.3, -100, random.integers(0, VOCAB, batch)), jnp.int32)


def randomized(tree: Any, seed: int = 0) -> Any:
    """The tree with random numbers in its arrays, since errors would be hidden by parameters that are initially 0."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 2, leaf.dtype), tree)


def as_float64(tree: Any) -> Any:
    """Casts the floating-point arrays of a tree to float64."""

    def cast(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(leaf), jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


@with_promotion
def loss_of_logits(logits: jax.Array, labels: jax.Array, scale: float = 1.0, softcap: float | None = None) -> jax.Array:
    """The mean cross entropy of counted tokens, as in a model that does not use jliger."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    counted = labels != -100
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    return -jnp.mean(picked, where=counted)


def by_name(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def loss_and_grads(loss: Callable[..., jax.Array], *arguments: Any) -> dict[str, Any]:
    """The loss, and its gradients with respect to every argument, by name."""
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
    return {"loss": value, **by_name(grads)}
