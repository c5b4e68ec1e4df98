"""A decoder with Medusa heads: its losses, and greedy speculative decoding."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import llama
import optax
from decoder import DecoderConfig, Tree
from flax import nnx
from jax.sharding import PartitionSpec as P
from language_model import Head
from llama import HEAD_SPEC, last_layer

import jliger
from jliger import CrossEntropyMetrics

# Of a matrix of all heads.
STACKED_SPEC = P(None, *HEAD_SPEC)


@dataclass(frozen=True)
class Medusa:
    """A decoder with `count` heads beside its own; head i = 1 ... predicts the token i places after the next one.

    Parameters are `{"backbone": ..., "heads": ...}`, or the heads' alone where the backbone is frozen.

    Attributes:
      config: of the decoder.
      count: how many heads.
      head: how losses are computed, with jliger or with full logits.
      end_of_text: the token between documents.
      decay: the loss of head i has the weight `decay ** i`.
      weight: what the heads' loss is multiplied by where the decoder learns, too.
    """

    config: DecoderConfig
    count: int
    head: Head
    end_of_text: int
    decay: float = 0.8
    weight: float = 0.2

    @property
    def _options(self) -> dict[str, Any]:
        return {"implementation": self.head.implementation, "chunk_size": self.head.chunk_size}

    def initial_heads(self, backbone: Tree) -> Any:
        """Heads that begin as the decoder's own (Cai et al., 2024)."""
        kernel, layout = last_layer(self.config, backbone)
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        return jliger.nnx.MedusaHeads(
            self.count,
            hidden,
            vocab,
            logit_softcap=self.config.logit_softcap,
            dtype=jnp.dtype(self.config.dtype),
            param_dtype=backbone["norm"].dtype,
            kernel_init=lambda *_: (kernel.T if layout == "vh" else kernel).astype(backbone["norm"].dtype),
            rngs=nnx.Rngs(0),
        )

    def initial_parameters(self, backbone: Tree) -> Tree:
        return nnx.state(self.initial_heads(backbone))

    def heads(self, backbone: Tree, state: Tree) -> Any:
        """The module with its parameters. On a mesh they are gathered, but jliger gathers one head's at a time."""
        # Blocks are small. All heads at once are gathered for full logits alone.
        how = {"blocks": self._gathered, "heads": self._gathered if self.head.name == "full" else self._sharded}
        parts = {name: jax.tree.map(how[name], part) for name, part in state.items()}
        return nnx.merge(nnx.graphdef(nnx.eval_shape(partial(self.initial_heads, backbone))), nnx.State(parts))

    def specs(self, heads: Tree) -> Tree:
        """How the heads' parameters are sharded on a mesh: matrices as the decoder's last layer."""
        return jax.tree.map(lambda leaf: STACKED_SPEC if leaf.ndim == 3 else P(), heads)

    def _gathered(self, leaf: jax.Array) -> jax.Array:
        return llama._gathered(leaf, STACKED_SPEC, self.config.dtype) if leaf.ndim == 3 else leaf

    def _sharded(self, leaf: jax.Array) -> jax.Array:
        return llama.sharded(leaf, STACKED_SPEC) if leaf.ndim == 3 else leaf

    def labels(self, tokens: jax.Array) -> jax.Array:
        """The tokens 1, 2, ... places after `[B, T]` tokens, `[count + 1, B, T]`, in the same document; -1 is none."""
        is_end = tokens == self.end_of_text
        documents = 1 + jnp.cumsum(is_end, axis=1) - is_end
        segments = jnp.where(tokens < 0, 0, documents)
        return jliger.shift_labels(jnp.maximum(tokens, 0), by=range(1, self.count + 2), segment_ids=segments)

    def hidden_states(self, backbone: Tree, tokens: jax.Array) -> jax.Array:
        return decoder.hidden_states(self.config, backbone, jnp.maximum(tokens, 0))

    def heads_loss(self, heads: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        """The weighted sum of the heads' losses of labels `[count, B, T]`."""
        weights = [self.decay**ahead for ahead in range(1, self.count + 1)]
        if self.head.name == "jliger":
            return heads.loss(hidden, labels, head_weights=weights, reduction="sum", **self._options)
        logits = heads(hidden).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.asarray(weights)[:, None, None] * losses, where=labels >= 0)

    def backbone_loss(self, backbone: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum of the decoder's losses without heads, and how many tokens count."""
        labels = self.labels(tokens)[0]
        hidden = self.hidden_states(backbone, tokens)
        loss = decoder.loss_sum(self.head.name, self.config, backbone, hidden, labels, **self._options)
        return loss, jnp.sum(labels >= 0)

    def stage_1(self, state: Tree, tokens: jax.Array, backbone: Tree) -> tuple[jax.Array, jax.Array]:
        """The heads' loss; the backbone is frozen."""
        labels = self.labels(tokens)
        hidden = self.hidden_states(backbone, tokens)
        return self.heads_loss(self.heads(backbone, state), hidden, labels[1:]), jnp.sum(labels[0] >= 0)

    def stage_2(self, params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The decoder's own loss and the heads'; everything learns."""
        backbone, labels = params["backbone"], self.labels(tokens)
        hidden = self.hidden_states(backbone, tokens)
        own = decoder.loss_sum(self.head.name, self.config, backbone, hidden, labels[0], **self._options)
        heads = self.heads_loss(self.heads(backbone, params["heads"]), hidden, labels[1:])
        return own + self.weight * heads, jnp.sum(labels[0] >= 0)

    @partial(jax.jit, static_argnums=0)
    def metrics(self, params: Tree, tokens: jax.Array) -> CrossEntropyMetrics:
        """Loss and accuracy on given text, `[count + 1]`: the decoder's own head first."""
        labels, hidden = self.labels(tokens), self.hidden_states(params["backbone"], tokens)
        kernel, layout = last_layer(self.config, params["backbone"])
        about = {"return_metrics": True, "reduction": "sum", **self._options}
        softcap = self.config.logit_softcap
        _, own = jliger.fused_linear_cross_entropy(
            hidden, kernel, labels[0], kernel_layout=layout, logit_softcap=softcap, **about
        )
        _, others = self.heads(params["backbone"], params["heads"]).loss(hidden, labels[1:], **about)
        return jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), own, others)

    @partial(jax.jit, static_argnums=(0, 3))
    def speculate(self, params: Tree, prompts: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Greedy speculative decoding of prompts `[B, P]`, one chain of guesses at a time.

        A pass of the model over the text and the heads' guesses gives the model's own next token at each place. The
        guesses that are the model's own tokens are accepted up to the first that is not, and one token more is known:
        the model's own after them. From there the heads guess again, out of the same pass.

        Returns:
          Prompts with `length` tokens each, `[B, P + length]`: the tokens of greedy decoding; how many tokens were
          found, `[B]`, which can be up to `count` more; and how many passes it took, `[B]`.
        """
        batch, first = prompts.shape
        heads, rows = self.heads(params["backbone"], params["heads"]), jnp.arange(batch)
        ahead = jnp.arange(self.count + 1)

        def unfinished(place: jax.Array) -> jax.Array:
            return place < first - 1 + length

        def one_pass(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            # `place` is each row's last token that is known; guesses follow it.
            tokens, place, passes = carry
            # Attention is causal: what stands after the guesses does not matter.
            hidden = self.hidden_states(params["backbone"], tokens)[rows[:, None], place[:, None] + ahead]
            own = decoder.full_logits(self.config, params["backbone"], hidden).argmax(axis=-1)
            guesses = tokens[rows[:, None], place[:, None] + ahead[1:]]
            accepted = jnp.cumprod(guesses == own[:, :-1], axis=1).sum(axis=1)
            found = jnp.concatenate([own[rows, accepted][None], heads(hidden[rows, accepted]).argmax(axis=-1)])
            going, new = unfinished(place), place + accepted + 1
            places = jnp.where(going[:, None], new[:, None] + ahead, tokens.shape[1])
            tokens = tokens.at[rows[:, None], places].set(found.T.astype(tokens.dtype), mode="drop")
            return tokens, jnp.where(going, new, place), passes + going

        # -1 is no token: the first pass has no guesses.
        tokens = jnp.pad(prompts, ((0, 0), (0, length + 2 * self.count + 1)), constant_values=-1)
        start = (tokens, jnp.full(batch, first - 1), jnp.zeros(batch, jnp.int32))
        tokens, place, passes = jax.lax.while_loop(lambda carry: unfinished(carry[1]).any(), one_pass, start)
        return tokens[:, : first + length], place - (first - 1), passes
