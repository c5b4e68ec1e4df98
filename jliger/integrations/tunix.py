"""Losses for tunix: supervised fine-tuning, and log-probabilities for GRPO, PPO, DPO and ORPO, without the logits.

Models must take `skip_lm_head`, as tunix's Gemma, Llama and Qwen do. Tried with tunix 0.1.8, its source of 2026-08-21.
Releases up to 0.1.7 have neither `skip_lm_head` nor `LossOutput`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import jliger
from jliger.integrations.versions import check_version

check_version("google-tunix")

from tunix.rl import common
from tunix.sft.utils import LossOutput, WeightedMetric


def loss_fn(
    model: nnx.Module,
    input_tokens: Int[Array, "B L"],
    input_mask: Bool[Array, "B L"],
    positions: Int[Array, "B L"],
    attention_mask: Bool[Array, "B L L"],
    images: Array | None = None,
) -> LossOutput:
    """The loss of supervised fine-tuning: `PeftTrainer(...).with_loss_fn(loss_fn)`.

    It returns a sum and a number of tokens, so that `gradient_accumulation_steps` divides by all tokens.
    """
    kwargs = {} if images is None else {"images": images}
    hidden, _ = model(input_tokens, positions, None, attention_mask, skip_lm_head=True, **kwargs)
    loss, metrics = jliger.fused_linear_cross_entropy(
        labels=jliger.shift_labels(input_tokens, input_mask.astype(bool)),
        reduction="sum",
        return_metrics=True,
        **head_arguments(model, hidden),
    )
    return LossOutput(primary_loss=WeightedMetric(loss, metrics.weight, eps=1e-8), aux_metrics={})


def install() -> None:
    """Replaces the log-probabilities of tunix's trainers in this process.

    GRPO and PPO call `compute_chunked_logps` if `compute_logps_chunk_size` is above 0; larger values change nothing.
    DPO and ORPO call `get_per_token_logps`. Install before the first step: what is compiled already stays as it is.
    """
    common.compute_chunked_logps = compute_chunked_logps
    common.get_per_token_logps = get_per_token_logps


def compute_chunked_logps(
    model: nnx.Module,
    hidden_states: Float[Array, "B L H"],
    target_ids: Int[Array, "B L"],
    temperature: float,
    chunk_size: int,
    return_entropy: bool,
) -> Float[Array, "B L"] | tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probabilities of `target_ids`, and entropies if `return_entropy`. A temperature of 0 stands for 1."""
    del chunk_size
    result = jliger.linear_logprobs(
        labels=target_ids, ignore_index=None, temperature=temperature or 1.0, **head_arguments(model, hidden_states)
    )
    return (result.logprobs, result.entropy) if return_entropy else result.logprobs


@functools.partial(nnx.jit, static_argnames=("logits_to_keep",))
def get_per_token_logps(
    model: nnx.Module,
    input_tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    attn_mask: Bool[Array, "B L L"],
    logits_to_keep: int,
    images: Array | None = None,
) -> Float[Array, "B K"]:
    """Log-probabilities of the last `logits_to_keep` tokens."""
    kwargs = {} if images is None else {"images": images}
    hidden, _ = model(
        input_tokens, positions=positions, attention_mask=attn_mask, cache=None, skip_lm_head=True, **kwargs
    )
    return jliger.linear_logprobs(
        labels=input_tokens[:, -logits_to_keep:],
        ignore_index=None,
        **head_arguments(model, hidden[:, -logits_to_keep - 1 : -1]),
    ).logprobs


def head_arguments(model: Any, hidden: Float[Array, "B L H"]) -> dict[str, Any]:
    """Hidden states, kernel and options that give the logits of the model's `compute_final_logits`."""
    head, name, layout = (
        (model.lm_head, "w", "hv") if hasattr(model, "lm_head") else (model.embedder, "input_embedding", "vh")
    )
    if hasattr(head, f"{name}_lora_a"):
        raise NotImplementedError(
            "The model's head has a LoRA adapter, which would be left out; exclude the head from module_path."
        )
    kernel = getattr(head, name)[...]
    hidden = hidden.astype(getattr(head, "dtype", jnp.promote_types(hidden.dtype, kernel.dtype)))
    softcap = getattr(model, "final_logits_softcap", None) or getattr(model.config, "final_logit_softcap", None)
    return {
        "hidden": hidden,
        "kernel": kernel if kernel.dtype == jnp.float32 else kernel.astype(hidden.dtype),
        "kernel_layout": layout,
        "logit_softcap": softcap,
    }
