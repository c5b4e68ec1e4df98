"""The gated feed-forward block for Flax Linen."""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import linear
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jliger.ops.gated_mlp.api import feed_forward
from jliger.ops.gated_mlp.products import Activation


class GatedMLP(nn.Module):
    """A gated feed-forward block without biases: SwiGLU as in Llama, or GEGLU as in Gemma.

    In chunks, it is `jliger.gated_mlp`: the arrays `[tokens, hidden_features]` never exist whole, and the backward pass
    computes them again. Its parameters are `kernel` in `gate_proj`, `up_proj` and `down_proj`, like those of three
    `nn.Dense`.

    Attributes:
      hidden_features: `F`, of the gate.
      activation: `"silu"` (SwiGLU), `"gelu_tanh"` (GEGLU, as in Gemma) or `"gelu"` (with the exact gelu).
      chunked: whether tokens are computed in chunks.
      chunk_size: tokens per chunk, as in `jliger.gated_mlp`.
      dtype: of the products; None for what the input and the parameters promote to.
      param_dtype: of the parameters.
      kernel_init: makes the kernels.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> mlp, x = jliger.linen.GatedMLP(32), jnp.ones((2, 5, 8))
      >>> print(mlp.apply(mlp.init(jax.random.key(0), x), x).shape)
      (2, 5, 8)
    """

    hidden_features: int
    activation: Activation = "silu"
    chunked: bool = True
    chunk_size: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        sizes = jnp.shape(x)[-1], self.hidden_features
        shapes = {"gate_proj": sizes, "up_proj": sizes, "down_proj": sizes[::-1]}
        kernels = [_Kernel(shape, self.kernel_init, self.param_dtype, name=name)() for name, shape in shapes.items()]
        return feed_forward(
            x,
            *kernels,
            activation=self.activation,
            chunked=self.chunked,
            chunk_size=self.chunk_size,
            dtype=self.dtype,
        )


class _Kernel(nn.Module):
    """A kernel, where `nn.Dense` would have it."""

    shape: tuple[int, int]
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
