"""Command-line options that the examples of training a small language model share, a group of them a function."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from corpus import SMALLEST_VOCAB, Corpus, load_corpus
from language_model import DTYPES
from runs import fit_warmup, positive

# What an option's `type` may be: finite numbers.
COUNT, COUNT_OR_ZERO = positive(int), positive(int, zero=True)
NUMBER, NUMBER_OR_ZERO = positive(float), positive(float, zero=True)


def add_corpus_options(parser: argparse.ArgumentParser) -> Any:
    """Adds what `corpus.load_corpus` takes; gives the group, as each of these functions does."""
    group = parser.add_argument_group("corpus")
    add = group.add_argument
    add("--corpus", type=Path, nargs="+", metavar="PATH", help="files and folders of text (default: Python's library)")
    add("--max-bytes", type=COUNT, default=16_000_000, metavar="N", help="read this much text at most (%(default)s)")
    add("--vocab-size", type=COUNT, default=32768, metavar="N", help="tokens of the byte-level BPE (%(default)s)")
    add("--heldout-fraction", type=NUMBER, default=0.05, metavar="X", help="share of the text held out (%(default)s)")
    add("--cache-dir", type=Path, default=Path("runs/cache"), help="keeps tokenizers and tokens (%(default)s)")
    return group


def corpus_of(args: argparse.Namespace) -> Corpus:
    """The corpus that the options ask for; prints how much there is of it."""
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
    return corpus


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """Adds what a `language_model.ModelConfig` has beside the vocabulary."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--hidden-size", type=COUNT, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--layers", type=COUNT, default=2, metavar="N", help="transformer blocks (%(default)s)")
    add("--heads", type=COUNT, default=4, metavar="N", help="attention heads per block (%(default)s)")
    add("--tie-embeddings", action="store_true", help="the embedding is the last layer's kernel, too")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the arithmetic (%(default)s); parameters: float32")
    return group


def add_training_options(parser: argparse.ArgumentParser, heads: Sequence[str], chunk_size: int | None = None) -> Any:
    """Adds the head to train with and what a `training.TrainingConfig` has."""
    group = parser.add_argument_group("training")
    add_head_options(group, heads, chunk_size)
    add = group.add_argument
    add("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="sequences per step (%(default)s)")
    add("--length", type=COUNT, default=128, metavar="N", help="tokens per sequence (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest, after warmup (%(default)s)")
    add("--warmup-steps", type=COUNT_OR_ZERO, metavar="N", help="steps up to it (a tenth of the steps, at most 10)")
    add("--weight-decay", type=NUMBER_OR_ZERO, default=0.1, metavar="X", help="of AdamW (%(default)s)")
    return group


def add_head_options(group: Any, heads: Sequence[str], chunk_size: int | None = None) -> None:
    """Adds the head to train with, what jliger's has, and the seed under which all heads have one curve."""
    chunk = "default: what fits the device" if chunk_size is None else chunk_size
    add = group.add_argument
    add("--head", choices=["both", *heads], default="both", help="last layer and loss to train with (%(default)s)")
    add("--implementation", choices=["triton", "xla"], help="jliger's backend (default: what fits the device)")
    add("--chunk-size", type=COUNT, default=chunk_size, metavar="N", help=f"tokens per chunk of jliger ({chunk})")
    add("--seed", type=COUNT_OR_ZERO, default=0, metavar="N", help="of parameters and data order (%(default)s)")


def add_run_options(parser: argparse.ArgumentParser, out: Path) -> Any:
    """Adds the run's folder, and how often what is written to it."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=out, help="the run's folder (%(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in --out")
    either.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    add = group.add_argument
    add("--checkpoint-every", type=COUNT, default=50, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--keep-checkpoints", type=COUNT, default=2, metavar="N", help="how many, the latest (%(default)s)")
    add("--eval-every", type=COUNT, default=25, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-batches", type=COUNT, default=8, metavar="N", help="held-out batches each, at most (%(default)s)")
    add("--no-progress", action="store_true", help="draw no progress bar")
    return group


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, *more_steps: str) -> None:
    """Ends the program with a message where options don't go together.

    `more_steps` name the options with the steps of further trainings that have the same warmup.
    """
    if args.vocab_size < SMALLEST_VOCAB:
        parser.error(f"--vocab-size {args.vocab_size}: a byte-level BPE needs {SMALLEST_VOCAB} or more")
    if args.heldout_fraction >= 1:
        parser.error(f"--heldout-fraction {args.heldout_fraction}: must be below 1")
    check_size(parser, args.hidden_size, args.heads)
    fit_warmup(parser, args, "steps", *more_steps)
    check_head_options(parser, args)


def check_head_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where there is no such seed, or no device for the backend."""
    if args.seed >= 2**31:
        parser.error(f"--seed {args.seed}: must be below 2**31")
    if args.implementation == "triton" and jax.default_backend() != "gpu":
        parser.error(f"--implementation triton needs a GPU; JAX's default backend here is {jax.default_backend()}")


def check_size(parser: argparse.ArgumentParser, hidden_size: int, heads: int, prefix: str = "") -> None:
    """Ends the program with a message where heads, whose rotary positions are pairs, don't divide a hidden state."""
    if hidden_size % heads or (hidden_size // heads) % 2:
        parser.error(f"--{prefix}hidden-size {hidden_size} must be an even multiple of --{prefix}heads {heads}")
