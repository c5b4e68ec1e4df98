"""Distillation: how far a student's linear head is from a teacher's, without storing either's logits whole."""

import functools
from typing import Literal, Unpack, overload

import jax
from jaxtyping import Array, Bool, Float, Integer

from jliger.core import checks
from jliger.core.reduction import Normalizer
from jliger.ops.linear_head.adapter import LinearAdapter, with_adapter
from jliger.ops.linear_head.distillation_arguments import Call, DistillationOptions, distillation_arguments
from jliger.ops.linear_head.distillation_reduction import DistillationMetrics as DistillationMetrics
from jliger.ops.linear_head.distillation_reduction import Loss, reduced_distillation
from jliger.ops.linear_head.types import Operands


@overload
def fused_linear_kl(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    return_metrics: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Loss: ...


@overload
def fused_linear_kl(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    return_metrics: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Loss, DistillationMetrics]: ...


@overload
def fused_linear_kl(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    return_metrics: bool,
    **options: Unpack[DistillationOptions],
) -> Loss | tuple[Loss, DistillationMetrics]: ...


def fused_linear_kl(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
    return_metrics: bool = False,
    **options: Unpack[DistillationOptions],
) -> Loss | tuple[Loss, DistillationMetrics]:
    r"""Kullback-Leibler divergence between a teacher's linear head and a student's, with gradients for the student.

    With student logits $z$ and teacher logits $u$, both as in `jliger.fused_linear_cross_entropy`, temperature $\tau$,
    $p = \mathrm{softmax}(z / \tau)$ and $r = \mathrm{softmax}(u / \tau)$, a token's loss is

    $$w_{soft}\, D + w_{hard}\, (\mathrm{lse}(z) - z_y), \qquad
      D = \mathrm{KL}(r \,\|\, p) = \sum_v r_v \log \frac{r_v}{p_v}
      \quad \text{or} \quad \mathrm{KL}(p \,\|\, r)$$

    forward, as in distillation (Hinton et al., 2015, arXiv:1503.02531), which makes the student cover everything that
    the teacher may say, or reverse (Gu et al., 2023, arXiv:2306.08543), which makes it concentrate on what the teacher
    is likely to say. The hard part, the cross entropy with labels $y$, is at temperature 1.

    As in TRL and Liger, $D$ is not multiplied by $\tau^2$. Its gradients shrink as $1 / \tau^2$; to keep the balance
    with the hard part at every temperature, as in Hinton's paper, pass `soft_weight=temperature**2`.

    Differentiable once, in reverse mode, in `student_hidden`, `student_kernel`, `student_bias` and `student_adapter`;
    only the gradients that are needed are computed. The teacher carries no gradient. Gradients have their argument's
    dtype and are summed in float32. With gradients there are four matrix products: both logits, and the student's
    hidden and kernel gradients.

    A token counts if `where` is true and its label, if there are labels, is not `ignore_index`. The others cost no time
    and give loss 0 and gradient 0, whatever their hidden states are. A label outside `[0, V)` that counts makes the
    loss and the gradients NaN, if there is a hard part. A column that one model masks with a bias of −∞ and the other
    does not can make $D$ infinite; one that both mask does not matter. A softcap turns −∞ into `−c`, so that the column
    is not masked.

    Memory beside arguments, results and their gradients, with `b` bytes a value of `student_hidden`, `C` tokens a
    chunk, on a GPU: `3·b·C·V` for two sets of logits and the gradients of one, either kernel in its hidden states'
    dtype if it has another, `4·H·V` for a float32 sum of kernel gradients if `student_kernel` is not float32. Apart
    from a few numbers per token, it does not grow with the number of tokens. Under `jax.vmap`, each example has its own
    kernel gradient; `[*B]` tokens with `weights` need only one.

    Args:
      student_hidden: the student's last hidden states, `[*B, H]`: float32, bfloat16, float16, or float64 (XLA only).
        Products are computed in this dtype.
      student_kernel: the student's head, `[H, V]`, or `[V, H]` with `student_kernel_layout="vh"`: hidden's dtype or
        float32.
      teacher_hidden: the teacher's last hidden states for the same tokens, `[*B, G]`; its size and dtype may be others.
      teacher_kernel: the teacher's head, `[G, V]` or `[V, G]`, over the same vocabulary.
      direction: `"forward"` for `KL(teacher ‖ student)`, `"reverse"` for `KL(student ‖ teacher)`.
      temperature: `τ`, a Python number above 0; 1 by default.
      labels: the label of each token, `[*B]`, integers; not shifted here. Without a `hard_weight` they only say, by
        `ignore_index`, which tokens count.
      hard_weight: of the cross entropy with the labels, a number or a scalar array, 0 by default. It carries no
        gradient.
      soft_weight: of the divergence, likewise; 1 by default.
      student_bias: `[V]`, added to the logits in float32.
      teacher_bias: likewise.
      where: bools `[*B]`, the tokens that count.
      weights: a weight for each token, `[*B]`. It carries no gradient.
      ignore_index: a label equal to it doesn't count; −100 by default. None, or no labels, without `where`, says that
        all tokens count, which saves looking for those that do.
      student_kernel_layout: `"hv"`, the default, or `"vh"`.
      teacher_kernel_layout: likewise.
      student_logit_scale: multiplies the logits, a Python number; 1 by default.
      teacher_logit_scale: likewise.
      student_logit_softcap: `c` in `c · tanh(z / c)`, a Python number, or None for no cap.
      teacher_logit_softcap: likewise.
      student_adapter: a `jliger.LinearAdapter` of `student_kernel`.
      reduction: `"mean"`, the default, divides the weighted sum by the weights of the tokens that count, and gives 0 if
        that is 0; `"sum"` doesn't divide.
      normalizer: with `"mean"`, the divisor to use instead, such as the global token count when accumulating
        microbatches. It carries no gradient.
      return_metrics: also return `DistillationMetrics`.
      vocab_size: how many columns exist, a Python integer, if both kernels are padded; None, the default, for all of
        them. The others have no probability under either model, and their gradients are 0. Biases stay `[V]`. What the
        padding holds must be finite.
      logits_dtype: the dtype that both models' logits are rounded to before they are compared; None for the dtypes of
        their hidden states.
      precision: of the matrix products, as in `jax.lax.dot_general`; None for `jax.default_matmul_precision`.
      chunk_size: tokens per chunk, or None for the rule of `fused_linear_cross_entropy`.
      vocab_axis_name: inside a `jax.shard_map`, the manual axis, or axes, that shard both kernels' columns.
      implementation: `"triton"` for NVIDIA GPUs from sm_80 on, `"xla"` for any device. None selects by the device that
        the arrays are on, or under `jax.jit` by the platform that is compiled for.

    Returns:
      The loss, float32 (float64 for float64 hidden states), `[]`. With `return_metrics`, that and the metrics.

    Raises:
      ValueError: a shape that doesn't fit, an option out of its range, or `"triton"` without a GPU.
      TypeError: an argument that is not an array, an unsupported dtype, or an option that is not a Python number.
      NotImplementedError: an unsupported combination.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jliger import losses
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> student = jax.random.normal(keys[0], (2, 5, 8)), jax.random.normal(keys[1], (8, 32))
      >>> teacher = jax.random.normal(keys[2], (2, 5, 16)), jax.random.normal(keys[3], (16, 32))
      >>> loss, grads = jax.value_and_grad(losses.fused_linear_kl, (0, 1))(*student, *teacher)
      >>> p, r = (jax.nn.log_softmax(hidden @ kernel) for hidden, kernel in (student, teacher))
      >>> print(bool(jnp.allclose(loss, (jnp.exp(r) * (r - p)).sum(-1).mean(), rtol=1e-5)), grads[0].shape)
      True (2, 5, 8)
      >>> labels = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
      >>> options = {"temperature": 2.0, "soft_weight": 2.0**2, "hard_weight": 0.5}
      >>> loss, metrics = losses.fused_linear_kl(*student, *teacher, labels=labels, return_metrics=True, **options)
      >>> print(metrics.weight, bool(jnp.allclose(loss, 4 * metrics.divergence + 0.5 * metrics.cross_entropy)))
      8.0 True
    """
    checks.check_choice("direction", direction, ("forward", "reverse"))
    heads = (student_hidden, student_kernel, teacher_hidden, teacher_kernel)
    return fused_linear_jsd(
        *heads, beta=0.0 if direction == "forward" else 1.0, return_metrics=return_metrics, **options
    )


@overload
def fused_linear_jsd(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    beta: float = 0.5,
    return_metrics: Literal[False] = False,
    **options: Unpack[DistillationOptions],
) -> Loss: ...


@overload
def fused_linear_jsd(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    beta: float = 0.5,
    return_metrics: Literal[True],
    **options: Unpack[DistillationOptions],
) -> tuple[Loss, DistillationMetrics]: ...


@overload
def fused_linear_jsd(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    beta: float = 0.5,
    return_metrics: bool,
    **options: Unpack[DistillationOptions],
) -> Loss | tuple[Loss, DistillationMetrics]: ...


def fused_linear_jsd(
    student_hidden: Float[Array, "*B H"],
    student_kernel: Float[Array, "H V"] | Float[Array, "V H"],
    teacher_hidden: Float[Array, "*B G"],
    teacher_kernel: Float[Array, "G V"] | Float[Array, "V G"],
    *,
    beta: float = 0.5,
    return_metrics: bool = False,
    **options: Unpack[DistillationOptions],
) -> Loss | tuple[Loss, DistillationMetrics]:
    r"""Generalized Jensen-Shannon divergence between a teacher's linear head and a student's.

    With the student's distribution $p$ and the teacher's $r$, as in `fused_linear_kl`, and their mixture $m$,

    $$D = \beta\, \mathrm{KL}(r \,\|\, m) + (1 - \beta)\, \mathrm{KL}(p \,\|\, m),
      \qquad m = \beta\, r + (1 - \beta)\, p$$

    takes the place of its $D$. This is generalized knowledge distillation (Agarwal et al., 2024, arXiv:2306.13649), as
    TRL and Liger have it. $D$ is at most $-\beta \log \beta - (1 - \beta) \log (1 - \beta)$. Towards $\beta = 0$ it
    vanishes as $\beta\, \mathrm{KL}(r \,\|\, p)$, and towards 1 as $(1 - \beta)\, \mathrm{KL}(p \,\|\, r)$; at `beta=0`
    and `beta=1` themselves it is, as there, these divergences without the factor. So it jumps at both ends.

    `beta` is a Python number. All other arguments, gradients, memory, what is returned and what is raised are those of
    `fused_linear_kl`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jliger import losses
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> student = jax.random.normal(keys[0], (10, 8)), jax.random.normal(keys[1], (8, 32))
      >>> teacher = jax.random.normal(keys[2], (10, 16)), jax.random.normal(keys[3], (16, 32))
      >>> loss, grad = jax.value_and_grad(losses.fused_linear_jsd)(*student, *teacher)
      >>> print(bool(0 < loss < jnp.log(2)), grad.shape)
      True (10, 8)
      >>> forward = losses.fused_linear_jsd(*student, *teacher, beta=0.0)
      >>> print(bool(forward == losses.fused_linear_kl(*student, *teacher)))
      True
    """
    arguments = distillation_arguments(
        student_hidden, student_kernel, teacher_hidden, teacher_kernel, beta=beta, **options
    )
    loss, metrics = _distillation(*arguments)
    return (loss, metrics) if return_metrics else loss


@functools.partial(jax.jit, static_argnums=0)
def _distillation(
    call: Call,
    operands: Operands,
    adapter: LinearAdapter | None,
    labels: Integer[Array, "*B"] | None,
    where: Bool[Array, "*B"] | None,
    weights: Float[Array, "*B"] | None,
    normalizer: Normalizer,
    hard_weight: Float[Array, ""],
    soft_weight: Float[Array, ""],
) -> tuple[Loss, DistillationMetrics]:
    operands = with_adapter(call.config, operands, adapter)
    teacher = {name: array for name, array in operands._asdict().items() if name.startswith("teacher_")}
    operands = operands._replace(**jax.lax.stop_gradient(teacher))
    return reduced_distillation(call, operands, labels, where, weights, normalizer, hard_weight, soft_weight)
