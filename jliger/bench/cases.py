"""What the head benchmark measures: shapes, and the ways to compute a loss that are set side by side."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import jliger
from jliger import reference


@dataclasses.dataclass(frozen=True)
class Shape:
    """A problem: `tokens` N, `hidden` H, `vocab` V."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.hidden}, {self.vocab})"

    @property
    def product_flops(self) -> int:
        return 2 * self.tokens * self.hidden * self.vocab


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a loss.

    Attributes:
      name: as the table shows it.
      function: of hidden, kernel and labels.
      kernel_dtype: `"float32"` or `"bfloat16"`.
      floor: what it is compared with: `"three products"`, or `"one product"`.
      least: the share of the floor's speed that it is meant to reach, or None.
      beside: another way that it is compared with, by name, or None.
      least_beside: the times of that way's speed that it is meant to reach, or None.
    """

    name: str
    function: Callable[[Array, Array, Array], Any]
    kernel_dtype: str = "float32"
    floor: str = "three products"
    least: float | None = None
    beside: str | None = None
    least_beside: float | None = None


def operands(shape: Shape, kernel_dtype: str, dtype: str = "bfloat16") -> tuple[Array, Array, Array]:
    """Random hidden states, a kernel that gives logits of unit size, and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.hidden), jnp.dtype(dtype))
    kernel = jax.random.normal(keys[1], (shape.hidden, shape.vocab), jnp.dtype(kernel_dtype)) * shape.hidden**-0.5
    labels = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    return hidden, kernel, labels


def products(shape: Shape, dtype: str = "bfloat16") -> dict[str, Callable[[], Array]]:
    """The three matrix products that no way can do without, each alone: what the others' speed is a share of."""
    hidden, kernel, _ = operands(shape, dtype, dtype)
    grads = jax.random.normal(jax.random.key(3), (shape.tokens, shape.vocab), hidden.dtype)

    def product(left: Array, right: Array, dims: tuple[int, int]) -> Callable[[], Array]:
        def dot(left: Array, right: Array) -> Array:
            return jax.lax.dot_general(
                left, right, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=hidden.dtype
            )

        return functools.partial(jax.jit(dot), left, right)

    return {
        "product: logits": product(hidden, kernel, (1, 0)),
        "product: hidden gradient": product(grads, kernel, (1, 1)),
        "product: kernel gradient": product(hidden, grads, (0, 0)),
    }


Loss = Callable[..., Array]


def fused(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Array:
    """The operation that is measured, without its metrics."""
    loss = jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options)
    assert isinstance(loss, jax.Array)
    return loss


def loss_and_gradients(loss: Loss, wrt: tuple[int, ...] = (0, 1)) -> Callable[[Array, Array, Array], Any]:
    """Loss and gradients by hidden (0), kernel (1), or both."""

    def function(hidden: Array, kernel: Array, labels: Array) -> Any:
        return jax.value_and_grad(lambda *args: loss(*args, labels), wrt)(hidden, kernel)

    return function


def token_losses_and_gradients(hidden: Array, kernel: Array, labels: Array) -> Any:
    """Per-token losses, and gradients with a cotangent that differs from token to token."""
    losses, pullback = jax.vjp(lambda h, k: fused(h, k, labels, reduction="none"), hidden, kernel)
    return losses, pullback(jnp.linspace(0.5, 1.5, losses.size, dtype=losses.dtype))


def half_counted(hidden: Array, kernel: Array, labels: Array) -> Any:
    """Loss and gradients where every other token doesn't count."""
    labels = jnp.where(jnp.arange(labels.size) % 2 == 0, labels, -100)
    return loss_and_gradients(fused)(hidden, kernel, labels)


def full_logits(hidden: Array, kernel: Array, labels: Array) -> Array:
    """Plain JAX: all logits, in hidden's dtype, then the loss in float32."""
    return reference.fused_linear_cross_entropy(hidden, kernel, labels)


def checkpointed_chunks(hidden: Array, kernel: Array, labels: Array, chunk: int = 2048) -> Array:
    """Plain JAX: `jax.checkpoint` over chunks of tokens in a scan."""

    @jax.checkpoint
    def chunk_sum(total: Float[Array, ""], chunk: tuple[Array, Int[Array, " C"]]) -> tuple[Array, None]:
        hidden, labels = chunk
        return total + reference.fused_linear_cross_entropy(hidden, kernel, labels, reduction="sum"), None

    chunk = min(chunk, hidden.shape[0])
    chunks = (hidden.reshape(-1, chunk, hidden.shape[1]), labels.reshape(-1, chunk))
    return jax.lax.scan(chunk_sum, jnp.zeros(()), chunks)[0] / labels.size


def own_ways(kernel_dtype: str, least: float | None = None) -> list[Way]:
    return [Way(_own(kernel_dtype), loss_and_gradients(fused), kernel_dtype, least=least)]


def _own(kernel_dtype: str) -> str:
    return f"jliger, {kernel_dtype} kernel"


def option_ways(kernel_dtype: str) -> list[Way]:
    """The ways that are measured at one shape only."""
    own = _own(kernel_dtype)
    compared = {"half counted": (half_counted, 1.85)} | {
        f"{name} frozen": (loss_and_gradients(fused, (place,)), 1.4) for name, place in (("kernel", 0), ("hidden", 1))
    }
    return [
        *(
            Way(own.replace("jliger", f"jliger, {name}"), function, kernel_dtype, beside=own, least_beside=least)
            for name, (function, least) in compared.items()
        ),
        Way(own.replace("jliger", "jliger, loss alone"), fused, kernel_dtype, "one product", 0.93),
        Way(own.replace("jliger", "jliger, per token"), token_losses_and_gradients, kernel_dtype, least=0.72),
    ]
