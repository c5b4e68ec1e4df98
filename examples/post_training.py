"""What preference.py and grpo.py share: log-probabilities by either head, and a training step of any loss on them."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from language_model import LanguageModel
from runs import RunError

import jliger

Tree = Any
# Of a model and a batch: the loss, and what else is to be logged of the step.
Loss = Callable[[LanguageModel, Tree], tuple[jax.Array, Tree]]


@dataclass(frozen=True)
class Head:
    """Log-probabilities of tokens: `"jliger"`'s, or `"full"`, with logits `[B, T, V]` in memory and float32 softmax."""

    name: str
    implementation: str | None = None
    chunk_size: int | None = None

    def logprobs(
        self, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, **options: Any
    ) -> jliger.LinearLogprobs:
        """Those of `labels` `[B, T]`, each from its hidden state."""
        if self.name == "full":
            return jliger.reference.linear_logprobs(hidden, kernel, labels, **options)
        return jliger.linear_logprobs(
            hidden, kernel, labels, implementation=self.implementation, chunk_size=self.chunk_size, **options
        )

    def of_model(
        self, model: LanguageModel, inputs: jax.Array, labels: jax.Array, where: jax.Array, **options: Any
    ) -> jliger.LinearLogprobs:
        """Those of a small model's `labels` `[B, T]`, each after its input and the ones before."""
        kernel, layout = model.last_layer()
        return self.logprobs(model(inputs), kernel, labels, where=where, kernel_layout=layout, **options)


def initial_state(parameters: nnx.State, transformation: optax.GradientTransformation) -> Tree:
    """A copy of the parameters, since a step takes over the memory of its state, and the optimizer's state."""
    parameters = jax.tree.map(jnp.copy, parameters)
    return {"parameters": parameters, "optimizer": transformation.init(parameters)}


def trace_step(
    loss: Loss,
    graphdef: nnx.GraphDef[LanguageModel],
    transformation: optax.GradientTransformation,
    parameters: nnx.State,
    batch: Tree,
) -> jax.stages.Traced:
    """Traces a training step, from arrays or their shapes; nothing is compiled or run yet."""

    def step(state: Tree, batch: Tree) -> tuple[Tree, tuple[jax.Array, Tree]]:
        def loss_of(parameters: nnx.State) -> tuple[jax.Array, Tree]:
            return loss(nnx.merge(graphdef, parameters), batch)

        found, gradients = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
        updates, optimizer = transformation.update(gradients, state["optimizer"], state["parameters"])
        return {"parameters": optax.apply_updates(state["parameters"], updates), "optimizer": optimizer}, found

    state = jax.eval_shape(lambda parameters: initial_state(parameters, transformation), parameters)
    try:
        return jax.jit(step, donate_argnums=0).trace(state, batch)
    # What jliger refuses, it names with the argument and what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error


def finite(loss: Any, name: str, step: int) -> float:
    """A step's loss, if it is a number that training can go on from."""
    value = float(loss)
    if not math.isfinite(value):
        raise RunError(f"the loss of {name} is {value} at step {step}: try a lower learning rate")
    return value


def add_folder_options(parser: argparse.ArgumentParser, out: Path) -> Any:
    """Adds the folder of a run that is not resumed."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, default=out, help="the run's folder (%(default)s)")
    add("--overwrite", action="store_true", help="remove the run in --out first")
    add("--no-progress", action="store_true", help="draw no progress bar")
    return group
