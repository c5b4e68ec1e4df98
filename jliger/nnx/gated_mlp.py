"""The gated feed-forward block for Flax NNX."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import linear
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from jliger.ops.gated_mlp.api import feed_forward
from jliger.ops.gated_mlp.products import Activation


class GatedMLP(nnx.Module):
    """A gated feed-forward block without biases: SwiGLU as in Llama, or GEGLU as in Gemma.

    In chunks, it is `jliger.gated_mlp`: the arrays `[tokens, hidden_features]` never exist whole, and the backward pass
    computes them again.

    Args:
      features: `H`, of the input and the result.
      hidden_features: `F`, of the gate.
      activation: `"silu"` (SwiGLU), `"gelu_tanh"` (GEGLU, as in Gemma) or `"gelu"` (with the exact gelu).
      chunked: whether tokens are computed in chunks.
      chunk_size: tokens per chunk, as in `jliger.gated_mlp`.
      dtype: of the products; None for what the input and the parameters promote to.
      param_dtype: of the parameters.
      kernel_init: makes the kernels.
      gate_metadata: of the gate's and the up projection's kernels, such as their sharding.
      down_metadata: of the down projection's kernel.
      rngs: random keys.

    Attributes:
      gate_proj: `nnx.Linear` with kernel `[H, F]`.
      up_proj: `nnx.Linear` with kernel `[H, F]`.
      down_proj: `nnx.Linear` with kernel `[F, H]`.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> from flax import nnx
      >>> mlp = jliger.nnx.GatedMLP(8, 32, rngs=nnx.Rngs(0))
      >>> print(mlp(jnp.ones((2, 5, 8))).shape)
      (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Activation = "silu",
        chunked: bool = True,
        chunk_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = linear.default_kernel_init,
        gate_metadata: Mapping[str, Any] = MappingProxyType({}),
        down_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        def projection(inputs: int, outputs: int, metadata: Mapping[str, Any]) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                kernel_metadata=metadata,
                rngs=rngs,
            )

        self.gate_proj = projection(features, hidden_features, gate_metadata)
        self.up_proj = projection(features, hidden_features, gate_metadata)
        self.down_proj = projection(hidden_features, features, down_metadata)
        self.activation: Activation = activation
        self.chunked = chunked
        self.chunk_size = chunk_size
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        kernels = [one.kernel[...] for one in (self.gate_proj, self.up_proj, self.down_proj)]
        return feed_forward(
            x,
            *kernels,
            activation=self.activation,
            chunked=self.chunked,
            chunk_size=self.chunk_size,
            dtype=self.dtype,
        )
