"""logprobs: `linear_logprobs`, for reinforcement learning and preferences."""

import dataclasses
import functools

import jax
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Integer

from jliger.core.backend import Implementation
from jliger.core.checks import check_integer
from jliger.ops.linear_head import gradients, sharding
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.arguments import (
    HeadOptions,
    column_validity,
    head_arguments,
    with_products,
    with_tokens,
)
from jliger.ops.linear_head.types import HeadConfig, KernelLayout, Operands, Products
from jliger.ops.logits import StatsWanted
from jliger.ops.logits.unit_loss import LinearLogprobs as LinearLogprobs
from jliger.ops.logits.unit_loss import logprobs_of


class LogprobsOptions(HeadOptions, total=False):
    """The options of `linear_logprobs`."""

    keep_logits: bool | int
    products: Products | None


def linear_logprobs(
    hidden: Float[Array, "*B H"],
    kernel: Float[Array, "H V"] | Float[Array, "V H"],
    labels: Integer[Array, "*B"],
    *,
    bias: Float[Array, " V"] | None = None,
    where: Bool[Array, "*B"] | None = None,
    ignore_index: int | None = -100,
    kernel_layout: KernelLayout = "hv",
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: Float[Array, "*B"] | Float[Array, ""] | float = 1.0,
    vocab_size: int | None = None,
    logits_dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | tuple[str, ...] | None = None,
    adapter: LinearAdapter | None = None,
    keep_logits: bool | int = False,
    implementation: Implementation | None = None,
    products: Products | None = None,
) -> LinearLogprobs:
    r"""Log-probabilities of labels under a linear head, with log-sum-exp and entropy, without storing logits whole.

    With logits $z$ as in `jliger.fused_linear_cross_entropy` and $p = \mathrm{softmax}(z)$,

    $$\log p_y = z_y - \mathrm{lse}, \qquad \mathrm{lse} = \log \sum_v e^{z_v}, \qquad
      \mathrm{H} = \mathrm{lse} - \sum_v p_v z_v.$$

    The losses in `jliger.losses` are functions of these. `logprobs`, `logsumexp` and `entropy` are differentiable once,
    in reverse mode, with any cotangents, in `hidden`, `kernel` and `bias` (with `implementation="xla"`, on one device,
    `jax.jvp` of `jax.grad` and `jax.hessian` work too):
    $\partial z = (g_{lse} - g_{\log p})\, p + g_{\log p}\, [v = y] - g_H\, p\, (\log p + \mathrm{H})$. Arguments that
    are not differentiated, tokens that don't count, and in the backward pass an unused entropy cost nothing.

    Logits are recomputed in the backward pass, over blocks of the vocabulary, with four products and the memory of
    `fused_linear_cross_entropy` with `reduction="none"`. With `keep_logits=True` they are kept, in `logits_dtype`:
    three products, and `tokens · V` of memory. With a number of bytes, the logits of as many tokens as fit are kept,
    and only those of the others are recomputed. Under `jax.vmap`, each example has its own kernel gradient; `[*B]`
    tokens need only one.

    If the kernel, the bias and the adapter's second matrix are frozen, and only `logprobs` is differentiated, each
    token's gradient is computed in the forward pass: two products in place of three. Memory is then that of
    `fused_linear_cross_entropy`, and one more array of hidden's size. If log-sum-exp or entropy are differentiated too,
    there are three products; times a zero that only the device knows counts as differentiated. There are three as well
    under `jax.checkpoint`, which runs the forward pass twice. Without a `jax.jit` around forward and backward pass the
    forward pass does not know what will be differentiated: two products, and two more if log-sum-exp or entropy are.
    With `keep_logits`, logits are kept as always.

    Args:
      hidden: the model's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
      kernel: the head's weights, `[H, V]`, or `[V, H]` with `kernel_layout="vh"`: hidden's dtype or float32.
      labels: the tokens whose log-probabilities to compute, `[*B]`, integers.
      bias: `[V]`, added to the logits in float32. A column with −∞ has probability 0, unless there is a softcap, which
        turns it into `−c`.
      where: bools `[*B]`, the tokens that count.
      ignore_index: a label equal to it doesn't count. None, without `where`, says that all tokens count, which saves
        looking for those that do.
      kernel_layout: `"hv"` or `"vh"`.
      logit_scale: multiplies the logits, before the softcap, a Python number.
      logit_softcap: `c` in `c · tanh(z / c)`, a Python number, or None for no cap.
      temperature: divides logits after scale and softcap, as the sampler that drew the labels did: a Python number
        above 0, a scalar array, or one number for each token, `[*B]`. It carries no gradient. An array element that is
        not above 0 makes its tokens' results and gradients NaN.
      vocab_size: how many columns exist, a Python integer, if the kernel is padded; None for all of them. The others
        have no probability and are never predicted, their gradients are 0, and a label among them is out of range.
        `bias` stays `[V]`. What the padding holds must be finite.
      logits_dtype: the dtype that logits are rounded to before they are used, in both passes; None for hidden's dtype.
      precision: of the matrix products, as in `jax.lax.dot_general`; None for `jax.default_matmul_precision`.
      chunk_size: tokens per chunk, or None for the rule of `fused_linear_cross_entropy`.
      vocab_axis_name: inside a `jax.shard_map`, the manual axis, or axes, that shard the kernel's columns.
      adapter: a `jliger.LinearAdapter`: logits become those of `hidden · (kernel + scale · a · b)`, and gradients flow
        to `a`, `b` and `scale` too.
      keep_logits: True to keep the logits for the backward pass, if memory allows. Tokens that don't count then take
        as much time and memory as others. Or an integer: the bytes that each device may keep. The first tokens that
        count on it are kept, as many as fit in `bytes / (columns on it · size of logits_dtype)`, rounded down to a
        multiple of 8 unless all fit; tokens that don't count take nothing. Under `jax.vmap` examples share the bytes.
        On a mesh of Auto axes, all axes are assumed to shard tokens or the vocabulary. It has no effect if
        nothing is differentiated.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None selects by the device that
        the arrays are on, or under `jax.jit` by the platform that is compiled for.
      products: `"float8"` or `"float8_forward"`, as in `jliger.fused_linear_cross_entropy`. Logits have 8-bit products
        in both passes, so that log-probabilities are off by 0.04, 0.08 and 0.14 (root mean square) if logits have
        standard deviations of 1, 2 and 4; in bfloat16 by 0.003, 0.008 and 0.03. Ratios of probabilities amplify these
        errors: $e^{0.14}$ is 1.15. Not with `keep_logits`. Memory is that of `fused_linear_cross_entropy` with
        `reduction="mean"`. docs/float8.md says more.

    Returns:
      `LinearLogprobs`, float32 (float64 for float64 hidden states) and int32, `[*B]`.

    Raises:
      ValueError: a shape that doesn't fit, an option out of its range, or `"triton"` without a GPU.
      TypeError: an argument that is not an array, an unsupported dtype, or an option that is not a Python number.
      NotImplementedError: an unsupported combination.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))
      >>> kernel = jax.random.normal(jax.random.key(1), (8, 32))
      >>> labels = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
      >>> result = jliger.linear_logprobs(hidden, kernel, labels)
      >>> log_p = jax.nn.log_softmax(hidden @ kernel)
      >>> print(bool(jnp.allclose(result.logprobs[0], log_p[0, jnp.arange(5), labels[0]], atol=1e-5)))
      True
      >>> print(bool(jnp.allclose(result.entropy[0], -jnp.sum(jnp.exp(log_p) * log_p, -1)[0], atol=1e-5)))
      True
      >>> print(result.logprobs[1, 3:], result.predictions[1, 3:])
      [0. 0.] [-1 -1]
    """
    arguments = head_arguments(
        hidden,
        kernel,
        labels,
        bias=bias,
        where=where,
        ignore_index=ignore_index,
        kernel_layout=kernel_layout,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        precision=precision,
        chunk_size=chunk_size,
        vocab_axis_name=vocab_axis_name,
        adapter=adapter,
        implementation=implementation,
        stats_wanted=StatsWanted(mean_logit=True),
    )
    config, operands, labels, where, adapter, ignore_index = with_products(arguments, products)
    budget = _logits_budget(keep_logits)
    if products is not None and keep_logits is not False:
        raise NotImplementedError(
            f"keep_logits got {keep_logits!r} with products={products!r}; pass one of the two options."
        )
    config = dataclasses.replace(config, keep_logits=budget is not None or bool(keep_logits), logits_budget=budget)
    # With a budget all chunks have a fixed size.
    if config.keep_logits and budget is None and any(map(export.is_symbolic_dim, operands.hidden.shape)):
        if implementation == "triton":
            raise ValueError(
                f"keep_logits got True with hidden of the symbolic shape {operands.hidden.shape}, for which no kernel "
                "can be launched over all tokens; leave it out, or pass implementation='xla'."
            )
        config = dataclasses.replace(config, implementation="xla")
    return _linear_logprobs(config, ignore_index, operands, adapter, labels, where)


def _logits_budget(keep_logits: bool | int) -> int | None:
    """The bytes of logits to keep; None for all or none."""
    if isinstance(keep_logits, bool | np.bool):
        return None
    check_integer("keep_logits", keep_logits)
    if keep_logits < 0:
        raise ValueError(f"keep_logits got {keep_logits}; pass bytes, at least 0, or True to keep all logits.")
    return int(keep_logits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _linear_logprobs(
    config: HeadConfig,
    ignore_index: int | None,
    operands: Operands,
    adapter: LinearAdapter | None,
    labels: Integer[Array, "*B"],
    where: Bool[Array, "*B"] | None,
) -> LinearLogprobs:
    operands = with_adapter(config, operands, adapter)
    vocab_size = sharding.vocab_size(config, operands.kernel)
    operands = with_tokens(operands, labels, where, ignore_index=ignore_index, vocab_size=vocab_size)
    stats, logprobs = gradients.token_stats(config, True, operands)
    return logprobs_of(stats, logprobs, column_validity(operands.labels, stats.log_sum.dtype), operands.counted)
