"""Row functions for the k largest logits of each row, which each backend implements."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core.backend import Choice
from jliger.ops.logits.top_k_types import MOST_COLUMNS as MOST_COLUMNS
from jliger.ops.logits.top_k_types import TopLogits as TopLogits
from jliger.ops.logits.types import Block, LogitMap


class _TopLogitsFn(Protocol):
    def __call__(self, product: Float[Array, "T V"], block: Block, logit_map: LogitMap, k: int) -> TopLogits: ...


def get_top_logits(implementation: Choice, compute_capability: int | None) -> _TopLogitsFn:
    """A backend's function for the largest logits. Triton is imported only here, when it is chosen."""
    assert implementation != "by platform"  # `run_by_platform` has already chosen an implementation.
    if implementation == "xla":
        from jliger.ops.logits import top_k_xla

        return top_k_xla.top_logits
    from jliger.ops.logits import top_k_triton

    for_gpu = functools.partial(top_k_triton.top_logits, compute_capability=compute_capability)
    return lambda product, block, logit_map, k: first_of(for_gpu(product, block, logit_map, k), k)


def first_of(candidates: TopLogits, k: int) -> TopLogits:
    """The k largest of some candidates, which have different ids but may be in any order; NaN comes first.

    Sorted by logit and id, because `jax.lax.top_k` prefers the earlier place, not the lower id.
    """
    keys = ~jnp.isnan(candidates.logits), -candidates.logits, candidates.ids
    _, below, ids = jax.lax.sort(keys, num_keys=3, is_stable=False)
    return TopLogits(ids[..., :k], -below[..., :k])


def merge_top_logits(left: TopLogits, right: TopLogits) -> TopLogits:
    """The largest logits of two blocks of columns together."""
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), left, right)
    return first_of(both, left.ids.shape[-1])
