"""medusa: Medusa heads as a module."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import linear
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int

from jliger.heads import medusa
from jliger.heads.linear import LinearHead
from jliger.linen.lm_head import LMHead
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, CrossEntropyOptions, Loss


class MedusaHeads(nn.Module):
    r"""Additional heads that predict later tokens (Cai et al., 2024, arXiv:2401.10774).

    The model's head predicts the next token, $t + 1$. Head $i = 1 \ldots K$ here predicts token $t + i + 1$ from the
    same hidden state. It has residual blocks $x + \mathrm{silu}(x W + b)$, initially the identity, and a linear head of
    its own. The loss and its gradients are computed one head at a time, so that memory, apart from parameters and their
    gradients, does not grow with $K$ (except in float16).

    Stage 1 of Medusa freezes the model: if the hidden states are not differentiated, or pass through
    `jax.lax.stop_gradient`, their gradients are not computed, and heads and blocks still learn. Stage 2 adds this loss,
    times a small number, to the model's.

    The parameters are `heads/kernel` `[K, H, V]` and, with a bias, `heads/bias` `[K, V]`; each block, counted from 0,
    has `blocks_0/kernel` `[K, H, H]` and `blocks_0/bias` `[K, H]`.

    Attributes:
      num_heads: `K`.
      features: `V`.
      num_blocks: residual blocks of each head.
      logit_scale: of the heads, as in `LMHead`.
      logit_softcap: of the heads, as in `LMHead`.
      vocab_size: of the heads, as in `LMHead`.
      use_bias: whether the heads have a bias; the blocks do.
      dtype: of the products; None for what hidden states and parameters promote to.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: makes the heads' kernels.
      bias_init: makes the heads' biases.
      block_init: makes the blocks' kernels.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> heads = jliger.linen.MedusaHeads(3, 32)
      >>> tokens, hidden = jnp.ones((2, 7), int), jnp.ones((2, 7, 8))
      >>> labels = jliger.shift_labels(tokens, by=range(2, 5))
      >>> variables = heads.init(jax.random.key(0), hidden)
      >>> print(heads.apply(variables, hidden, labels, method="loss").shape)
      ()
    """

    num_heads: int
    features: int
    num_blocks: int = 1
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    block_init: Initializer = nn.initializers.zeros_init()

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

    @nn.compact
    def medusa_heads(self, hidden: Float[Array, "*B H"]) -> medusa.MedusaHeads:
        """The parameters, and how logits are computed from them."""

        def stacked(features: int, **options: Any) -> LinearHead:
            """A layer with the parameters of all heads, stacked."""
            layers = nn.vmap(
                LMHead,
                in_axes=None,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=self.num_heads,
                metadata_params={nn.PARTITION_NAME: None},
                methods=["linear_head"],
            )
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}
            return layers(features, **dtypes, **options).linear_head(hidden)

        blocks = tuple(
            stacked(hidden.shape[-1], kernel_init=self.block_init, name=f"blocks_{depth}")
            for depth in range(self.num_blocks)
        )
        heads = stacked(
            self.features,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            vocab_size=self.vocab_size,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="heads",
        )
        return medusa.MedusaHeads(blocks, heads)
