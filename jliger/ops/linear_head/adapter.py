"""adapter: a low-rank term of the head, which is never merged into the kernel."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jliger.core import meshes
from jliger.core.dtypes import accumulator_dtype
from jliger.ops.linear_head.types import HeadConfig, Operands


class LinearAdapter(NamedTuple):
    """A LoRA adapter of a linear head (Hu et al., 2021, arXiv:2106.09685): `hidden · (kernel + scale · a · b)`.

    The sum in brackets is never computed: `hidden · a` has only as many columns as the rank, and `b` adds one more term
    to each product. If the kernel is frozen, its gradient is not computed.

    Attributes:
      a: `[H, R]`, whatever the kernel's layout; hidden's dtype or float32.
      b: `[R, V]`, likewise.
      scale: a number or a scalar array, such as LoRA's `alpha / R`.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> hidden, kernel = jnp.ones((3, 8)), jnp.zeros((8, 32))
      >>> labels = jnp.array([3, 1, 4])
      >>> a, b = jax.random.normal(jax.random.key(0), (8, 2)), jax.random.normal(jax.random.key(1), (2, 32))
      >>> def loss(a, b):
      ...     return jliger.fused_linear_cross_entropy(hidden, kernel, labels, adapter=jliger.LinearAdapter(a, b, 0.5))
      >>> merged = jliger.fused_linear_cross_entropy(hidden, kernel + 0.5 * a @ b, labels)
      >>> print(bool(jnp.allclose(loss(a, b), merged, rtol=1e-2)), jax.grad(loss)(a, b).shape)
      True (8, 2)
    """

    a: Float[Array, "H R"]
    b: Float[Array, "R V"]
    scale: Float[Array, ""] | float = 1.0


def with_adapter(config: HeadConfig, operands: Operands, adapter: LinearAdapter | None) -> Operands:
    """The operands of a head with an adapter: `hidden · a · scale`, in hidden's dtype as the products are, and `b`."""
    if adapter is None:
        return operands
    dtype = operands.hidden.dtype
    adapted = jnp.dot(
        operands.hidden,
        meshes.replicated(adapter.a).astype(dtype),
        precision=config.precision,
        preferred_element_type=accumulator_dtype(dtype),
    )
    adapted = (adapted * jnp.asarray(adapter.scale).astype(adapted.dtype)).astype(dtype)
    return operands._replace(adapted=adapted, adapter=adapter.b)
