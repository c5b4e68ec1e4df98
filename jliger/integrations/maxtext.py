"""MaxText's pre-training loss, and that of its multi-token prediction, without the logits.

Run this module instead of MaxText's trainer, or call `install` before it:

    python -m jliger.integrations.maxtext base.yml run_name=...
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app
from jaxtyping import Array, Float, Int

import jliger
from jliger.integrations.versions import check_version

check_version("maxtext")

from maxtext.layers import multi_token_prediction, nnx_decoders
from maxtext.trainers.pre_train import train

_apply_output_head = nnx_decoders.NNXDecoder.apply_output_head


def install() -> None:
    """Replaces MaxText's pre-training loss in this process, and that of multi-token prediction.

    MaxText has no argument for a loss. This replaces `vocab_tiling_nnx_loss`, which its trainer calls if
    `num_vocab_tiling` is above 1; larger values change nothing. With `num_vocab_tiling=1` MaxText still computes the
    main loss from full logits. The loss of multi-token prediction is replaced in both cases.
    """
    train.vocab_tiling_nnx_loss = vocab_tiling_nnx_loss
    nnx_decoders.NNXDecoder.apply_output_head = apply_output_head
    multi_token_prediction._cross_entropy_with_integer_labels = cross_entropy_with_integer_labels


def main(argv: Sequence[str]) -> None:
    """MaxText's trainer with these losses. Sets `num_vocab_tiling=2` unless an argument sets it."""
    install()
    is_set = any(argument.startswith("num_vocab_tiling=") for argument in argv)
    train.main([*argv, *([] if is_set else ["num_vocab_tiling=2"])])


def vocab_tiling_nnx_loss(
    model: Any, hidden_states: Float[Array, "B L H"], data: Mapping[str, Array], config: Any, is_train: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of losses over the tokens of a segment, z-loss included, and the sum of z-losses."""
    decoder = model.decoder
    hidden = decoder.dropout(
        decoder.decoder_norm(hidden_states), deterministic=not (is_train and config.enable_dropout)
    )
    loss, metrics = jliger.fused_linear_cross_entropy(
        labels=data["targets"],
        where=data["targets_segmentation"] != 0,
        z_loss=config.z_loss_multiplier,
        reduction="sum",
        return_metrics=True,
        **head_arguments(decoder, model.token_embedder, hidden),
    )
    return loss, metrics.z_loss


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Unprojected:
    """Stands for the logits of multi-token prediction. A tree without leaves, so that nothing reshards it as logits."""

    arguments: Mapping[str, Any]

    def tree_flatten(self) -> tuple[tuple[()], "Unprojected"]:
        return (), self

    @classmethod
    def tree_unflatten(cls, unprojected: "Unprojected", _: tuple[()]) -> "Unprojected":
        return unprojected


def apply_output_head(
    decoder: Any, shared_embedding: Any, y: Array, deterministic: bool, model_mode: str, normalize_y: bool = True
) -> Array | Unprojected:
    """MaxText's, but for multi-token prediction, which alone has hidden states that are normalized already."""
    if normalize_y:
        return _apply_output_head(decoder, shared_embedding, y, deterministic, model_mode)
    if decoder.config.mtp_eval_target_module > 0:
        raise NotImplementedError(
            f"mtp_eval_target_module got {decoder.config.mtp_eval_target_module}; pass 0. The acceptance rate needs "
            "the logits, which jliger does not compute."
        )
    hidden = decoder.dropout(y, deterministic=deterministic)
    return Unprojected(head_arguments(decoder, shared_embedding, hidden))


def cross_entropy_with_integer_labels(logits: Unprojected, labels: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """The loss of each token in multi-token prediction."""
    return jliger.fused_linear_cross_entropy(labels=labels, ignore_index=None, reduction="none", **logits.arguments)


def head_arguments(decoder: Any, embedder: Any, hidden: Float[Array, "B L H"]) -> dict[str, Any]:
    """Hidden states, kernel and options that give the logits of `NNXDecoder.apply_output_head`."""
    config = decoder.config
    if config.parameter_memory_host_offload:
        raise NotImplementedError("parameter_memory_host_offload got True; pass False: the head must be on the device.")
    if config.logits_via_embedding:
        return {
            "hidden": hidden,
            # MaxText rounds a tied table to bfloat16, whatever the dtype of the products.
            "kernel": embedder.embedding[...].astype(jnp.bfloat16).astype(hidden.dtype),
            "kernel_layout": "vh",
            "logit_scale": hidden.shape[-1] ** -0.5 if config.normalize_embedding_logits else 1.0,
            "logit_softcap": config.final_logits_soft_cap,
            "logits_dtype": jnp.float32 if config.logits_dot_in_fp32 else config.dtype,
        }
    hidden = hidden.astype(decoder.logits_dense.dtype)
    kernel = decoder.logits_dense.kernel[...]
    return {
        "hidden": hidden,
        "kernel": kernel if kernel.dtype == jnp.float32 else kernel.astype(hidden.dtype),
        "precision": config.matmul_precision,
    }


if __name__ == "__main__":
    app.run(main)
