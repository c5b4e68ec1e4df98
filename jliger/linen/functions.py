"""functions: losses and log-probabilities of a head that is a Flax module."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack, overload

from flax import linen as nn
from jaxtyping import Array, Float, Int, Integer

from jliger.heads.linear import hidden_of
from jliger.linen.layers import linear_head
from jliger.ops.linear_head.arguments import HeadOptions
from jliger.ops.linear_head.cross_entropy import CrossEntropyMetrics, CrossEntropyOptions, Loss
from jliger.ops.linear_head.logprob_loss import LossFn, LossOptions
from jliger.ops.linear_head.logprobs import LinearLogprobs, LogprobsOptions
from jliger.ops.linear_head.top_k import LinearTopK


@overload
def fused_linear_cross_entropy(
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "*B"],
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> Loss: ...


@overload
def fused_linear_cross_entropy(
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "*B"],
    *,
    return_metrics: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Loss, CrossEntropyMetrics]: ...


@overload
def fused_linear_cross_entropy(
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "*B"],
    *,
    return_metrics: bool,
    **options: Unpack[CrossEntropyOptions],
) -> Loss | tuple[Loss, CrossEntropyMetrics]: ...


def fused_linear_cross_entropy(
    module: nn.Module | Mapping[str, Any], hidden: Float[Array, "*B H"], labels: Int[Array, "*B"], **options: Any
) -> Any:
    """The loss of `module(hidden)`, without storing the logits `[tokens, V]` whole.

    The kernel, the bias, and the dtype and precision of the products are the module's. Flax's own layers neither scale
    nor cap logits: if the model does so after them, pass `logit_scale` and `logit_softcap`. A `jliger.linen.LMHead` has
    its own. Inside a model that is being initialised, this creates the layer's parameters, as calling the layer would.

    Parameters are cast as the module casts them, with two exceptions, both more precise: the bias is added in its own
    dtype, and the gradients of float32 parameters are summed in float32.

    Args:
      module: the head, from `[*B, H]` to `[*B, V]`, bound to its variables: `jliger.linen.LMHead` or `TiedLMHead`;
        `flax.linen.Dense`; `flax.linen.DenseGeneral` or `Einsum` that map one last axis to another; `flax.linen.Embed`,
        used as by its `attend`. Or the variables alone of one of these, `{"kernel": ...}` with `"bias"` or without, or
        `{"embedding": ...}`, in a collection `"params"` or not, boxed or not: products are then computed in hidden's
        dtype.
      hidden: the model's last hidden states, `[*B, H]`.
      labels: the label of each token, `[*B]`. They are not shifted here.
      **options: those of `jliger.fused_linear_cross_entropy`. They override the module's own.

    Returns:
      As `jliger.fused_linear_cross_entropy`.

    Raises:
      NotImplementedError: a module of another kind.
      TypeError: an array as `module`; an option that is the module's own, such as `bias`; what
        `jliger.fused_linear_cross_entropy` raises.
      ValueError: a module that is not bound, or variables of something else; what
        `jliger.fused_linear_cross_entropy` raises.

    Examples:
      >>> import jax, jax.numpy as jnp, jliger
      >>> from flax import linen as nn
      >>> class Model(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, tokens, labels):
      ...         hidden = nn.Embed(32, 8)(tokens)
      ...         return jliger.linen.fused_linear_cross_entropy(nn.Dense(32, name="logits"), hidden, labels)
      >>> tokens = jnp.zeros((2, 5), int)
      >>> variables = Model().init(jax.random.key(0), tokens, tokens)
      >>> print(variables["params"]["logits"]["kernel"].shape, Model().apply(variables, tokens, tokens).shape)
      (8, 32) ()
    """
    hidden = hidden_of(module, hidden)
    return linear_head(module, hidden).loss(hidden, labels, **options)


def linear_logprobs(
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "*B"],
    **options: Unpack[LogprobsOptions],
) -> LinearLogprobs:
    """Log-probabilities, log-sum-exps, entropies and predictions of the tokens, without storing the logits whole.

    Args:
      module: the head, as `jliger.linen.fused_linear_cross_entropy` takes it.
      hidden: the model's last hidden states, `[*B, H]`.
      labels: the label of each token, `[*B]`. They are not shifted here.
      **options: those of `jliger.linear_logprobs`. They override the module's own.

    Returns:
      `jliger.LinearLogprobs`.

    Raises:
      NotImplementedError: a module of another kind.
      TypeError: an array as `module`; an option that is the module's own, such as `bias`; what
        `jliger.linear_logprobs` raises.
      ValueError: what `jliger.linear_logprobs` raises.
    """
    hidden = hidden_of(module, hidden)
    return linear_head(module, hidden).logprobs(hidden, labels, **options)


def linear_top_k(
    module: nn.Module | Mapping[str, Any], hidden: Float[Array, "*B H"], k: int, **options: Unpack[HeadOptions]
) -> LinearTopK:
    """The k most likely columns of `module(hidden)` for each token, without storing the logits `[tokens, V]` whole.

    Args:
      module: the head, as `jliger.linen.fused_linear_cross_entropy` takes it.
      hidden: the model's last hidden states, `[*B, H]`.
      k: how many columns, a Python integer.
      **options: those of `jliger.linear_top_k`. They override the module's own.

    Returns:
      `jliger.LinearTopK`.

    Raises:
      NotImplementedError: a module of another kind.
      TypeError: an array as `module`; an option that is the module's own, such as `bias`; what
        `jliger.linear_top_k` raises.
      ValueError: what `jliger.linear_top_k` raises.
    """
    hidden = hidden_of(module, hidden)
    return linear_head(module, hidden).top_k(hidden, k, **options)


def fused_linear_top_k_kl(
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    teacher_ids: Integer[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    **options: Any,
) -> Any:
    """The divergence of `module(hidden)` from the few log-probabilities of a teacher that are known.

    Args:
      module: the student's head, as `jliger.linen.fused_linear_cross_entropy` takes it.
      hidden: the student's last hidden states, `[*B, H]`.
      teacher_ids: the teacher's columns, `[*B, K]`, as `jliger.linen.linear_top_k` gives them.
      teacher_logprobs: their log-probabilities, `[*B, K]`.
      **options: those of `jliger.losses.fused_linear_top_k_kl`. They override the module's own.

    Returns:
      As `jliger.losses.fused_linear_top_k_kl`.

    Raises:
      NotImplementedError: a module of another kind; what `jliger.losses.fused_linear_top_k_kl` raises.
      TypeError: an array as `module`; an option that is the module's own, such as `bias`; what
        `jliger.losses.fused_linear_top_k_kl` raises.
      ValueError: what `jliger.losses.fused_linear_top_k_kl` raises.
    """
    hidden = hidden_of(module, hidden)
    return linear_head(module, hidden).top_k_kl(hidden, teacher_ids, teacher_logprobs, **options)


def fused_linear_loss(
    loss_fn: LossFn,
    module: nn.Module | Mapping[str, Any],
    hidden: Float[Array, "*B H"],
    labels: Int[Array, "*B"],
    args: tuple[Any, ...] = (),
    **options: Unpack[LossOptions],
) -> Any:
    """The sum of any loss of the log-probabilities of `module(hidden)`, without its logits.

    Args:
      loss_fn: the loss of one token or one row, as `jliger.fused_linear_loss` takes it.
      module: the head, as `jliger.linen.fused_linear_cross_entropy` takes it.
      hidden: the model's last hidden states, `[*B, H]`.
      labels: the label of each token, `[*B]`. They are not shifted here.
      args: further arguments of `loss_fn`, as `jliger.fused_linear_loss` takes them.
      **options: those of `jliger.fused_linear_loss`, of which `units` is required. They override what the module says.

    Returns:
      As `jliger.fused_linear_loss`.

    Raises:
      NotImplementedError: the module is not a supported head; what `jliger.fused_linear_loss` raises.
      TypeError: an array as `module`; an option that is the module's own, such as `bias`; what
        `jliger.fused_linear_loss` raises.
      ValueError: what `jliger.fused_linear_loss` raises.
    """
    hidden = hidden_of(module, hidden)
    return linear_head(module, hidden).logprob_loss(loss_fn, hidden, labels, args, **options)
