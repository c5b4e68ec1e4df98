"""lm_head: a language model's head as a module, with a parameter of its own or tied to an embedding."""

from flax import linen as nn
from jaxtyping import Array, Float

from jliger.core import checks
from jliger.heads import linear as heads
from jliger.heads.linear import HeadMethods, LinearHead
from jliger.linen import layers


class LMHead(HeadMethods, nn.Dense):
    r"""`flax.linen.Dense` that also computes the loss, without storing the logits `[tokens, V]` whole.

    Logits are $\mathrm{softcap}(s \cdot (\mathrm{hidden} \cdot \mathrm{kernel} + \mathrm{bias}))$. Parameters, their
    initial values and boxes, and dtypes are those of `flax.linen.Dense`, so that a checkpoint of one loads into the
    other. `LMHead.tied` is the head of an embedding.

    Attributes:
      features: `V`.
      use_bias: whether there is a bias; as in `flax.linen.Dense` there is.
      dtype: of the products; None for what hidden states and parameters promote to.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: makes the kernel `[H, V]`; `nn.with_partitioning` adds a sharding.
      bias_init: makes the bias `[V]`.
      promote_dtype: casts hidden states, kernel and bias in place of flax's function.
      logit_scale: `s`, a Python number.
      logit_softcap: `c` in `c · tanh(z / c)`, a Python number, or None.
      vocab_size: how many columns exist, if the kernel is padded; None for all. The others have logits of −∞, no
        probability, and gradients of 0.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> head = jliger.linen.LMHead(32, logit_softcap=30.0, use_bias=False)
      >>> hidden, labels = jnp.ones((2, 5, 8)), jnp.zeros((2, 5), int)
      >>> variables = head.init(jax.random.key(0), hidden)
      >>> print(head.apply(variables, hidden).shape, head.apply(variables, hidden, labels, method="loss").shape)
      (2, 5, 32) ()
    """

    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None

    @staticmethod
    def tied(
        embed: nn.Embed, *, logit_scale: float = 1.0, logit_softcap: float | None = None, vocab_size: int | None = None
    ) -> "TiedLMHead":
        """The head whose kernel is `embed`'s embedding `[V, H]`."""
        heads.check_embed(embed, nn.Embed, "linen")
        return TiedLMHead(embed, logit_scale=logit_scale, logit_softcap=logit_softcap, vocab_size=vocab_size)

    def __call__(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """All logits, for sampling."""
        return self.linear_head(hidden).logits(hidden)

    @nn.compact
    def linear_head(self, hidden: Float[Array, "*B H"]) -> LinearHead:
        """The parameters, and how logits are computed from them."""
        heads.check_product(self, self.dot_general, self.dot_general_cls)
        hidden = checks.as_array("hidden", hidden)
        params = {"kernel": self.param("kernel", self.kernel_init, (hidden.shape[-1], self.features), self.param_dtype)}
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return layers.of_params(
            self, params, logit_scale=self.logit_scale, logit_softcap=self.logit_softcap, vocab_size=self.vocab_size
        )


class TiedLMHead(HeadMethods, nn.Module):
    """The head of an embedding; `LMHead.tied` creates it. It has no parameters except the embedding's.

    Attributes:
      embed: the embedding.
      logit_scale: multiplies the logits.
      logit_softcap: `c` in `c · tanh(z / c)`, or None.
      vocab_size: how many columns exist, or None for all.
    """

    embed: nn.Embed
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None

    def __call__(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """All logits, for sampling."""
        return self.linear_head(hidden).logits(hidden)

    def linear_head(self, hidden: Float[Array, "*B H"]) -> LinearHead:
        """The parameters, and how logits are computed from them."""
        return layers.of_embed(
            self.embed,
            hidden,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            vocab_size=self.vocab_size,
        )


@layers.linear_head.register(LMHead)
@layers.linear_head.register(TiedLMHead)
def _(module: LMHead | TiedLMHead, hidden: Array) -> LinearHead:
    return module.linear_head(hidden)
