"""A loss for kauldron, and what gemma's models need for it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import jliger
from jliger.integrations.versions import check_version
from jliger.ops.linear_head.types import KernelLayout

check_version("kauldron")

from kauldron import kd, kontext


@dataclasses.dataclass(eq=True, frozen=True, kw_only=True)
class FusedLinearCrossEntropy(kd.losses.Loss):
    """Replaces `kd.losses.SoftmaxCrossEntropyWithIntLabels`, with hidden states and a kernel instead of logits.

    For gemma's models the keys are `hidden="preds.hidden_states"` and `kernel="params.embedder.input_embedding"`.

    Attributes:
      hidden: key of the last hidden states, `[*B, H]`.
      kernel: key of the head's weights, `[V, H]`, or `[H, V]` with `kernel_layout="hv"`.
      labels: key of the labels, `[*B, 1]`.
      kernel_layout: `"vh"` for a tied embedding, or `"hv"`.
      logit_softcap: the softcap of the logits, such as the model's `config.final_logit_softcap`.
      z_loss: weight of the squared log-sum-exp.
    """

    hidden: kontext.Key = kontext.REQUIRED
    kernel: kontext.Key = kontext.REQUIRED
    labels: kontext.Key = kontext.REQUIRED
    kernel_layout: KernelLayout = "vh"
    logit_softcap: float | None = None
    z_loss: float = 0.0

    def get_values(
        self, hidden: Float[Array, "*B H"], kernel: Float[Array, "V H"], labels: Int[Array, "*B 1"]
    ) -> Float[Array, "*B 1"]:
        """The loss of each token. Its sum, in `get_state`, takes one matrix product less."""
        losses = jliger.fused_linear_cross_entropy(hidden, kernel, labels[..., 0], reduction="none", **self._options())
        return losses[..., None]

    def get_state(
        self,
        hidden: Float[Array, "*B H"],
        kernel: Float[Array, "V H"],
        labels: Int[Array, "*B 1"],
        *,
        mask: Array | None = None,
        step: int | None = None,
    ) -> kd.losses.Loss.State:
        """The weighted sum of losses and what kauldron divides it by: the sum of the mask, or the number of labels."""
        weights = jnp.ones(labels.shape) if mask is None else jnp.broadcast_to(mask, labels.shape)
        weights = weights[..., 0].astype(jnp.float32)
        loss, metrics = jliger.fused_linear_cross_entropy(
            hidden,
            kernel,
            labels[..., 0],
            where=weights != 0,
            weights=weights,
            reduction="sum",
            return_metrics=True,
            **self._options(),
        )
        count = metrics.weight if self.normalize_by == "mask" else jnp.asarray(labels.size, jnp.float32)
        return self.State(value=loss * self.get_weight(step), count=count)

    def get_state_from_context(self, context: Any) -> kd.losses.Loss.State:
        """`get_state` of what the keys name."""
        return self.get_state(**kontext.resolve_from_keyed_obj(context, self))

    def _options(self) -> dict[str, Any]:
        return {"kernel_layout": self.kernel_layout, "logit_softcap": self.logit_softcap, "z_loss": self.z_loss}


class WithHiddenStates:
    """Mixin for gemma's models, which return their hidden states only if they are called with an option.

    The logits that the model also returns are not computed under `jax.jit` if nothing reads them.

        class Model(WithHiddenStates, gm.nn.Gemma3_1B):
            pass
    """

    def __call__(self, tokens: Int[Array, "*B L"], **kwargs: Any) -> Any:
        model: Any = super()
        return model.__call__(tokens, **{"return_hidden_states": True, **kwargs})
