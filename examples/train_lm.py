"""Trains a small language model twice, with full logits and with jliger, and shows both side by side.

    python examples/train_lm.py

The text is the running Python's own library and documentation, through a byte-level BPE trained on the spot.
The two trainings share model, seed and data, so their loss curves agree to rounding; XLA's memory for the
step doesn't. docs/train_lm.md has the options and says what a run leaves behind.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from corpus import Batches, heldout_batches
from language_model import LanguageModel, ModelConfig
from options import (
    COUNT,
    add_corpus_options,
    add_model_options,
    add_run_options,
    add_training_options,
    check_options,
    corpus_of,
)
from reporting import curve_table, plot, read_metrics, summarize, summary_table, verdict, write_json
from runs import METRICS, SUMMARY, TOKENIZER, begin_folder, check_folder, inputs_and_labels
from training import Program, TrainingConfig, build_program, run_program, train

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
    losses = optax.softmax_cross_entropy_with_integer_labels(model.full_logits(inputs), labels)
    return jnp.sum(losses, where=where) / jnp.maximum(jnp.sum(where), 1)


def jliger_loss(model: LanguageModel, tokens: jax.Array, end_of_text: int, **options: Any) -> jax.Array:
    """The same mean through jliger: the logits exist a chunk at a time."""
    inputs, labels, where = inputs_and_labels(tokens, end_of_text)
    hidden = model(inputs)
    kernel, layout = model.last_layer()
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels, where=where, kernel_layout=layout, **options)


def program_of(head: str, args: argparse.Namespace, config: ModelConfig, end_of_text: int) -> Program:
    """One head's training step."""
    options = {"implementation": args.implementation, "chunk_size": args.chunk_size}
    loss = full_loss if head == "full" else partial(jliger_loss, **options)
    return build_program(
        partial(loss, end_of_text=end_of_text), config, TrainingConfig.of(args), end_of_text, **options
    )


# ---------------------------------------------------------------------------------------------------- the run


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="train_lm", description=(__doc__ or "").partition("\n")[0])
    add_corpus_options(parser)
    add_model_options(parser)
    add_training_options(parser, HEADS)
    add_run_options(parser, Path("runs/train_lm")).add_argument(
        "--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps"
    )
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is beyond --steps {args.steps}")
    return args


def run(args: argparse.Namespace) -> None:
    """Corpus, training of each head, report."""
    began = time.perf_counter()
    corpus = corpus_of(args)
    config = ModelConfig(corpus.vocab_size, args.hidden_size, args.layers, args.heads, args.tie_embeddings, args.dtype)
    # What shapes the curve: a run is only ever resumed under the same values.
    settings = {"corpus": corpus.digest, **asdict(config), **asdict(TrainingConfig.of(args))}
    # Everything that can be refused is refused before the folder is touched.
    Batches(corpus.train, args.batch_size, args.length, args.seed)
    heads = HEADS if args.head == "both" else (args.head,)
    programs = {head: program_of(head, args, config, corpus.end_of_text) for head in heads}
    check_folder(args.out, settings, resume=args.resume, overwrite=args.overwrite)
    if not args.resume:
        begin_folder(args.out, settings, (*HEADS, TOKENIZER, SUMMARY, PLOT))
    corpus.tokenizer.save(str(args.out / TOKENIZER))
    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")
    heldout = heldout_batches(corpus.heldout, args.batch_size, args.length, args.eval_batches)
    for head in heads:
        train(head, args.out / head, programs[head], corpus.train, heldout, args, stop_at=args.stop_at)
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
    """Command line."""
    run_program("train_lm", run, parse_args(argv))


if __name__ == "__main__":
    main()
