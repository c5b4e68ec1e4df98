"""The examples' decoder with switches: each operation by jliger or by plain XLA, and what lies in host memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import llama
import optax
from jax.ad_checkpoint import checkpoint_name
from language_model import Head, inputs_and_labels
from llama import LlamaConfig, Tree, initial_parameters
from training import build_program

import jliger

KERNELS = ("rope", "swiglu", "rms_norm", "flce", "tiled_mlp")
OFFLOADS = ("params", "optimizer", "activations")
SHAPES = {
    # Seconds on a CPU.
    "tiny": LlamaConfig(2048, 64, 192, 2, 4, 2, tie_embeddings=True, head_size=32),
    # Qwen3-0.6B, without its norms of queries and keys; Llama 3.2 1B; Llama 3 8B.
    "0.6b": LlamaConfig(151936, 1024, 3072, 28, 16, 8, tie_embeddings=True, rope_base=1e6, head_size=128),
    "1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, tie_embeddings=True),
    "8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True)
class Setup:
    """One configuration of the study.

    Attributes:
      model: a name of `SHAPES`.
      kernels: the operations that jliger computes, of `KERNELS`; plain XLA computes the others.
      is_remat: whether a layer keeps only its input, and is computed again in the backward pass.
      offload: what lies in host memory, of `OFFLOADS`.
      batch: sequences.
      length: tokens of a sequence.
      parameters: their dtype; AdamW's moments are float32.
      dtype: of the arithmetic.
      learning_rate: of AdamW.
    """

    model: str
    kernels: tuple[str, ...] = ()
    is_remat: bool = False
    offload: tuple[str, ...] = ()
    batch: int = 1
    length: int = 2048
    parameters: str = "float32"
    dtype: str = "bfloat16"
    learning_rate: float = 3e-4

    @property
    def config(self) -> LlamaConfig:
        return replace(SHAPES[self.model], dtype=self.dtype)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, with moments and arithmetic in float32 whatever the dtype of the parameters is."""
        adamw = optax.adamw(self.learning_rate, b2=0.95, weight_decay=0.1)

        def init(params: Tree) -> Tree:
            return adamw.init(optax.tree_utils.tree_cast(params, jnp.float32))

        def update(gradients: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
            return adamw.update(optax.tree_utils.tree_cast(gradients, jnp.float32), state, params)

        return optax.GradientTransformation(init, update)

    def initial_parameters(self) -> Tree:
        # A generator that is quick to compile and to run.
        return initial_parameters(self.config, jax.random.key(0, impl="rbg"), self.parameters)

    def tokens(self) -> jax.Array:
        """The batch, `[batch, length + 1]`: random, and the same in each step, so that its loss falls."""
        return jax.random.randint(jax.random.key(1), (self.batch, self.length + 1), 0, self.config.vocab_size)


def on_device(setup: Setup, tree: Tree) -> Tree:
    """Parameters in the device's memory, copied there if they lie in the host's."""
    return jax.device_put(tree, jax.memory.Space.Device) if "params" in setup.offload else tree


def norm(setup: Setup, x: jax.Array, scale: jax.Array) -> jax.Array:
    if "rms_norm" in setup.kernels:
        return jliger.rms_norm(x, scale, epsilon=setup.config.norm_epsilon)
    return llama.rms_norm(x, scale, setup.config.norm_epsilon)


def norm_of_sum(setup: Setup, x: jax.Array, residual: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norm of `x + residual`, and that sum."""
    if "rms_norm" in setup.kernels:
        return jliger.rms_norm(x, scale, residual=residual, epsilon=setup.config.norm_epsilon)
    return norm(setup, x + residual, scale), x + residual


def rotated(setup: Setup, x: jax.Array) -> jax.Array:
    if "rope" in setup.kernels:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return jliger.apply_rope(x, positions, theta=setup.config.rope_base)
    return llama.rotary(x, setup.config.rope_base)


def mlp(setup: Setup, x: jax.Array, weights: Tree) -> jax.Array:
    gate, up, down = (weights[name] for name in ("gate", "up", "down"))
    if "tiled_mlp" in setup.kernels:
        return jliger.gated_mlp(x, gate, up, down)
    if "swiglu" in setup.kernels:
        return jliger.swiglu(x @ gate, x @ up) @ down
    return llama.mlp(weights, x, pieces=1)


def layer(setup: Setup, x: jax.Array, weights: Tree) -> jax.Array:
    """`[B, T, H]` to `[B, T, H]`; what `llama.layer` computes."""
    weights = on_device(setup, weights)
    described = llama.layer_parameters(setup.config)
    matrices = {name: weights[name].astype(x.dtype) for name, each in described.items() if each.is_matrix}
    normed = norm(setup, x, weights["attention_norm"])
    query, key, value = (jnp.einsum("bth,hnd->btnd", normed, matrices[name]) for name in ("query", "key", "value"))
    attended = llama.attention(rotated(setup, query), rotated(setup, key), value)
    attended = jnp.einsum("btnd,ndh->bth", attended, matrices["attention_out"])
    normed, x = norm_of_sum(setup, attended, x, weights["mlp_norm"])
    return x + mlp(setup, normed, matrices)


def hidden_states(setup: Setup, params: Tree, tokens: jax.Array) -> jax.Array:
    """`[B, T]` tokens to the last hidden states `[B, T, H]`."""

    def body(x: jax.Array, weights: Tree) -> jax.Array:
        return layer(setup, checkpoint_name(x, "input"), weights)

    if setup.is_remat:
        # The body of a scan is compiled once, and XLA cannot merge the second forward pass into the first.
        policy = None
        if "activations" in setup.offload:
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["input"],
                offload_src="device",
                offload_dst="pinned_host",
            )
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    x = params["embedding"][tokens].astype(setup.dtype)
    x, _ = jax.lax.scan(lambda x, weights: (body(x, weights), None), x, params["layers"])
    return norm(setup, x, params["norm"])


def loss_fn(setup: Setup, params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the token losses, and the number of tokens."""
    params = {name: leaf if name == "layers" else on_device(setup, leaf) for name, leaf in params.items()}
    inputs, labels, where = inputs_and_labels(tokens, end_of_text=-1)
    hidden = hidden_states(setup, params, inputs)
    head = Head("jliger" if "flce" in setup.kernels else "full")
    return head.loss_sum(setup.config, params, hidden, labels, where), jnp.sum(where)


class WholeStep:
    """A training step as one program; its state is that program's.

    `beside` are the bytes of a state on the device that is no argument of `traced`.
    """

    beside = 0

    def __init__(self, setup: Setup) -> None:
        batch = jax.eval_shape(setup.tokens)
        program = build_program(partial(loss_fn, setup), setup.initial_parameters, setup.optimizer, batch)
        self.traced, self.begin = program.step, program.initial_state

    def step(self, compiled: Callable[..., Any], state: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        state, result = compiled(state, tokens)
        return state, result.loss


class StreamedStep:
    """A training step as a program for the gradients, and one for the update of a layer, which is called for each.

    What is offloaded lies in host memory between these programs, and each copies what it needs. In one program for
    everything, XLA could start all copies at once, and would need room for all moments. The state is the layers'
    parameters, the others, and the moments of each layer and of the others.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._begin_moments = jax.jit(self._initial_moments)
        self._update = jax.jit(self._updated, donate_argnums=(0, 1))
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if "params" in setup.offload:
            sharding = sharding.with_memory_kind("pinned_host")
        # Shapes alone would be taken for arrays in the device's memory.
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(setup.initial_parameters),
        )
        self.traced = jax.jit(self._loss_and_gradients).trace(params, jax.eval_shape(setup.tokens))
        moments = jax.eval_shape(setup.optimizer.init, params)
        # As in WholeStep.
        self.beside = (
            0
            if "optimizer" in setup.offload
            else sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments))
        )

    def begin(self) -> Tree:
        # One array at a time: what XLA needs to make them all would be more than the step's memory.
        leaves, tree = jax.tree.flatten(jax.eval_shape(self._setup.initial_parameters))
        layers, others = _parts(tree.unflatten(map(jax.jit(self._initial_leaf, static_argnums=0), range(len(leaves)))))
        moments = [self._begin_moments(layers, i) for i in range(self._setup.config.layers)]
        return layers, others, moments, self._begin_moments(others, None)

    def step(self, compiled: Callable[..., Any], state: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        layers, others, moments, moments_of_others = state
        loss, gradients = compiled({**others, "layers": layers}, tokens)
        of_layers, of_others = _parts(gradients)
        for i, moments_of_layer in enumerate(moments):
            layers, moments[i] = self._update(layers, moments_of_layer, of_layers, i)
        others, moments_of_others = self._update(others, moments_of_others, of_others, None)
        return (layers, others, moments, moments_of_others), loss

    def _loss_and_gradients(self, params: Tree, tokens: jax.Array) -> tuple[jax.Array, Tree]:
        def mean_loss(params: Tree) -> jax.Array:
            loss, weight = loss_fn(self._setup, params, tokens)
            return loss / weight

        # The gradients lie where the parameters do.
        return jax.value_and_grad(mean_loss)(params)

    def _initial_leaf(self, index: int) -> jax.Array:
        return self._home("params", jax.tree.leaves(self._setup.initial_parameters())[index])

    def _initial_moments(self, params: Tree, layer: jax.Array | None) -> Tree:
        return self._home("optimizer", self._setup.optimizer.init(self._taken(params, layer)))

    def _updated(self, params: Tree, moments: Tree, gradients: Tree, layer: jax.Array | None) -> tuple[Tree, Tree]:
        old, gradients = (self._taken(tree, layer) for tree in (params, gradients))
        moments = jax.device_put(moments, jax.memory.Space.Device)
        updates, moments = self._setup.optimizer.update(gradients, moments, old)
        new = self._home("params", optax.apply_updates(old, updates))
        if layer is not None:
            new = jax.tree.map(partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0), params, new)
        return new, self._home("optimizer", moments)

    def _taken(self, tree: Tree, layer: jax.Array | None) -> Tree:
        """Parameters or gradients of a layer, or of what is in none, in the device's memory."""
        if layer is not None:
            tree = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), tree)
        return on_device(self._setup, tree)

    def _home(self, what: str, tree: Tree) -> Tree:
        """Parameters or moments where they lie between programs."""
        return jax.device_put(tree, jax.memory.Space.Host if what in self._setup.offload else jax.memory.Space.Device)


def _parts(tree: Tree) -> tuple[Tree, Tree]:
    """What is in layers, and the others."""
    return tree["layers"], {name: leaf for name, leaf in tree.items() if name != "layers"}


def step_of(setup: Setup) -> WholeStep | StreamedStep:
    return StreamedStep(setup) if {"params", "optimizer"} & set(setup.offload) else WholeStep(setup)
