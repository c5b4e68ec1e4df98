"""Trains a small language model twice, with full logits and with jliger, and shows both side by side.

    python examples/train_lm.py

The text is the running Python's own library and documentation, through a byte-level BPE trained on the spot.
The two trainings share model, seed and data, so their loss curves agree to rounding; XLA's memory for the
step doesn't. docs/train_lm.md has the options and says what a run leaves behind.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from corpus import SMALLEST_VOCAB, Batches, Corpus, CorpusError, heldout_batches, load_corpus
from flax import nnx
from language_model import DTYPES, LanguageModel, ModelConfig
from reporting import (
    MetricsFile,
    curve_table,
    memory_of,
    plot,
    read_metrics,
    summarize,
    summary_table,
    verdict,
    write_json,
)
from runs import (
    CHECKPOINTS,
    METRICS,
    SUMMARY,
    TOKENIZER,
    RunError,
    begin_folder,
    check_folder,
    inputs_and_labels,
    positive,
)
from tqdm import tqdm

import jliger

HEADS = ("full", "jliger")
# How far apart the two curves may lie, relative to the loss, and still be called one. The first losses differ
# by a few units in the last place. AdamW then divides each gradient by its own size, so entries that are
# rounding error themselves move by a whole learning rate in either run, and the difference grows with the
# steps.
CURVE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Beside what `runs` names; each head has a folder of its own with its metrics and checkpoints.
PLOT = "plot.png"


# ------------------------------------------------------------------------------------------------------- loss


def full_loss(model: LanguageModel, tokens: jax.Array, end_of_text: int) -> jax.Array:
    """Mean cross entropy the usual way: `[B, T, V]` logits in memory."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    hidden = model(inputs)
    kernel, layout = model.last_layer()
    logits = jnp.einsum("bth,hv->btv" if layout == "hv" else "bth,vh->btv", hidden, kernel)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.sum(losses, where=where) / jnp.maximum(jnp.sum(where), 1)


def jliger_loss(model: LanguageModel, tokens: jax.Array, end_of_text: int, **options: Any) -> jax.Array:
    """The same mean through jliger: the logits exist a chunk at a time."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    hidden = model(inputs)
    kernel, layout = model.last_layer()
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels, where=where, kernel_layout=layout, **options)


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


# --------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Program:
    """One head's training step and what belongs to it; the state is model and optimizer in one."""

    step: jax.stages.Traced
    abstract_state: nnx.State
    initial_state: Callable[[], nnx.State]
    heldout_sums: Callable[[nnx.State, np.ndarray], tuple[jax.Array, jax.Array, jax.Array]]
    schedule: optax.Schedule


def build_program(head: str, args: argparse.Namespace, config: ModelConfig, end_of_text: int) -> Program:
    """Traces one head's training step; nothing is compiled, run or written yet."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=args.learning_rate / 10,
        peak_value=args.learning_rate,
        warmup_steps=args.warmup_steps,
        decay_steps=args.steps,
        end_value=args.learning_rate / 10,
    )
    # Weight decay is for matrices: a norm's scale is a vector.
    adamw = optax.adamw(
        schedule,
        b2=0.95,
        weight_decay=args.weight_decay,
        mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1),
    )
    transformation = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    options = {"implementation": args.implementation, "chunk_size": args.chunk_size}
    if head == "full":
        loss = partial(full_loss, end_of_text=end_of_text)
    else:
        loss = partial(jliger_loss, end_of_text=end_of_text, **options)

    def create() -> tuple[LanguageModel, nnx.Optimizer]:
        model = LanguageModel(config, nnx.Rngs(args.seed))
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    graphdef, abstract_state = nnx.split(nnx.eval_shape(create))

    def step(state: nnx.State, tokens: jax.Array) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    def heldout(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model, _ = nnx.merge(graphdef, state)
        return heldout_sums(model, tokens, end_of_text, **options)

    batch = jax.ShapeDtypeStruct((args.batch_size, args.length + 1), jnp.int32)
    # The step's result takes over the memory of the state that it replaces.
    traced = jax.jit(step, donate_argnums=0).trace(abstract_state, batch)
    return Program(traced, abstract_state, jax.jit(lambda: nnx.state(create())), jax.jit(heldout), schedule)


def evaluate(program: Program, state: nnx.State, batches: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean loss, perplexity and accuracy over the counted tokens of all batches."""
    sums = np.sum([[float(value) for value in program.heldout_sums(state, batch)] for batch in batches], axis=0)
    loss, right, tokens = (float(value) for value in sums)
    mean = loss / max(tokens, 1.0)
    # A perplexity beyond float64 would be no JSON number.
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / max(tokens, 1.0)}


def train_head(head: str, program: Program, corpus: Corpus, args: argparse.Namespace) -> None:
    """Trains one head from its latest checkpoint, or from the seed, up to `--steps` or `--stop-at`."""
    folder: Path = args.out / head
    batches = Batches(corpus.train, args.batch_size, args.length, args.seed)
    heldout = heldout_batches(corpus.heldout, args.batch_size, args.length, args.eval_batches)
    last: int = args.steps if args.stop_at is None else args.stop_at
    with Checkpoints(folder / CHECKPOINTS, args.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore_latest(nnx.to_pure_dict(program.abstract_state))
        if restored is None:
            start, state = 0, program.initial_state()
        else:
            start, tree, batches.position = restored
            state = jax.tree.map(lambda leaf: leaf, program.abstract_state)
            nnx.replace_by_pure_dict(state, tree)
        if start >= last and "compiled" in read_metrics(folder / METRICS):
            return
        began = time.perf_counter()
        # One compilation serves the memory figures and the training.
        lowered = program.step.lower()
        step_function = lowered.compile()
        with (
            MetricsFile(folder / METRICS) as metrics,
            tqdm(total=last, initial=start, desc=head, unit="step", disable=args.no_progress) as bar,
        ):
            metrics.write(
                "compiled",
                0,
                seconds=time.perf_counter() - began,
                memory=memory_of(step_function.memory_analysis()),
                # Read off the program itself, not off what was asked for.
                rows_by="triton" if "triton_kernel_call" in lowered.as_text() else "xla",
            )
            for step in range(start + 1, last + 1):
                began = time.perf_counter()
                state, value = step_function(state, next(batches))
                loss = float(value)
                seconds = time.perf_counter() - began
                if not math.isfinite(loss):
                    raise RunError(
                        f"the loss of head {head} is {loss} at step {step}: try a lower --learning-rate. "
                        f"The steps before are in {folder}"
                    )
                metrics.write(
                    "train",
                    step,
                    loss=loss,
                    learning_rate=float(program.schedule(step - 1)),
                    tokens=args.batch_size * args.length,
                    seconds=seconds,
                )
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                if step % args.eval_every == 0 or step == last:
                    metrics.write("eval", step, **evaluate(program, state, heldout))
                if step % args.checkpoint_every == 0 or step == last:
                    checkpoints.save(step, nnx.to_pure_dict(state), batches.position)


# ---------------------------------------------------------------------------------------------------- the run


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="train_lm", description=(__doc__ or "").partition("\n")[0])
    count, count_or_zero = positive(int), positive(int, zero=True)
    number, number_or_zero = positive(float), positive(float, zero=True)

    group = parser.add_argument_group("corpus")
    add = group.add_argument
    add("--corpus", type=Path, nargs="+", metavar="PATH", help="files and folders of text (default: Python's library)")
    add("--max-bytes", type=count, default=16_000_000, metavar="N", help="read this much text at most (%(default)s)")
    add("--vocab-size", type=count, default=32768, metavar="N", help="tokens of the byte-level BPE (%(default)s)")
    add("--heldout-fraction", type=number, default=0.05, metavar="X", help="share of the text held out (%(default)s)")
    add("--cache-dir", type=Path, default=Path("runs/cache"), help="keeps tokenizers and tokens (%(default)s)")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--hidden-size", type=count, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--layers", type=count, default=2, metavar="N", help="transformer blocks (%(default)s)")
    add("--heads", type=count, default=4, metavar="N", help="attention heads per block (%(default)s)")
    add("--tie-embeddings", action="store_true", help="the embedding is the last layer's kernel, too")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the arithmetic (%(default)s); parameters: float32")

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--head", choices=["both", *HEADS], default="both", help="last layer and loss to train with (%(default)s)")
    add("--implementation", choices=["triton", "xla"], help="jliger's backend (default: what fits the device)")
    add("--chunk-size", type=count, metavar="N", help="tokens per chunk of jliger (default: what fits the device)")
    add("--steps", type=count, default=100, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=count, default=8, metavar="N", help="sequences per step (%(default)s)")
    add("--length", type=count, default=128, metavar="N", help="tokens per sequence (%(default)s)")
    add("--learning-rate", type=number, default=3e-3, metavar="X", help="the highest, after warmup (%(default)s)")
    add("--warmup-steps", type=count_or_zero, default=10, metavar="N", help="steps up to it (%(default)s)")
    add("--weight-decay", type=number_or_zero, default=0.1, metavar="X", help="of AdamW (%(default)s)")
    add("--seed", type=count_or_zero, default=0, metavar="N", help="of parameters and data order (%(default)s)")

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="the run's folder (%(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in --out")
    either.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    add = group.add_argument
    add("--stop-at", type=count, metavar="STEP", help="stop here, with the schedule of all --steps")
    add("--checkpoint-every", type=count, default=50, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--keep-checkpoints", type=count, default=2, metavar="N", help="how many, the latest (%(default)s)")
    add("--eval-every", type=count, default=25, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-batches", type=count, default=8, metavar="N", help="held-out batches each, at most (%(default)s)")
    add("--no-progress", action="store_true", help="draw no progress bar")

    args = parser.parse_args(argv)
    if args.vocab_size < SMALLEST_VOCAB:
        parser.error(f"--vocab-size {args.vocab_size}: a byte-level BPE needs {SMALLEST_VOCAB} or more")
    if args.heldout_fraction >= 1:
        parser.error(f"--heldout-fraction {args.heldout_fraction}: must be below 1")
    if args.hidden_size % args.heads or (args.hidden_size // args.heads) % 2:
        parser.error(f"--hidden-size {args.hidden_size} must be an even multiple of --heads {args.heads}")
    if args.warmup_steps >= args.steps:
        parser.error(f"--warmup-steps {args.warmup_steps} must be below --steps {args.steps}")
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is beyond --steps {args.steps}")
    if args.seed >= 2**31:
        parser.error(f"--seed {args.seed}: must be below 2**31")
    if args.implementation == "triton" and jax.default_backend() != "gpu":
        parser.error(f"--implementation triton needs a GPU; JAX's default backend here is {jax.default_backend()}")
    return args


def run(args: argparse.Namespace) -> None:
    """Corpus, training of each head, report."""
    began = time.perf_counter()
    corpus = load_corpus(
        args.corpus,
        vocab_size=args.vocab_size,
        max_bytes=args.max_bytes,
        heldout_fraction=args.heldout_fraction,
        cache_dir=args.cache_dir,
    )
    print(
        f"corpus: {corpus.documents} files, {corpus.size / 1e6:.1f} MB, {len(corpus.train)} tokens to train "
        f"on, {len(corpus.heldout)} held out, vocabulary {corpus.vocab_size} "
        f"({time.perf_counter() - began:.1f} s)"
    )
    if corpus.vocab_size < args.vocab_size:
        print(f"the corpus has too few distinct pairs for --vocab-size {args.vocab_size}")
    config = ModelConfig(corpus.vocab_size, args.hidden_size, args.layers, args.heads, args.tie_embeddings, args.dtype)
    # What shapes the curve: a run is only ever resumed under the same values.
    names = ("steps", "batch_size", "length", "learning_rate", "warmup_steps", "weight_decay", "seed")
    settings = {"corpus": corpus.digest, **asdict(config), **{name: getattr(args, name) for name in names}}
    # Everything that can be refused is refused before the folder is touched.
    Batches(corpus.train, args.batch_size, args.length, args.seed)
    heads = HEADS if args.head == "both" else (args.head,)
    try:
        programs = {head: build_program(head, args, config, corpus.end_of_text) for head in heads}
    # What jliger refuses, it names with the argument and what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error
    check_folder(args.out, settings, resume=args.resume, overwrite=args.overwrite)
    if not args.resume:
        begin_folder(args.out, settings, (*HEADS, TOKENIZER, SUMMARY, PLOT))
    corpus.tokenizer.save(str(args.out / TOKENIZER))
    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")
    for head in heads:
        train_head(head, programs[head], corpus, args)
    # A head that an earlier call trained in this folder is part of the report.
    found = {head: read_metrics(args.out / head / METRICS) for head in HEADS}
    runs = {head: events for head, events in found.items() if "compiled" in events}
    summary = summarize(runs)
    write_json(args.out / SUMMARY, {"device": device.device_kind, "jax": jax.__version__, **settings, **summary})
    plot(runs, summary, args.out / PLOT)
    print(f"\n{curve_table(runs)}\n\n{summary_table(summary)}\n")
    if "comparison" in summary:
        print(verdict(summary["comparison"], args.dtype, CURVE_TOLERANCE[args.dtype]))
    if args.stop_at is not None and args.stop_at < args.steps:
        print(f"Stopped at step {args.stop_at} of {args.steps}; --resume goes on.")
    elapsed = time.perf_counter() - began
    print(f"{elapsed:.0f} s in all; metrics, checkpoints, {SUMMARY} and {PLOT} are in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a user's mistake ends in one line, not in a traceback."""
    args = parse_args(argv)
    # GPUs would otherwise round float32 products to fewer bits, which is not what the curves are compared
    # under.
    precision = "highest" if args.dtype == "float32" else "default"
    try:
        with jax.default_matmul_precision(precision):
            run(args)
    except (RunError, CheckpointError, CorpusError, OSError) as error:
        sys.exit(f"train_lm: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train_lm: interrupted; --resume goes on from the latest checkpoint, where there is one")


if __name__ == "__main__":
    main()
