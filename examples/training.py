"""Training: a step that is traced by itself, and the one loop, with metrics, evaluations and checkpoints.

Several trainings, such as those of two heads, alternate, one step each: a busy machine slows all of them alike.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import Checkpoints
from corpus import Batches, windows
from jax.sharding import PartitionSpec as P
from llama import LlamaConfig, Tree, initial_parameters, parameters, placed
from runs import CHECKPOINTS, DeviceMemoryError, Record, RunError, read_metrics, say, write_metrics
from tqdm import tqdm

import jliger
from jliger.accumulation import AccumulatedLoss


@dataclass(frozen=True)
class TrainingConfig:
    """What shapes the curve, apart from model, data and loss."""

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """As the command line says (`options.add_training_options`)."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def optimizer(self, config: LlamaConfig) -> optax.GradientTransformation:
        """AdamW after clipping, with a linear warmup, a cosine decay, and weight decay for matrices.

        Its epsilon keeps it from making whole steps of gradients that are little more than rounding errors.
        """
        low, high = self.learning_rate / 10, self.learning_rate
        schedule = optax.warmup_cosine_decay_schedule(low, high, self.warmup_steps, self.steps, low)
        is_matrix = jax.tree.map(lambda leaf: leaf.is_matrix, parameters(config))
        adamw = optax.adamw(schedule, b2=0.95, eps=1e-6, weight_decay=self.weight_decay, mask=is_matrix)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def initial_parameters(self, config: LlamaConfig) -> Tree:
        return initial_parameters(config, jax.random.key(self.seed))

    def tokens(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch_size, self.length + 1), jnp.int32)


@dataclass(frozen=True)
class Program:
    """A training step, not compiled yet; its state is `{"parameters", "optimizer"}`."""

    step: jax.stages.Traced
    abstract_state: Tree
    initial_state: Callable[..., Tree]


def build_program(
    loss_fn: Callable[..., tuple[Any, ...]],
    create: Callable[[], Tree],
    optimizer: optax.GradientTransformation,
    batch: Tree,
    *given: Tree,
    microbatches: int = 1,
    shardings: Callable[[Tree], Tree] | None = None,
) -> Program:
    """Traces a training step from the shapes of its arguments; nothing is compiled or run.

    Args:
      loss_fn: of parameters, a batch and what is `given`: the sum of losses, the sum of weights and, if wanted, aux.
      create: makes the initial parameters.
      optimizer: gets the weight of the batch too, if it takes one.
      batch: the shapes of a batch.
      *given: the shapes of what the step is called with after state and batch.
      microbatches: the number of parts that the batch is processed in.
      shardings: of the state, from its shapes.
    """
    loss_and_gradients = jliger.accumulate_gradients(loss_fn, microbatches)
    optimizer = optax.with_extra_args_support(optimizer)

    def initial_state() -> Tree:
        params = create()
        return {"parameters": params, "optimizer": optimizer.init(params)}

    def step(state: Tree, batch: Tree, *given: Tree) -> tuple[Tree, AccumulatedLoss]:
        params, optimizer_state = state["parameters"], state["optimizer"]
        result, gradients = loss_and_gradients(params, batch, *given)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params, weight=result.weight)
        return {"parameters": optax.apply_updates(params, updates), "optimizer": optimizer_state}, result

    abstract_state, where = jax.eval_shape(initial_state), None
    if shardings is not None:
        where = shardings(abstract_state)
        abstract_state = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), abstract_state, where)
    # The new state takes over the memory of the old one.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=None if where is None else (where, None))
    try:
        traced = jitted.trace(abstract_state, batch, *given)
    # jliger names the argument that it refuses, and says what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error
    return Program(traced, abstract_state, jax.jit(initial_state, out_shardings=where))


def state_shardings(optimizer: optax.GradientTransformation, specs: Tree) -> Callable[[Tree], Tree] | None:
    """A function of a training state: its shardings on the mesh that is set; None without one.

    The optimizer's state of a parameter is sharded like the parameter.
    """
    if placed(P()) is None:
        return None

    def shardings(state: Tree) -> Tree:
        others = optax.tree_map_params(
            optimizer, lambda _, spec: spec, state["optimizer"], specs, transform_non_params=lambda _: P()
        )
        return jax.tree.map(placed, {"parameters": specs, "optimizer": others})

    return shardings


def begun_with(create: Callable[[], Tree], program: Program, optimizer: optax.GradientTransformation) -> Program:
    """The program, with initial parameters from `create`, which is not compiled: it may read files or copy arrays."""
    optimizer = optax.with_extra_args_support(optimizer)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state["optimizer"])
    begin = jax.jit(optimizer.init, out_shardings=places)

    def initial_state() -> Tree:
        params = create()
        return {"parameters": params, "optimizer": begin(params)}

    return replace(program, initial_state=initial_state)


@contextmanager
def device_memory_errors() -> Iterator[None]:
    """Raises XLA's out-of-memory errors, of compilation or of a run, as DeviceMemoryError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise DeviceMemoryError(str(error).strip().splitlines()[0]) from None


@dataclass(frozen=True)
class Compiled:
    """A compiled step, and what the compiler says about it; memory is in bytes, of one device."""

    step: Callable[..., Any]
    seconds: float
    memory: dict[str, int]
    rows_by: str


def compile_step(traced: jax.stages.Traced) -> Compiled:
    """Compiles a step.

    XLA's `temporary` memory is what the step needs beside its arguments and results. The `total` counts the training
    state once, since the new one takes over the memory of the old one.
    """
    began = time.perf_counter()
    with device_memory_errors():
        step = traced.lower().compile()
    # Read from the program itself, not from the options.
    rows_by = "triton" if "triton_kernel_call" in step.as_text() else "xla"
    analysis = step.memory_analysis()
    names = {"temporary": "temp", "arguments": "argument", "outputs": "output", "aliased": "alias"}
    memory = {name: getattr(analysis, f"{own}_size_in_bytes") for name, own in names.items()}
    memory["total"] = memory["temporary"] + memory["arguments"] + memory["outputs"] - memory["aliased"]
    return Compiled(step, time.perf_counter() - began, memory, rows_by)


def device_memory(figure: str) -> int | None:
    """The largest of a figure of `memory_stats` over this process's devices; None if they have none (CPUs)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((each[figure] for each in stats if figure in each), default=None)


@dataclass
class Training:
    """One training, and where it is.

    Attributes:
      name: for people.
      folder: for metrics and checkpoints.
      program: the step.
      next_batch: the batch of a step, from its number (the first is 1) and the parameters.
      evaluate: figures of parameters, for the metrics, if there are any.
      figures: more figures of a step, from the results of its updates, its batch and its seconds.
      given: what the step is called with after state and batch.
      parts: of a batch, one for each call of the step; a batch as a whole, if nothing is given.
      begin_with: parameters to begin with in place of the program's own.
      about: more figures for the record of the compilation.
    """

    name: str
    folder: Path
    program: Program
    next_batch: Callable[[int, Tree], Tree] = lambda step, params: None
    evaluate: Callable[[Tree], Record] = lambda params: {}
    figures: Callable[[Sequence[AccumulatedLoss], Tree, float], Record] = lambda results, batch, seconds: {}
    given: tuple[Tree, ...] = ()
    parts: Callable[[Tree], Sequence[Tree]] = lambda batch: [batch]
    begin_with: Tree = None
    about: Record = field(default_factory=dict)
    state: Tree = None
    start: int = 0

    def begin(self, checkpoints: Checkpoints | None, resume: bool) -> None:
        """Gets the state of the latest checkpoint, or the initial one."""
        if checkpoints is not None:
            self.start, self.state = checkpoints.restore_latest(self.program.abstract_state)
        if resume:
            say(f"{self.name}: {f'continues from step {self.start}' if self.start else 'begins with step 1'}")
        if self.state is None:
            self.state = self.program.initial_state()
            if self.begin_with is not None:
                # A copy, because a step takes over the memory of its state.
                self.state["parameters"] = jax.tree.map(jnp.copy, self.begin_with)

    def prepare(self) -> None:
        say(f"{self.name}: compiling the step ...")
        self.compiled = compile_step(self.program.step)
        about = {"seconds": self.compiled.seconds, "memory": self.compiled.memory, "rows_by": self.compiled.rows_by}
        write_metrics(self.folder, "compiled", 0, **about, **self.about)
        if self.start == 0:
            self.write_evaluation(0)

    def write_evaluation(self, step: int) -> None:
        if figures := self.evaluate(self.state["parameters"]):
            write_metrics(self.folder, "eval", step, **figures)

    def advance(self, step: int) -> Record:
        batch = self.next_batch(step, self.state["parameters"])
        began = time.perf_counter()
        results = []
        for part in self.parts(batch):
            self.state, result = self.compiled.step(self.state, part, *self.given)
            results.append(result)
        loss = float(results[-1].loss)
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            where = f"of {self.name} is {loss} at step {step}; the steps before are in {self.folder}"
            raise RunError(f"the loss {where}. Try a lower learning rate")
        record = {"loss": loss, **self.figures(results, batch, seconds), "seconds": seconds}
        write_metrics(self.folder, "train", step, **record)
        return record


def train(trainings: Sequence[Training], args: argparse.Namespace, last: int) -> None:
    """Trains up to step `last`, from the latest checkpoints if there are any; all trainings alternate, one step each.

    `args` has `no_progress`, and may have `resume`, `eval_every`, `checkpoint_every` and `keep_checkpoints`.
    """
    eval_every, save_every = (getattr(args, f"{name}_every", None) for name in ("eval", "checkpoint"))
    with ExitStack() as stack, device_memory_errors():
        saved = {}
        for training in trainings:
            if save_every is not None:
                folder = Checkpoints(training.folder / CHECKPOINTS, args.keep_checkpoints)
                saved[training.name] = stack.enter_context(folder)
            training.begin(saved.get(training.name), getattr(args, "resume", False))
        going = [each for each in trainings if each.start < last or "compiled" not in read_metrics(each.folder)]
        if not going:
            return
        for training in going:
            training.prepare()
        first = min(training.start for training in going)
        name = " and ".join(training.name for training in going)
        disable = args.no_progress or jax.process_index() != 0
        bar = stack.enter_context(tqdm(total=last, initial=first, desc=name, unit="step", disable=disable))
        for step in range(first + 1, last + 1):
            losses = []
            for training in (training for training in going if training.start < step):
                losses.append(training.advance(step)["loss"])
                if step % (eval_every or last) == 0 or step == last:
                    training.write_evaluation(step)
                if save_every is not None and (step % save_every == 0 or step == last):
                    saved[training.name].save(step, training.state)
            bar.set_postfix(loss=", ".join(f"{loss:.4f}" for loss in losses), refresh=False)
            bar.update()


def text_training(
    name: str,
    folder: Path,
    loss_fn: Callable[..., tuple[Any, ...]],
    config: LlamaConfig,
    learning: TrainingConfig,
    tokens: np.ndarray,
    *given: Tree,
    evaluate: Callable[[Tree], Record] = lambda params: {},
) -> Training:
    """The training of a decoder on a stream of tokens."""
    create, optimizer = partial(learning.initial_parameters, config), learning.optimizer(config)
    program = build_program(loss_fn, create, optimizer, learning.tokens(), *given)
    batches = Batches(windows(tokens, learning.length), learning.batch_size, learning.seed)
    return Training(name, folder, program, lambda step, params: batches[step - 1], evaluate)
