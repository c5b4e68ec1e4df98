"""Training of the small language model: a step traced by itself, and a loop with metrics, evaluation, checkpoints."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from corpus import Batches, CorpusError
from flax import nnx
from language_model import LanguageModel, ModelConfig
from reporting import MetricsFile, read_metrics
from runs import CHECKPOINTS, METRICS, RunError, inputs_and_labels, interruptible
from steps import compile_step
from tqdm import tqdm

import jliger

# Of a model, tokens `[B, T+1]`, and what else the step is given.
Loss = Callable[..., jax.Array]


@dataclass(frozen=True)
class TrainingConfig:
    """What shapes the curve, beside model, data and loss."""

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As the command line has it (`options.add_training_options`)."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def schedule(self) -> optax.Schedule:
        """The learning rate: up in a line, down in a cosine."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / 10,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=self.steps,
            end_value=self.learning_rate / 10,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW, after gradients are clipped."""
        # Weight decay is for matrices: a norm's scale is a vector.
        adamw = optax.adamw(
            self.schedule(),
            b2=0.95,
            weight_decay=self.weight_decay,
            mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1),
        )
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@dataclass(frozen=True)
class Program:
    """A training step and what belongs to it; the state is model and optimizer in one."""

    model_config: ModelConfig
    config: TrainingConfig
    step: jax.stages.Traced
    abstract_state: nnx.State
    initial_state: Callable[[], nnx.State]
    # The model without its parameters, and a state's parameters without the optimizer's.
    graphdef: nnx.GraphDef[LanguageModel]
    parameters_of: Callable[[nnx.State], nnx.State]
    heldout_sums: Callable[[nnx.State, np.ndarray], tuple[jax.Array, jax.Array, jax.Array]]


def heldout_sums(
    model: LanguageModel, tokens: jax.Array, end_of_text: int, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed cross entropy, right predictions and counted tokens of a held-out batch."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    hidden = model(inputs)
    kernel, layout = model.last_layer()
    loss, metrics = jliger.fused_linear_cross_entropy(
        hidden,
        kernel,
        labels,
        where=where,
        kernel_layout=layout,
        reduction="sum",
        return_metrics=True,
        **options,
    )
    return loss, metrics.accuracy * metrics.weight, metrics.weight


def build_program(
    loss: Loss, model_config: ModelConfig, config: TrainingConfig, end_of_text: int, *given: Any, **options: Any
) -> Program:
    """Traces a training step; nothing is compiled, run or written yet.

    `given` are trees of arrays, or of their shapes, that the step is called with after state and tokens, and the loss
    after model and tokens. `options` are jliger's, for the evaluation.
    """
    transformation = config.optimizer()

    def create() -> tuple[LanguageModel, nnx.Optimizer]:
        model = LanguageModel(model_config, nnx.Rngs(config.seed))
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    abstract = nnx.eval_shape(create)
    training_graphdef, abstract_state = nnx.split(abstract)
    graphdef = nnx.graphdef(abstract[0])

    def step(state: nnx.State, tokens: jax.Array, *given: Any) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(training_graphdef, state)
        value, gradients = nnx.value_and_grad(loss)(model, tokens, *given)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    def parameters_of(state: nnx.State) -> nnx.State:
        return nnx.state(nnx.merge(training_graphdef, state)[0])

    def heldout(parameters: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return heldout_sums(nnx.merge(graphdef, parameters), tokens, end_of_text, **options)

    batch = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)
    try:
        # The step's result takes over the memory of the state that it replaces.
        traced = jax.jit(step, donate_argnums=0).trace(abstract_state, batch, *given)
    # What jliger refuses, it names with the argument and what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error
    return Program(
        model_config=model_config,
        config=config,
        step=traced,
        abstract_state=abstract_state,
        initial_state=jax.jit(lambda: nnx.state(create())),
        graphdef=graphdef,
        parameters_of=parameters_of,
        heldout_sums=jax.jit(heldout),
    )


def evaluate(program: Program, parameters: nnx.State, batches: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean loss, perplexity and accuracy over the counted tokens of all batches."""
    sums = np.sum([[float(value) for value in program.heldout_sums(parameters, batch)] for batch in batches], axis=0)
    loss, right, tokens = (float(value) for value in sums)
    mean = loss / max(tokens, 1.0)
    # A perplexity beyond float64 would be no JSON number.
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / max(tokens, 1.0)}


def train(
    name: str,
    folder: Path,
    program: Program,
    tokens: np.ndarray,
    heldout: Sequence[np.ndarray],
    args: argparse.Namespace,
    *given: Any,
    stop_at: int | None = None,
) -> nnx.State:
    """Trains on a stream of tokens, from the latest checkpoint in the folder or the seed; gives the last parameters.

    `args` has what `options.add_run_options` adds. `stop_at` is a step to stop at under the schedule of all.
    """
    config, schedule = program.config, program.config.schedule()
    batches = Batches(tokens, config.batch_size, config.length, config.seed)
    last = config.steps if stop_at is None else stop_at
    with Checkpoints(folder / CHECKPOINTS, args.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore_latest(nnx.to_pure_dict(program.abstract_state))
        if restored is None:
            start, state = 0, program.initial_state()
        else:
            start, tree, batches.position = restored
            state = jax.tree.map(lambda leaf: leaf, program.abstract_state)
            nnx.replace_by_pure_dict(state, tree)
        if args.resume:
            print(f"{name}: {f'goes on from step {start}' if start else 'begins with step 1, as it has no checkpoint'}")
        if start >= last and "compiled" in read_metrics(folder / METRICS):
            return program.parameters_of(state)
        compiled = compile_step(program.step.lower())
        with (
            MetricsFile(folder / METRICS) as metrics,
            tqdm(total=last, initial=start, desc=name, unit="step", disable=args.no_progress) as bar,
        ):
            metrics.write("compiled", 0, **compiled.record())
            for step in range(start + 1, last + 1):
                began = time.perf_counter()
                state, value = compiled.step(state, next(batches), *given)
                loss = float(value)
                seconds = time.perf_counter() - began
                if not math.isfinite(loss):
                    raise RunError(
                        f"the loss of {name} is {loss} at step {step}: try a lower learning rate. "
                        f"The steps before are in {folder}"
                    )
                metrics.write(
                    "train",
                    step,
                    loss=loss,
                    learning_rate=float(schedule(step - 1)),
                    tokens=config.batch_size * config.length,
                    seconds=seconds,
                )
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if step % args.eval_every == 0 or step == last:
                    metrics.write("eval", step, **evaluate(program, program.parameters_of(state), heldout))
                if step % args.checkpoint_every == 0 or step == last:
                    checkpoints.save(step, nnx.to_pure_dict(state), batches.position)
    return program.parameters_of(state)


def run_program(
    name: str,
    run: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    interrupted: str = "--resume goes on from the latest checkpoint, where there is one",
) -> None:
    """Runs a program whose user's mistakes, and interruption, end in one line, not in a traceback."""
    # GPUs would otherwise round float32 products to fewer bits, which is not what curves are compared under.
    precision = "highest" if args.dtype == "float32" else "default"
    try:
        with interruptible(name, interrupted), jax.default_matmul_precision(precision):
            run(args)
    except (RunError, CheckpointError, CorpusError, OSError) as error:
        sys.exit(f"{name}: error: {error}")
