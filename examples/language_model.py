"""The loss of a language model, its log-probabilities and its evaluation, with full logits or with jliger."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from llama import LlamaConfig, Tree, full_logits, hidden_states, last_layer, whole_last_layer
from runs import Record

import jliger

HEADS = ("full", "jliger")
# How far apart the two heads' losses may be, relative to the loss, to be called the same curve. The first losses differ
# by a few units in the last place. AdamW then divides each gradient by its own size: an entry that is only a rounding
# error moves by a whole learning rate in either run, and the difference grows with the steps.
CURVE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def inputs_and_labels(tokens: jax.Array, end_of_text: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, T+1]` tokens to inputs, labels, and which labels count, each `[B, T]`.

    Two kinds of labels do not count: the first token of a document, which does not follow from the document before it,
    and -1, which is no token.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    where = (inputs != end_of_text) & (inputs >= 0) & (labels >= 0)
    return jnp.maximum(inputs, 0), jnp.maximum(labels, 0), where


@dataclass(frozen=True)
class Head:
    """The last layer and what follows it: `"full"`, with logits `[B, T, V]` in memory, or `"jliger"`."""

    name: str
    implementation: str | None = None
    chunk_size: int | None = None

    def options(self, config: LlamaConfig) -> Record:
        """The options of jliger, whose Triton kernels take no float64."""
        implementation = "xla" if config.dtype == "float64" else self.implementation
        return {"implementation": implementation, "chunk_size": self.chunk_size}

    def loss_sum(
        self, config: LlamaConfig, params: Tree, hidden: jax.Array, labels: jax.Array, where: jax.Array
    ) -> jax.Array:
        if self.name == "full":
            logits = full_logits(config, params, hidden)
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels), where=where)
        kernel, layout = last_layer(config, params)
        return jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, where=where, kernel_layout=layout, reduction="sum", **self.options(config)
        )

    def last_layer(
        self, config: LlamaConfig, params: Tree, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """Hidden states, kernel and options, for an operation of jliger."""
        kernel, layout = last_layer(config, params)
        return hidden_states(config, params, inputs), kernel, {"kernel_layout": layout, **self.options(config)}

    def logprobs(
        self, config: LlamaConfig, params: Tree, inputs: jax.Array, labels: jax.Array, **options: Any
    ) -> jliger.LinearLogprobs:
        """The log-probabilities of `labels` `[B, T]`, each after its input and those before it."""
        hidden, kernel, own = self.last_layer(config, params, inputs)
        if self.name == "full":
            kernel, layout = whole_last_layer(config, params)
            return jliger.reference.linear_logprobs(hidden, kernel, labels, kernel_layout=layout, **options)
        return jliger.linear_logprobs(hidden, kernel, labels, **own, **options)


def language_model_loss(
    head: Head, config: LlamaConfig, end_of_text: int = -1
) -> Callable[[Tree, jax.Array], tuple[jax.Array, jax.Array]]:
    """A function of parameters and `[B, T+1]` tokens: the sum of the token losses, and the number of tokens."""

    def loss_fn(params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs, labels, where = inputs_and_labels(tokens, end_of_text)
        hidden = hidden_states(config, params, inputs)
        return head.loss_sum(config, params, hidden, labels, where), jnp.sum(where)

    return loss_fn


def evaluation(
    config: LlamaConfig, head: Head, batches: Sequence[np.ndarray], end_of_text: int
) -> Callable[[Tree], Record]:
    """A function of parameters: mean loss, perplexity and accuracy over the counted tokens, through jliger."""

    @jax.jit
    def sums(params: Tree, tokens: jax.Array) -> jax.Array:
        inputs, labels, where = inputs_and_labels(tokens, end_of_text)
        hidden, kernel, own = head.last_layer(config, params, inputs)
        loss, metrics = jliger.fused_linear_cross_entropy(
            hidden, kernel, labels, where=where, reduction="sum", return_metrics=True, **own
        )
        return jnp.stack([loss, metrics.accuracy * metrics.weight, metrics.weight])

    def evaluate(params: Tree) -> Record:
        loss, correct, tokens = np.sum([np.asarray(sums(params, batch), np.float64) for batch in batches], axis=0)
        mean = float(loss / max(tokens, 1))
        # JSON has no number beyond float64.
        return {"loss": mean, "perplexity": float(np.exp(min(mean, 700))), "accuracy": float(correct / max(tokens, 1))}

    return evaluate
