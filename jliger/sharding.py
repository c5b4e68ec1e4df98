"""sharding: what each device computes of the operation, and how devices' results come together.

On one device that is all of it. Leading dimensions become tokens here, on the device's own share of them.
"""

from typing import Any

import jax
from jaxtyping import Array

from jliger import chunks
from jliger.chunks import Grads, GradTypes, Head, Tokens
from jliger.config import HeadConfig
from jliger.rows import Coefficients, RowStats


def token_stats(config: HeadConfig, lean: bool, tokens: Tokens, head: Head) -> RowStats:
    """`chunks.token_stats` for tokens `[*B]`."""
    return _unflatten(chunks.token_stats(config, _flatten(tokens), head, lean=lean), tokens)


def forward_form(
    config: HeadConfig, wanted: GradTypes, tokens: Tokens, head: Head, coefficients: Coefficients
) -> tuple[RowStats, Grads]:
    """`chunks.forward_form` for tokens `[*B]`."""
    stats, grads = chunks.forward_form(config, wanted, _flatten(tokens), head, _flatten_fields(coefficients))
    return _unflatten(stats, tokens), _unflatten_hidden(grads, tokens)


def recompute_form(
    config: HeadConfig, wanted: GradTypes, tokens: Tokens, head: Head, stats: RowStats, coefficients: Coefficients
) -> Grads:
    """`chunks.recompute_form` for tokens `[*B]`."""
    grads = chunks.recompute_form(
        config, wanted, _flatten(tokens), head, _flatten_fields(stats), _flatten_fields(coefficients)
    )
    return _unflatten_hidden(grads, tokens)


def _flatten_fields(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(-1), tree)


def _flatten(tokens: Tokens) -> Tokens:
    hidden_size = tokens.hidden.shape[-1]
    return Tokens(tokens.hidden.reshape(-1, hidden_size), tokens.labels.reshape(-1), tokens.counted.reshape(-1))


def _unflatten(stats: RowStats, tokens: Tokens) -> RowStats:
    return jax.tree.map(lambda array: array.reshape(tokens.labels.shape), stats)


def _unflatten_hidden(grads: Grads, tokens: Tokens) -> Grads:
    def like_hidden(grad: Array | None) -> Array | None:
        return None if grad is None else grad.reshape(tokens.hidden.shape)

    return grads._replace(hidden=like_hidden(grads.hidden))
