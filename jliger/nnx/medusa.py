"""medusa: Medusa heads as a module."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import linear
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int

from jliger.heads import medusa
from jliger.nnx.layers import linear_head
from jliger.nnx.lm_head import LMHead
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, CrossEntropyOptions, Loss


class MedusaHeads(nnx.Module):
    r"""Additional heads that predict later tokens (Cai et al., 2024, arXiv:2401.10774).

    The model's head predicts the next token, $t + 1$. Head $i = 1 \ldots K$ here predicts token $t + i + 1$ from the
    same hidden state. It has residual blocks $x + \mathrm{silu}(x W + b)$, initially the identity, and a linear head of
    its own. The loss and its gradients are computed one head at a time, so that memory, apart from parameters and their
    gradients, does not grow with $K$ (except in float16).

    Stage 1 of Medusa freezes the model: if the hidden states are not differentiated, or pass through
    `jax.lax.stop_gradient`, their gradients are not computed, and heads and blocks still learn. Stage 2 adds this loss,
    times a small number, to the model's.

    Args:
      num_heads: `K`.
      in_features: `H`.
      out_features: `V`.
      num_blocks: residual blocks of each head.
      logit_scale: of the heads, as in `LMHead`.
      logit_softcap: of the heads, as in `LMHead`.
      vocab_size: of the heads, as in `LMHead`.
      use_bias: whether the heads have a bias; the blocks do.
      dtype: of the products; None for what hidden states and parameters promote to.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: makes the heads' kernels. In the paper, they start as the model's own: `lambda *_: head.kernel[...]`.
      bias_init: makes the heads' biases.
      block_init: makes the blocks' kernels.
      rngs: random keys.
      kernel_metadata: of the heads' kernels, such as their sharding.
      bias_metadata: of the heads' biases.
      block_metadata: of the blocks' kernels.

    Attributes:
      blocks: `num_blocks` times `nnx.Linear`, with parameters `[K, H, H]` and `[K, H]`.
      heads: `LMHead`, with parameters `[K, H, V]`, and `[K, V]` with a bias.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> from flax import nnx
      >>> heads = jliger.nnx.MedusaHeads(3, 8, 32, rngs=nnx.Rngs(0))
      >>> tokens, hidden = jnp.ones((2, 7), int), jnp.ones((2, 7, 8))
      >>> labels = jliger.shift_labels(tokens, by=range(2, 5))
      >>> print(heads(hidden).shape, labels.shape, heads.loss(hidden, labels).shape)
      (3, 2, 7, 32) (3, 2, 7) ()
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int,
        *,
        num_blocks: int = 1,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        vocab_size: int | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = linear.default_kernel_init,
        bias_init: Initializer = linear.default_bias_init,
        block_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        block_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        of_all = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}

        @nnx.split_rngs(splits=num_heads)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def blocks(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(
                in_features, in_features, kernel_init=block_init, rngs=rngs, kernel_metadata=block_metadata, **of_all
            )

        @nnx.split_rngs(splits=num_heads)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def heads(rngs: nnx.Rngs) -> LMHead:
            return LMHead(
                in_features,
                out_features,
                logit_scale=logit_scale,
                logit_softcap=logit_softcap,
                vocab_size=vocab_size,
                use_bias=use_bias,
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
                **of_all,
            )

        self.blocks = nnx.List([blocks(rngs) for _ in range(num_blocks)])
        self.heads = heads(rngs)

    def __call__(self, hidden: Float[Array, "*B H"]) -> Float[Array, "K ... V"]:
        """All heads' logits, for sampling."""
        return self.medusa_heads(hidden).logits(hidden)

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "K ..."],
        *,
        head_weights: Sequence[float] | None = None,
        return_metrics: Literal[False] = False,
        **options: Unpack[CrossEntropyOptions],
    ) -> Loss: ...

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "K ..."],
        *,
        head_weights: Sequence[float] | None = None,
        return_metrics: Literal[True],
        **options: Unpack[CrossEntropyOptions],
    ) -> tuple[Loss, CrossEntropyMetrics]: ...

    @overload
    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "K ..."],
        *,
        head_weights: Sequence[float] | None = None,
        return_metrics: bool,
        **options: Unpack[CrossEntropyOptions],
    ) -> Loss | tuple[Loss, CrossEntropyMetrics]: ...

    def loss(
        self,
        hidden: Float[Array, "*B H"],
        labels: Int[Array, "K ..."],
        *,
        head_weights: Sequence[float] | None = None,
        return_metrics: bool = False,
        **options: Unpack[CrossEntropyOptions],
    ) -> Loss | tuple[Loss, CrossEntropyMetrics]:
        """The weighted sum of the heads' losses.

        Args:
          hidden: the model's last hidden states, `[*B, H]`.
          labels: `[K, *B]`, each head's own, as `jliger.shift_labels(tokens, mask, by=range(2, K + 2))` makes them.
          head_weights: a number for each head; None for `0.8, 0.8², …`, as in the paper.
          return_metrics: also return `jliger.CrossEntropyMetrics`, with a leading axis of heads.
          **options: those of `jliger.fused_linear_cross_entropy`, of each head's loss. `where` and `weights` are
            `[K, *B]`, or `[*B]` for all heads. `normalizer` is `[K]`, or a scalar for all heads: the heads' labels
            differ in how many count.

        Returns:
          The loss; with `return_metrics` that and `jliger.CrossEntropyMetrics` with a leading axis of heads.

        Raises:
          NotImplementedError: `reduction="none"`.
          ValueError: labels, weights or normalizers that are not one for each head; what
            `jliger.fused_linear_cross_entropy` raises.
          TypeError: what `jliger.fused_linear_cross_entropy` raises.
        """
        heads = self.medusa_heads(hidden)
        return medusa.loss(heads, hidden, labels, head_weights=head_weights, return_metrics=return_metrics, **options)

    def medusa_heads(self, hidden: Float[Array, "*B H"]) -> medusa.MedusaHeads:
        """The parameters, and how logits are computed from them."""
        return medusa.MedusaHeads(
            tuple(linear_head(block, hidden) for block in self.blocks), linear_head(self.heads, hidden)
        )
