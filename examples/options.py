"""Command-line options that the examples share, a group of them a function."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import SMALLEST_VOCAB, Corpus, load_corpus
from language_model import HEADS, Head
from llama import LlamaConfig

DTYPES = ("float32", "bfloat16")


def positive(convert: Callable[[str], Any], zero: bool = False) -> Callable[[str], Any]:
    """An argparse type for finite numbers above 0 (with `zero`, also 0)."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            kind = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {'of 0 or more' if zero else 'above 0'}")
        return value

    return parse


# What an option's `type` may be.
COUNT, COUNT_OR_ZERO = positive(int), positive(int, zero=True)
NUMBER, NUMBER_OR_ZERO = positive(float), positive(float, zero=True)


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of the program's docstring."""
    return argparse.ArgumentParser(prog=f"{name}.py", description=(doc or "").partition("\n")[0])


def add_text_options(add: Any) -> None:
    """Adds the options of `corpus.read_documents`."""
    add("--corpus", type=Path, nargs="+", metavar="PATH", help="files and folders of text (default: Python's library)")
    add("--max-bytes", type=COUNT, default=16_000_000, metavar="N", help="read at most this much text (%(default)s)")


def add_corpus_options(parser: argparse.ArgumentParser) -> Any:
    """Adds the options of `corpus.load_corpus`."""
    add = parser.add_argument_group("corpus").add_argument
    add_text_options(add)
    add("--vocab-size", type=COUNT, default=32768, metavar="N", help="tokens of the byte-level BPE (%(default)s)")
    add("--heldout-fraction", type=NUMBER, default=0.05, metavar="X", help="share of the text held out (%(default)s)")
    add("--cache-dir", type=Path, default=Path("runs/cache"), help="keeps tokenizers and tokens (%(default)s)")
    return add


def corpus_of(args: argparse.Namespace) -> Corpus:
    names = ("vocab_size", "max_bytes", "heldout_fraction", "cache_dir")
    return load_corpus(args.corpus, **{name: getattr(args, name) for name in names})


def add_model_options(parser: argparse.ArgumentParser, description: str | None = None) -> Any:
    """Adds the sizes of a small decoder."""
    add = parser.add_argument_group("model", description).add_argument
    add("--hidden-size", type=COUNT, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--layers", type=COUNT, default=2, metavar="N", help="layers (%(default)s)")
    add("--heads", type=COUNT, default=4, metavar="N", help="attention heads per layer (%(default)s)")
    add("--tie-embeddings", action="store_true", help="use the embedding as the last layer's kernel")
    add("--dtype", choices=DTYPES, default="float32", help="of the arithmetic (%(default)s); parameters are float32")
    return add


def model_of(args: argparse.Namespace, vocab_size: int, prefix: str = "") -> LlamaConfig:
    hidden, layers, heads = (getattr(args, prefix + name) for name in ("hidden_size", "layers", "heads"))
    # 8/3 of the hidden size, in multiples of 8: as many parameters as a plain MLP of 4 times the hidden size.
    mlp_size = 8 * math.ceil(hidden / 3)
    return LlamaConfig(vocab_size, hidden, mlp_size, layers, heads, heads, args.tie_embeddings, args.dtype)


def add_head_options(add: Any, chunk_size: int | None = None, choices: tuple[str, ...] = ("both", *HEADS)) -> None:
    """Adds the last layer to train with, jliger's options, and the seed."""
    add("--head", choices=choices, default=choices[0], help="the last layer and loss to train with (%(default)s)")
    add_jliger_options(add, chunk_size)
    add_seed_option(add)


def add_jliger_options(add: Any, chunk_size: int | None = None) -> None:
    chunk = "default: what fits the device" if chunk_size is None else "%(default)s"
    add("--implementation", choices=["triton", "xla"], help="jliger's backend (default: what fits the device)")
    add("--chunk-size", type=COUNT, default=chunk_size, metavar="N", help=f"tokens per chunk of jliger ({chunk})")


def add_seed_option(add: Any) -> None:
    add("--seed", type=COUNT_OR_ZERO, default=0, metavar="N", help="of parameters and data order (%(default)s)")


def heads_of(args: argparse.Namespace) -> list[Head]:
    names = HEADS if args.head == "both" else (args.head,)
    return [Head(name, args.implementation, args.chunk_size) for name in names]


def jliger_head(args: argparse.Namespace) -> Head:
    """The head of jliger, whatever the heads are that the options ask for."""
    return Head("jliger", args.implementation, args.chunk_size)


def add_training_options(parser: argparse.ArgumentParser, chunk_size: int | None = None) -> Any:
    """Adds the head to train with and the options of a `training.TrainingConfig`."""
    add = parser.add_argument_group("training").add_argument
    add_head_options(add, chunk_size)
    add_steps_option(add)
    add_learning_options(add, "a tenth of the steps, at most 10")
    return add


def add_steps_option(add: Any) -> None:
    add("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (%(default)s)")


def add_learning_options(add: Any, default_warmup: str) -> None:
    """Adds the batch and the optimizer's options."""
    add("--batch-size", type=COUNT, default=8, metavar="N", help="sequences per step (%(default)s)")
    add("--length", type=COUNT, default=128, metavar="N", help="tokens per sequence (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest, after warmup (%(default)s)")
    add("--warmup-steps", type=COUNT_OR_ZERO, metavar="N", help=f"(default: {default_warmup})")
    add("--weight-decay", type=NUMBER_OR_ZERO, default=0.1, metavar="X", help="of AdamW (%(default)s)")


def add_run_options(parser: argparse.ArgumentParser, out: str, checkpoint_every: int | None = None) -> Any:
    """Adds the run's folder; with `checkpoint_every` the run keeps checkpoints and can be resumed."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, default=Path(out), help="the run's folder (%(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    if checkpoint_every is not None:
        either.add_argument("--resume", action="store_true", help="continue the run in --out")
        add("--checkpoint-every", type=COUNT, default=checkpoint_every, metavar="N", help="steps (%(default)s)")
        add("--keep-checkpoints", type=COUNT, default=2, metavar="N", help="the latest ones (%(default)s)")
    add("--no-progress", action="store_true", help="draw no progress bar")
    return add


def add_eval_options(add: Any, every: int, batches: int) -> None:
    add("--eval-every", type=COUNT, default=every, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-batches", type=COUNT, default=batches, metavar="N", help="at most so many held-out ones (%(default)s)")


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *more_steps: str, share: int = 10, most: int = 10
) -> None:
    """Ends the program with a message if options do not fit together, and sets `args.warmup_steps` if it is not given.

    The default warmup is the shortest training's steps divided by `share`, and at most `most`; `more_steps` name the
    options with the steps of further trainings.
    """
    if args.seed >= 2**31:
        parser.error(f"--seed {args.seed}: must be below 2**31")
    if hasattr(args, "hidden_size"):
        check_size(parser, args)
    if hasattr(args, "heldout_fraction"):
        if args.vocab_size < SMALLEST_VOCAB:
            parser.error(f"--vocab-size {args.vocab_size}: a byte-level BPE needs {SMALLEST_VOCAB} or more")
        if args.heldout_fraction >= 1:
            parser.error(f"--heldout-fraction {args.heldout_fraction}: must be below 1")
    if hasattr(args, "warmup_steps"):
        steps = {name: getattr(args, name) for name in ("steps", *more_steps)}
        if args.warmup_steps is None:
            args.warmup_steps = min(most, min(steps.values()) // share)
        for name, count in steps.items():
            if args.warmup_steps >= count:
                parser.error(f"--warmup-steps {args.warmup_steps} must be below --{name.replace('_', '-')} {count}")
    if getattr(args, "stop_at", None) is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is beyond --steps {args.steps}")


def check_size(parser: argparse.ArgumentParser, args: argparse.Namespace, prefix: str = "") -> None:
    """Checks whether the attention heads, which have pairs of rotary positions, divide a hidden state."""
    hidden_size, heads = (getattr(args, f"{prefix}{name}".replace("-", "_")) for name in ("hidden_size", "heads"))
    if hidden_size % heads or (hidden_size // heads) % 2:
        parser.error(f"--{prefix}hidden-size {hidden_size} must be an even multiple of --{prefix}heads {heads}")
