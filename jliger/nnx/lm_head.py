"""lm_head: a language model's head as a module, with a parameter of its own or tied to an embedding."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, linear
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jaxtyping import Array, Float

from jliger.heads import linear as heads
from jliger.heads.linear import HeadMethods, LinearHead
from jliger.nnx import layers


class LMHead(HeadMethods, nnx.Linear):
    r"""`flax.nnx.Linear` that also computes the loss, without storing the logits `[tokens, V]` whole.

    Logits are $\mathrm{softcap}(s \cdot (\mathrm{hidden} \cdot \mathrm{kernel} + \mathrm{bias}))$. Parameters, their
    initial values and metadata, and dtypes are those of `flax.nnx.Linear`, so that a checkpoint of one loads into the
    other. `LMHead.tied` is the head of an embedding.

    Args:
      in_features: `H`.
      out_features: `V`.
      logit_scale: `s`, a Python number.
      logit_softcap: `c` in `c · tanh(z / c)`, a Python number, or None.
      vocab_size: how many columns exist, if the kernel is padded; None for all. The others have logits of −∞, no
        probability, and gradients of 0.
      use_bias: whether there is a bias; as in `flax.nnx.Linear` there is.
      dtype: of the products; None for what hidden states and parameters promote to.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: makes the kernel; `nnx.with_partitioning` adds a sharding.
      bias_init: makes the bias.
      promote_dtype: casts `(hidden, kernel, bias)` in place of flax's function.
      preferred_element_type: of the logits; None for the products' dtype.
      rngs: random keys.
      kernel_metadata: of the kernel, such as its sharding: `{"out_sharding": (None, "model")}`.
      bias_metadata: of the bias.

    Attributes:
      kernel: `[H, V]`.
      bias: `[V]`, or None.

    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> from flax import nnx
      >>> head = jliger.nnx.LMHead(8, 32, logit_softcap=30.0, use_bias=False, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> print(head(hidden).shape, head.loss(hidden, labels, z_loss=1e-4).shape)
      (2, 5, 32) ()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        vocab_size: int | None = None,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = linear.default_kernel_init,
        bias_init: Initializer = linear.default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.vocab_size = vocab_size

    @staticmethod
    def tied(
        embed: nnx.Embed, *, logit_scale: float = 1.0, logit_softcap: float | None = None, vocab_size: int | None = None
    ) -> "TiedLMHead":
        """The head whose kernel is `embed`'s embedding `[V, H]`."""
        return TiedLMHead(embed, logit_scale=logit_scale, logit_softcap=logit_softcap, vocab_size=vocab_size)

    def __call__(self, inputs: Float[Array, "*B H"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """All logits, for sampling."""
        return self.linear_head(inputs).logits(inputs, out_sharding)

    def linear_head(self, hidden: Any = None) -> LinearHead:
        """The parameters, and how logits are computed from them; hidden states do not matter."""
        del hidden
        return layers.of_linear(
            self, logit_scale=self.logit_scale, logit_softcap=self.logit_softcap, vocab_size=self.vocab_size
        )


class TiedLMHead(HeadMethods, nnx.Module):
    """The head of an embedding; `LMHead.tied` creates it. It has no parameters except the embedding's.

    Create it where it is used, `LMHead.tied(self.embed).loss(hidden, labels)`, which costs nothing. As an attribute of
    the model, it would be a second path to the embedding's parameter: flax's checkpoints use the path that comes first
    in alphabetical order, and `jax.grad` of a module, unlike `nnx.grad`, treats the two paths as two parameters.

    Attributes:
      embed: the embedding.
      logit_scale: multiplies the logits.
      logit_softcap: `c` in `c · tanh(z / c)`, or None.
      vocab_size: how many columns exist, or None for all.
    """

    def __init__(
        self,
        embed: nnx.Embed,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        vocab_size: int | None = None,
    ):
        heads.check_embed(embed, nnx.Embed, "nnx")
        self.embed = embed
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.vocab_size = vocab_size

    def __call__(self, inputs: Float[Array, "*B H"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """All logits, for sampling."""
        return self.linear_head(inputs).logits(inputs, out_sharding)

    def linear_head(self, hidden: Any = None) -> LinearHead:
        """The parameters, and how logits are computed from them; hidden states do not matter."""
        del hidden
        return layers.of_embed(
            self.embed, logit_scale=self.logit_scale, logit_softcap=self.logit_softcap, vocab_size=self.vocab_size
        )


@layers.linear_head.register(LMHead)
@layers.linear_head.register(TiedLMHead)
def _(module: LMHead | TiedLMHead, hidden: Array) -> LinearHead:
    return module.linear_head(hidden)
