"""The training step of a fine-tuning: all parameters, or adapters of them, on one device or on a mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import adapters
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained
from decoder import DecoderConfig, Tree
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from llama import BATCH
from runs import Record
from training import Program, build_program


def leaf_count(described: Tree) -> int:
    """How many numbers the described parameters have."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(described))


def sharding_on(mesh: Mesh | None, spec: P) -> Sharding:
    return pretrained.on_one_device(spec) if mesh is None else NamedSharding(mesh, spec)


@dataclass(frozen=True)
class Tuning:
    """What is trained, and with which last layer.

    Attributes:
      config: of the decoder.
      head: `"jliger"` or `"full"`.
      rank: of the adapters; 0 if all parameters are trained.
      alpha: LoRA's; the adapters' products are multiplied by `alpha / rank`.
      groups: the matrices with adapters, of `adapters.GROUPS`.
      dtype: of the parameters. Adapters are float32.
      is_packed: whether a row has several examples.
      mesh: the devices, all of this process, if there are several.
      head_options: of jliger.
    """

    config: DecoderConfig
    head: str
    rank: int
    alpha: float
    groups: tuple[str, ...]
    dtype: str
    is_packed: bool
    mesh: Mesh | None
    head_options: Record

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    def trained(self) -> Tree:
        """The descriptions of what is trained."""
        if self.rank:
            return adapters.adapter_parameters(self.config, self.rank, self.groups)
        return decoder.parameters(self.config)

    def sharding(self, spec: P) -> Sharding:
        return sharding_on(self.mesh, spec)

    def abstract(self, described: Tree, dtype: str) -> Tree:
        """The shapes, dtypes and shardings of what is described."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=self.sharding(leaf.spec)), described
        )

    def base(self) -> tuple[Tree, ...]:
        """What a step is given besides its state and batch: the frozen parameters, where adapters are trained."""
        return (self.abstract(decoder.parameters(self.config), self.dtype),) if self.rank else ()

    def loss(self, trained: Tree, rows: jax.Array, *base: Tree) -> tuple[jax.Array, jax.Array]:
        """The sum of the losses of rows `[B, 4, T]` (`instructions.pack`), and the number of tokens that count."""
        tokens, labels, segments, positions = (rows[:, i] for i in range(4))
        params, own = (base[0], trained) if self.rank else (trained, None)
        hidden = decoder.hidden_states(
            self.config, params, tokens, segments if self.is_packed else None, positions, own, self.scale
        )
        loss = decoder.loss_sum(self.head, self.config, params, hidden, labels, own, self.scale, **self.head_options)
        return loss, jnp.sum(labels >= 0)

    def program(
        self,
        optimizer: optax.GradientTransformation,
        initial: Callable[[], Tree],
        batch_size: int,
        length: int,
        microbatches: int = 1,
    ) -> Program:
        """The traced step; `initial` makes or reads what is trained."""
        dtype = "float32" if self.rank else self.dtype
        described = self.trained()

        def shardings(state: Tree) -> Tree:
            specs = jax.tree.map(lambda leaf: leaf.spec, described)
            others = optax.tree_map_params(
                optimizer, lambda _, spec: spec, state["optimizer"], specs, transform_non_params=lambda _: P()
            )
            return jax.tree.map(self.sharding, {"parameters": specs, "optimizer": others})

        def zeros() -> Tree:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), described)

        rows = jax.ShapeDtypeStruct((batch_size, 4, length), jnp.int32, sharding=self.sharding(P(BATCH)))
        program = build_program(
            self.loss,
            zeros,
            optimizer,
            rows,
            *self.base(),
            microbatches=microbatches,
            shardings=shardings,
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state["optimizer"])
        begin = jax.jit(optimizer.init, out_shardings=places)

        def initial_state() -> Tree:
            trained = initial()
            return {"parameters": trained, "optimizer": begin(trained)}

        return replace(program, initial_state=initial_state)

    def initial_adapters(self, seed: int) -> Tree:
        create = partial(adapters.initial_adapters, self.config, self.rank, self.groups)
        places = jax.tree.map(lambda leaf: self.sharding(leaf.spec), self.trained())
        return jax.jit(create, out_shardings=places)(jax.random.key(seed))

    def on_devices(self, rows: np.ndarray) -> jax.Array:
        """A batch of which each device takes its rows."""
        return jax.device_put(rows, self.sharding(P(BATCH)))
