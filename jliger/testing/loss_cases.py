"""All losses and their types behind one interface, for tests of their common properties."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np

from jliger import losses

PAIR = ("chosen_logprobs", "rejected_logprobs")
REF_PAIR = ("ref_chosen_logprobs", "ref_rejected_logprobs")
DPO_OPTIONS: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.01},
    "bco_pair": {"reward_shift": 0.3},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A loss and its arguments.

    Attributes:
      name: the name in test ids.
      function: takes named arrays, `where` and `normalizer`; returns `(loss, metrics)`.
      trained: names of the arrays with gradients.
      fixed: names of the arrays without gradients.
      of_tokens: whether arrays are `[B, T]` instead of `[B]`.
      divides_by_sequences: whether a loss of tokens is a mean over sequences.
      differentiable: whether the loss is differentiable everywhere, without stopped gradients.
    """

    name: str
    function: Callable[..., Any]
    trained: tuple[str, ...]
    fixed: tuple[str, ...]
    of_tokens: bool = False
    divides_by_sequences: bool = False
    differentiable: bool = True

    def arrays(self, seed: int = 0, batch: int = 5, length: int = 6) -> dict[str, np.ndarray]:
        """Random float64 log-probabilities, and the loss's other arrays."""
        random = np.random.default_rng(seed)
        shape = (batch, length) if self.of_tokens else (batch,)
        makers = {
            "desirable": lambda: random.random(shape) < 0.5,
            "advantages": lambda: random.normal(size=shape if self.name == "ppo_clip" else batch),
            "entropy": lambda: random.uniform(0.1, 2, shape),
        }
        base = random.uniform(-3, -2, shape)
        return {
            name: makers.get(name, lambda: base + random.uniform(-1, 1, shape))()
            for name in (*self.trained, *self.fixed)
        }

    def count(self, where: np.ndarray) -> int:
        """The divisor of a mean."""
        return int(where.any(axis=-1).sum() if self.divides_by_sequences else where.sum())

    def loss_and_grads(self, arrays: dict[str, Any], **options: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Loss, metrics, and gradients with respect to all floating-point arrays, in one jit."""
        return _loss_and_grads(self, arrays, options)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grads(case: Case, arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    numbers = {name: array for name, array in arrays.items() if array.dtype != bool}
    flags = {name: array for name, array in arrays.items() if array.dtype == bool}

    def loss(numbers: dict[str, Any]) -> Any:
        return case.function(**numbers, **flags, **options)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(numbers)
    return value, metrics, grads


def _dpo(loss_type: str) -> Case:
    function = functools.partial(losses.dpo, loss_type=loss_type, beta=0.7, **DPO_OPTIONS.get(loss_type, {}))
    return Case(f"dpo-{loss_type}", function, PAIR, REF_PAIR, differentiable=loss_type != "hinge")


def _grpo(loss_type: str, level: str = "token", **options: Any) -> Case:
    if loss_type == "dr_grpo":
        options["max_completion_length"] = 10
    return Case(
        "-".join(["grpo", loss_type, level, *options.keys() & {"delta"}]),
        functools.partial(
            losses.grpo, loss_type=loss_type, importance_sampling_level=level, beta=0.3, entropy_coef=0.1, **options
        ),
        ("logprobs", "entropy"),
        ("old_logprobs", "ref_logprobs", "advantages"),
        of_tokens=True,
        divides_by_sequences=loss_type in ("grpo", "dr_grpo", "sapo"),
        differentiable=loss_type != "cispo",
    )


CASES = [
    *map(_dpo, get_args(losses.DPOLossType)),
    Case("dpo-forward_kl", functools.partial(losses.dpo, divergence="forward_kl", beta=0.7), PAIR, REF_PAIR),
    Case("orpo", functools.partial(losses.orpo, beta=0.5), PAIR, ()),
    Case("cpo", functools.partial(losses.cpo, label_smoothing=0.1), PAIR, ()),
    Case("simpo", functools.partial(losses.simpo, nll_weight=0.1), PAIR, ()),
    Case(
        "kto",
        functools.partial(losses.kto, beta=0.7, desirable_weight=0.8),
        ("logprobs",),
        ("ref_logprobs", "kl", "desirable"),
    ),
    *map(_grpo, get_args(losses.GRPOLossType)),
    _grpo("grpo", "sequence"),
    _grpo("dapo", delta=1.5),
    Case(
        "ppo_clip",
        functools.partial(losses.ppo_clip, entropy_coef=0.1),
        ("logprobs", "entropy"),
        ("old_logprobs", "advantages"),
        of_tokens=True,
    ),
]
