"""What the training examples share beside the model: command-line numbers, a run's folder, labels of tokens."""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from reporting import write_json

# Files that every run's folder has.
CONFIG, TOKENIZER, SUMMARY = "config.json", "tokenizer.json", "summary.json"
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
# 128 and the number of SIGINT.
INTERRUPTED_EXIT = 130


class RunError(Exception):
    """The run can't start or go on; the message says why and what to do."""


def inputs_and_labels(tokens: jax.Array, end_of_text: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[B, T+1]` tokens to inputs, labels and which labels count, each `[B, T]`.

    The first token of a document doesn't follow from the end of another one, and -1 is no token: neither
    counts.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    where = (inputs != end_of_text) & (inputs >= 0) & (labels >= 0)
    return jnp.maximum(inputs, 0), jnp.maximum(labels, 0), where


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


def fit_warmup(parser: argparse.ArgumentParser, args: argparse.Namespace, *trainings: str, share: int = 10) -> None:
    """Sets `args.warmup_steps` where it isn't given; ends the program with a message where it is too long.

    `trainings` name the options that say how many steps a training has. The default is the shortest one's steps
    divided by `share`, and at most 10.
    """
    steps = {name: getattr(args, name) for name in trainings}
    if args.warmup_steps is None:
        args.warmup_steps = min(10, min(steps.values()) // share)
    for name, count in steps.items():
        if args.warmup_steps >= count:
            parser.error(f"--warmup-steps {args.warmup_steps} must be below --{name.replace('_', '-')} {count}")


@contextmanager
def interruptible(name: str, then: str = "") -> Iterator[None]:
    """Ends a program that Ctrl-C interrupts with a line, not a traceback, and the exit status that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted{then and '; '}{then}", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)


def check_folder(out: Path, settings: dict[str, Any], *, resume: bool | None, overwrite: bool) -> None:
    """Refuses a folder that this run may not go on in or begin in; changes nothing.

    `resume` is None for a program that has no such option.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file")
    is_run = (out / CONFIG).is_file()
    if resume:
        if not is_run:
            raise RunError(f"--resume: {out} holds no run (there is no {CONFIG} in it)")
        try:
            earlier = json.loads((out / CONFIG).read_text(encoding="utf-8"))
            differing = {key: earlier.get(key) for key in settings if earlier.get(key) != settings[key]}
        except (ValueError, AttributeError) as error:
            raise RunError(f"{out / CONFIG} can't be read ({error}); nothing was changed") from error
        if differing:
            changes = ", ".join(f"{key} was {value} and is {settings[key]}" for key, value in differing.items())
            raise RunError(f"--resume: the run in {out} has other settings: {changes}. Nothing was changed")
        return
    if is_run and not overwrite:
        goes_on = "" if resume is None else "--resume goes on with it, "
        raise RunError(f"{out} holds a run: {goes_on}--overwrite removes it, --out names another folder")
    if not is_run and out.exists() and any(out.iterdir()):
        raise RunError(f"{out} holds files that are no run of this program; --out names another folder")


def begin_folder(out: Path, settings: dict[str, Any], contents: Sequence[str]) -> None:
    """Removes an earlier run's `contents` (and nothing else) and writes this run's configuration."""
    # The configuration goes last: a folder in which it is left is still known as a run.
    for name in (*contents, CONFIG):
        if (out / name).is_dir():
            shutil.rmtree(out / name, ignore_errors=True)
        else:
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, settings)
