"""Decoders of published checkpoints: Llama 3, Qwen2, Qwen3, Gemma and Gemma 2, up to their last hidden states.

One function covers them all; a `DecoderConfig` says in what they differ. As in `llama.py`, parameters are a tree of
arrays with the layers' stacked, and under `jax.set_mesh` they and the batch are sharded over the axes of `llama.AXES`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
from jax.sharding import PartitionSpec as P
from llama import EMBEDDING_SPEC, HEAD_SPEC, HEADS, HIDDEN, last_layer, sharded, wide

import jliger

Tree = Any
HEAD_NAMES = ("jliger", "full")


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary frequencies: those too slow to turn around once in training are divided by `factor`."""

    factor: float
    low: float
    high: float
    trained_length: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, what its architecture adds to Llama's, and the dtype of its arithmetic.

    Attributes:
      head_size: of an attention head; not always `hidden_size / heads`.
      tie_embeddings: whether the last layer's kernel is the embedding.
      activation: of the gated MLP, `"silu"` or `"gelu_tanh"`.
      norm_offset: what is added to the scales of norms (Gemma: 1).
      embedding_scale: what embeddings are multiplied by (Gemma: the root of the hidden size).
      rope_sections: how many pairs of features are rotated by each of a token's positions, such as time, height and
        width (Qwen2-VL). Empty: tokens have one position.
      qkv_bias: whether queries, keys and values have a bias (Qwen2).
      qk_norms: whether queries and keys are normalized (Qwen3).
      output_norms: whether the outputs of attention and MLP are normalized (Gemma 2).
      query_scale: what attention scores are multiplied by; None: one over the root of `head_size`.
      attention_softcap: of the attention scores (Gemma 2).
      logit_softcap: of the logits (Gemma 2).
      windows: for each layer, how many tokens back its attention reaches; 0 for all of them. Empty: all layers 0.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tie_embeddings: bool = False
    activation: str = "silu"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    rope_sections: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norms: bool = False
    output_norms: bool = False
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Parameter:
    """A parameter's shape and sharding.

    Attributes:
      shape: the shape.
      spec: the sharding.
      inputs: how many of the first dimensions are summed over in the product; None for an embedding; 0 for a vector.
      constant: the value that a vector begins with where there is no checkpoint.
    """

    shape: tuple[int, ...]
    spec: P
    inputs: int | None = 0
    constant: float = 0.0

    @property
    def is_matrix(self) -> bool:
        return self.inputs != 0


def layer_parameters(config: DecoderConfig) -> dict[str, Parameter]:
    """The descriptions of one layer's parameters."""
    hidden, mlp, size = config.hidden_size, config.mlp_size, config.head_size
    scale = partial(Parameter, spec=P(None), constant=1 - config.norm_offset)
    described = {
        "attention_norm": scale((hidden,)),
        "query": Parameter((hidden, config.heads, size), P("fsdp", "tensor", None), 1),
        "key": Parameter((hidden, config.kv_heads, size), P("fsdp", "tensor", None), 1),
        "value": Parameter((hidden, config.kv_heads, size), P("fsdp", "tensor", None), 1),
        "attention_out": Parameter((config.heads, size, hidden), P("tensor", None, "fsdp"), 2),
        "mlp_norm": scale((hidden,)),
        "gate": Parameter((hidden, mlp), P("fsdp", "tensor"), 1),
        "up": Parameter((hidden, mlp), P("fsdp", "tensor"), 1),
        "down": Parameter((mlp, hidden), P("tensor", "fsdp"), 1),
    }
    if config.qkv_bias:
        for name in ("query", "key", "value"):
            described[f"{name}_bias"] = Parameter(described[name].shape[1:], P("tensor", None))
    if config.qk_norms:
        described |= {"query_norm": scale((size,)), "key_norm": scale((size,))}
    if config.output_norms:
        described |= {"attention_out_norm": scale((hidden,)), "mlp_out_norm": scale((hidden,))}
    return described


def stacked(layers: int, each: Parameter) -> Parameter:
    """All layers' parameter, from one layer's."""
    return Parameter((layers, *each.shape), P(None, *each.spec), each.inputs, each.constant)


def parameters(config: DecoderConfig) -> Tree:
    """The descriptions of all parameters, as a tree of the parameters' structure."""
    hidden, vocab = config.hidden_size, config.vocab_size
    tree: Tree = {
        "embedding": Parameter((vocab, hidden), EMBEDDING_SPEC, None),
        "layers": {name: stacked(config.layers, each) for name, each in layer_parameters(config).items()},
        "norm": Parameter((hidden,), P(None), constant=1 - config.norm_offset),
    }
    if not config.tie_embeddings:
        tree["head"] = Parameter((hidden, vocab), HEAD_SPEC, 1)
    return tree


def initial_parameters(config: DecoderConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Tree:
    """Random parameters, to measure with."""
    leaves, tree = jax.tree.flatten(parameters(config))
    return tree.unflatten(
        0.02 * jax.random.normal(key, leaf.shape, dtype)
        if leaf.is_matrix
        else jnp.full(leaf.shape, leaf.constant, dtype)
        for leaf, key in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
    )


def parameter_count(config: DecoderConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters(config)))


def frequencies(config: DecoderConfig) -> np.ndarray:
    """The angle per position of each pair of features; with sections, a row for each, 0 for the others' pairs."""
    pairs = config.head_size // 2
    plain = config.rope_theta ** (-np.arange(pairs) / pairs)
    if sections := config.rope_sections:
        return np.repeat(np.eye(len(sections)), sections, axis=1) * plain
    if (scaling := config.rope_scaling) is None:
        return plain
    # How often a pair turns around over the length that the model was trained with.
    turns = scaling.trained_length * plain / (2 * np.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def low_rank_product(x: jax.Array, adapter: Tree, inputs: int, scale: float) -> jax.Array:
    """`scale · (x · a) · b` over the last `inputs` dimensions of `x`, in its dtype."""
    a, b = (adapter[name].astype(x.dtype) for name in ("a", "b"))
    return scale * jnp.tensordot(jnp.tensordot(x, a, inputs), b, 1)


def visible(segments: jax.Array | None, length: int, window: jax.Array | None) -> jax.Array | None:
    """Which tokens `[B or 1, 1, T, T]` a token sees besides being after them: those of its segment and window."""
    if segments is None and window is None:
        return None
    mask = jnp.ones((1, 1, length, length), bool)
    if segments is not None:
        mask &= (segments[:, :, None] == segments[:, None, :])[:, None]
    if window is not None:
        distance = jnp.arange(length)[:, None] - jnp.arange(length)
        mask &= (distance < window) | (window == 0)
    return mask


def attention(
    config: DecoderConfig, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Causal grouped-query attention: cuDNN's where it can be used without a softcap, else with scores in memory."""
    batch, length, heads, size = query.shape
    scale = size**-0.5 if config.query_scale is None else config.query_scale
    if config.attention_softcap is None and llama.has_cudnn_attention(query):
        return llama.cudnn_attention(query, key, value, mask, scale)
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    scores = wide(jnp.einsum("btkgd,bskd->bkgts", grouped, key)) * scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    causal = jnp.tri(length, dtype=bool)
    seen = causal if mask is None else causal & mask[:, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, size)


@dataclass(frozen=True)
class Layer:
    """One layer: its configuration and what its tokens share."""

    config: DecoderConfig
    segments: jax.Array | None
    positions: jax.Array
    adapter_scale: float

    def norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return jliger.rms_norm(x, scale, epsilon=self.config.norm_epsilon, scale_offset=self.config.norm_offset)

    def __call__(self, x: jax.Array, weights: Tree, adapters: Tree, window: jax.Array | None) -> jax.Array:
        """`[B, T, H]` to `[B, T, H]`, with the weights of this layer gathered and no other's."""
        config, described = self.config, layer_parameters(self.config)

        def project(name: str, x: jax.Array) -> jax.Array:
            inputs = described[name].inputs
            kernel = llama._gathered(weights[name], described[name].spec, x.dtype)
            out = jnp.tensordot(x, kernel, inputs)
            if f"{name}_bias" in weights:
                out += weights[f"{name}_bias"].astype(x.dtype)
            if name in adapters:
                out += low_rank_product(x, adapters[name], inputs, self.adapter_scale)
            return out

        def rotated(name: str, x: jax.Array) -> jax.Array:
            if config.qk_norms:
                x = self.norm(x, weights[f"{name}_norm"])
            return jliger.apply_rope(x, self.positions, frequencies=frequencies(config))

        normed = self.norm(x, weights["attention_norm"])
        query, key, value = (sharded(project(name, normed), HEADS) for name in ("query", "key", "value"))
        mask = visible(self.segments, x.shape[1], window)
        out = project("attention_out", attention(config, rotated("query", query), rotated("key", key), value, mask))
        x = sharded(x + (self.norm(out, weights["attention_out_norm"]) if config.output_norms else out), HIDDEN)

        normed = self.norm(x, weights["mlp_norm"])
        gated = jliger.swiglu if config.activation == "silu" else jliger.geglu
        out = project("down", gated(project("gate", normed), project("up", normed)))
        return sharded(x + (self.norm(out, weights["mlp_out_norm"]) if config.output_norms else out), HIDDEN)


def embeddings(config: DecoderConfig, params: Tree, tokens: jax.Array) -> jax.Array:
    """`[B, T]` tokens to what the first layer gets, `[B, T, H]`."""
    # Sharded by columns, then exchanged one axis at a time, as in `llama.hidden_states`.
    columns = params["embedding"][sharded(tokens, P("data", None))]
    columns = sharded(columns, P("data", None, ("fsdp", "tensor"))).astype(config.dtype)
    x = sharded(sharded(columns, P("data", None, "fsdp")), HIDDEN)
    return x * jnp.asarray(config.embedding_scale, x.dtype)


def hidden_states(
    config: DecoderConfig,
    params: Tree,
    inputs: jax.Array,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    adapters: Tree | None = None,
    adapter_scale: float = 1.0,
) -> jax.Array:
    """The last hidden states `[B, T, H]` of `[B, T]` tokens; for the gradient, only each layer's input is kept.

    Args:
      config: of the decoder.
      params: the parameters.
      inputs: tokens `[B, T]`, or what the first layer gets in place of their embeddings, `[B, T, H]`.
      segments: `[B, T]`, the example that a token belongs to, which alone it sees; None: a row is one example.
      positions: `[B, T]`, of a token in its example; None: as in the row. `[sections, B, T]` with `rope_sections`.
      adapters: low-rank updates of matrices, if there are any (`adapters.py`).
      adapter_scale: what their products are multiplied by.
    """
    length = inputs.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), inputs.shape[:2])
    x = embeddings(config, params, inputs) if inputs.ndim == 2 else sharded(inputs.astype(config.dtype), HIDDEN)
    # A window that is longer than the rows changes nothing.
    has_windows = any(0 < window < length for window in config.windows)
    windows = jnp.asarray(config.windows, jnp.int32) if has_windows else None
    body = jax.checkpoint(Layer(config, segments, positions, adapter_scale).__call__, prevent_cse=False)
    layers = (params["layers"], {} if adapters is None else adapters["layers"], windows)
    x, _ = jax.lax.scan(lambda x, layer: (body(x, *layer), None), x, layers)
    return jliger.rms_norm(x, params["norm"], epsilon=config.norm_epsilon, scale_offset=config.norm_offset)


def full_logits(
    config: DecoderConfig,
    params: Tree,
    hidden: jax.Array,
    adapters: Tree | None = None,
    adapter_scale: float = 1.0,
) -> jax.Array:
    """Hidden states `[..., H]` to logits `[..., V]` in float32, all of them in memory."""
    logits = llama.full_logits(config, params, hidden)
    if adapters is not None and "head" in adapters:
        logits += wide(low_rank_product(hidden, adapters["head"], 1, adapter_scale))
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def loss_sum(
    head: str,
    config: DecoderConfig,
    params: Tree,
    hidden: jax.Array,
    labels: jax.Array,
    adapters: Tree | None = None,
    adapter_scale: float = 1.0,
    **options: Any,
) -> jax.Array:
    """The sum of the losses of labels `[B, T]`; -100 is one that does not count.

    Args:
      head: `"full"`, with logits `[B, T, V]` in memory, or `"jliger"`.
      config: of the decoder.
      params: the parameters.
      hidden: the last hidden states, `[B, T, H]`.
      labels: `[B, T]`.
      adapters: low-rank updates of matrices, if there are any.
      adapter_scale: what their products are multiplied by.
      **options: of `jliger.fused_linear_cross_entropy`.
    """
    if head == "full":
        logits = full_logits(config, params, hidden, adapters, adapter_scale)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen, where=labels >= 0)
    kernel, layout = last_layer(config, params)
    if adapters is not None and "head" in adapters:
        a, b = (adapters["head"][name].astype(hidden.dtype) for name in ("a", "b"))
        options = {**options, "adapter": jliger.LinearAdapter(a, b, adapter_scale)}
    return jliger.fused_linear_cross_entropy(
        hidden, kernel, labels, kernel_layout=layout, logit_softcap=config.logit_softcap, reduction="sum", **options
    )
