"""Measures `skip_gradients_below` on the last layer of a model while it is trained: time, memory, errors.

    python examples/measure_skipping.py --corpus PATH...

The model is small, its vocabulary large. Its last hidden states and its kernel are rotated into a larger hidden size,
which leaves the logits as they are; random logits would not do, because what is skipped depends on them. Errors are
relative to products in float32. docs/skip_gradients.md explains the figures.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loading  # noqa: F401
import numpy as np
import options
import runs
from corpus import heldout_batches
from language_model import Head, inputs_and_labels, language_model_loss
from llama import LlamaConfig, Tree, hidden_states, last_layer
from options import COUNT, COUNT_OR_ZERO, NUMBER
from reporting import MIB, number, table_of
from runs import Record, RunError
from sweeps import command_of
from training import TrainingConfig, text_training

import jliger
from jliger.bench.report import environment
from jliger.bench.timing import Effort, Timed, median, time_in_turn

SEGMENT, PIECES, RESULTS, TABLES = 128, 8, "results.json", "tables.txt"


def power(record: Record) -> str:
    """ε, or that there is none."""
    return "none" if record["limit"] is None else f"2^{np.log2(record['limit']):.0f}"


SPEED = {
    "step": number("step", "d"),
    "kernel's dtype": number("kernel"),
    "ε": power,
    "ms": number("milliseconds", ".1f"),
    "of the floor's speed": number("of_floor", ".0%"),
    "extra MiB": number("extra_mib", ".0f"),
    "skipped mass": number("skipped_mass", ".3f"),
    "error, hidden states": number("hidden_error", ".2%"),
    "error, kernel": number("kernel_error", ".2%"),
}
SHARES = {
    "step": number("step", "d"),
    "loss": number("loss", ".2f"),
    "ε": power,
    "tokens' segments": number("of_tokens", ".1%"),
    "columns' segments": number("of_columns", ".1%"),
    "tiles": number("tiles", ".1%"),
    "if dropped, hidden states": number("hidden_dropped", ".2%"),
    "if dropped, kernel": number("kernel_dropped", ".2%"),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure_skipping", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    add = parser.add_argument_group("training").add_argument
    options.add_seed_option(add)
    options.add_learning_options(add, "100, at most half of the steps")
    add = parser.add_argument_group("measurement").add_argument
    add(
        "--measure-at",
        type=COUNT_OR_ZERO,
        nargs="+",
        default=[0, 60, 300, 1500],
        metavar="STEP",
        help="steps (0 60 300 1500); training ends at the last",
    )
    # With the last one all gradients matter, so that all is computed in full.
    limits = [2**-12, 2**-14, 2**-60]
    add("--limits", type=NUMBER, nargs="+", default=limits, metavar="X", help="values of ε (2^-12 2^-14 2^-60)")
    add("--wide", type=COUNT, default=4096, metavar="N", help="hidden size to rotate into (%(default)s)")
    add("--seconds", type=NUMBER, default=0.12, metavar="X", help="of a burst of calls (%(default)s)")
    add("--out", type=Path, default=Path("runs/measure_skipping"), help="folder of the results (%(default)s)")
    add("--overwrite", action="store_true", help=f"replace {RESULTS} and {TABLES} in --out")
    parser.set_defaults(dtype="bfloat16", hidden_size=768, layers=6, heads=12, batch_size=16, length=512)
    parser.set_defaults(vocab_size=128256, learning_rate=1e-3, max_bytes=48_000_000)
    args = parser.parse_args(argv)
    args.command = command_of("measure_skipping", argv)
    args.steps = max(args.measure_at) or 1
    options.check(parser, args, share=2, most=100)
    return args


def loss(limit: float | None, hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    return jliger.fused_linear_cross_entropy(
        hidden, kernel, labels, ignore_index=None, skip_gradients_below=limit, return_metrics=True
    )


def three_products(hidden: jax.Array, kernel: jax.Array, logit_grads: jax.Array) -> tuple[jax.Array, ...]:
    """The floor: logits and both gradients, of operands that are cast already."""
    dot = partial(jax.lax.dot_general, preferred_element_type=hidden.dtype)
    wide = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    return (
        dot(hidden, kernel, (((1,), (0,)), ((), ()))),
        dot(logit_grads, kernel, (((1,), (1,)), ((), ()))),
        wide(hidden, logit_grads, (((0,), (0,)), ((), ()))),
    )


class Layer:
    """The programs that are measured, compiled for one shape."""

    def __init__(self, tokens: int, hidden_size: int, vocab: int, dtype: str, limits: Sequence[float]):
        hidden = jax.ShapeDtypeStruct((tokens, hidden_size), dtype)
        labels, grads = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens, vocab), dtype)
        kernels = {name: jax.ShapeDtypeStruct((hidden_size, vocab), name) for name in ("float32", dtype)}
        traced = {
            (name, limit): jax.jit(jax.value_and_grad(partial(loss, limit), (0, 1), has_aux=True)).lower(
                hidden, kernel, labels
            )
            for name, kernel in kernels.items()
            for limit in (None, *limits)
        }
        floor = jax.jit(three_products).lower(hidden, kernels[dtype], grads)
        with ThreadPoolExecutor() as pool:  # XLA's compiler releases Python's lock
            compiled = pool.map(lambda each: each.compile(), (floor, *traced.values()))
            self.floor, *programs = compiled
        self.programs = dict(zip(traced, programs, strict=True))

    def measure(self, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, seconds: float) -> list[Record]:
        """A record of each program."""
        kernels = {name: kernel.astype(name) for name, _ in self.programs}
        grads = jax.random.normal(jax.random.key(0), (hidden.shape[0], kernel.shape[1]), hidden.dtype)
        things: dict[Any, Timed] = {"floor": Timed(partial(self.floor, hidden, kernels[str(hidden.dtype)], grads))}
        truth, records = Truth(hidden, kernel, labels), {}
        for (name, limit), program in self.programs.items():
            things[name, limit] = Timed(partial(program, hidden, kernels[name], labels))
            (_, metrics), found = program(hidden, kernels[name], labels)
            errors = map(relative_error, found, truth.gradients)
            records[name, limit] = {
                "kernel": name,
                "limit": limit,
                **dict(zip(("hidden_error", "kernel_error"), map(float, errors), strict=True)),
                "extra_mib": program.memory_analysis().temp_size_in_bytes / MIB,
                "skipped_mass": None if limit is None else float(metrics.skipped_mass),
                **(truth.segments(limit) if limit is not None and name == "float32" else {}),
            }
            del found, metrics
        del truth
        times = time_in_turn(things, Effort(3, seconds))
        floor = median(times.pop("floor"))
        for key, record in records.items():
            seconds_of_call = median(times[key])
            each = [1e3 * value for value in times[key]]
            record |= {"milliseconds": 1e3 * seconds_of_call, "milliseconds_of_bursts": each}
            record |= {"of_floor": floor / seconds_of_call, "floor_milliseconds": 1e3 * floor}
        return list(records.values())


class Truth:
    """Gradients by products in float32, and which segments of the logit gradients are large; in pieces of tokens."""

    def __init__(self, hidden: jax.Array, kernel: jax.Array, labels: jax.Array):
        self.kernel = kernel
        self.pieces = list(zip(jnp.split(hidden, PIECES), jnp.split(labels, PIECES), strict=True))
        self.gradients = self._gradients(None)

    def segments(self, limit: float) -> Record:
        """Shares of the segments and tiles with a large gradient, and errors if the other segments were dropped."""
        shares = [shares_of_piece(limit, hidden, self.kernel, labels) for hidden, labels in self.pieces]
        names = ("of_tokens", "of_columns", "tiles")
        dropped = map(relative_error, self._gradients(limit), self.gradients)
        return dict(zip(names, np.mean(shares, axis=0).tolist(), strict=True)) | dict(
            zip(("hidden_dropped", "kernel_dropped"), map(float, dropped), strict=True)
        )

    def _gradients(self, limit: float | None) -> tuple[jax.Array, jax.Array]:
        of_hidden, of_kernel = [], jnp.zeros(self.kernel.shape, jnp.float32)
        for hidden, labels in self.pieces:
            part, of_kernel = gradients_of_piece(limit, hidden, self.kernel, labels, of_kernel)
            of_hidden.append(part)
        scale = 1 / sum(labels.size for _, labels in self.pieces)
        return jnp.concatenate(of_hidden) * scale, of_kernel * scale


def tiles_of_piece(
    limit: float, hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logit gradients, and which are large, in tiles `[B, 128, J, 128]`."""
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    is_label = jnp.arange(kernel.shape[1]) == labels[:, None]
    grads = jax.nn.softmax(logits) - is_label
    padding = ((0, -len(labels) % SEGMENT), (0, -kernel.shape[1] % SEGMENT))
    large = jnp.pad((jnp.abs(grads) > limit) | is_label, padding)
    return grads, large.reshape(large.shape[0] // SEGMENT, SEGMENT, -1, SEGMENT)


@partial(jax.jit, static_argnums=0)
def shares_of_piece(limit: float, hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    _, large = tiles_of_piece(limit, hidden, kernel, labels)
    return jnp.stack([large.any(axes).mean() for axes in (3, 1, (1, 3))])


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def gradients_of_piece(
    limit: float | None, hidden: jax.Array, kernel: jax.Array, labels: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden states, and the sum of the kernel's; with a limit, without small segments."""
    grads, large = tiles_of_piece(limit or 0.0, hidden, kernel, labels)
    parts = []
    for axis in (1, 3):
        kept = jnp.broadcast_to(large.any(axis, keepdims=True), large.shape).reshape(large.shape[0] * SEGMENT, -1)
        parts.append(grads if limit is None else jnp.where(kept[: len(labels), : kernel.shape[1]], grads, 0))
    with jax.default_matmul_precision("highest"):
        return parts[0] @ kernel.T, total + hidden.astype(jnp.float32).T @ parts[1]


@jax.jit
def relative_error(found: jax.Array, truth: jax.Array) -> jax.Array:
    return jnp.linalg.norm(found.astype(jnp.float32) - truth) / jnp.linalg.norm(truth)


def rotated(config: LlamaConfig, wide: int, end: int) -> Callable[[Tree, jax.Array], tuple[jax.Array, ...]]:
    """A function of parameters and a batch: hidden states, kernel and labels of the last layer, made wider."""
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (wide, config.hidden_size)))[0]

    @jax.jit
    def layer(params: Tree, tokens: jax.Array) -> tuple[jax.Array, ...]:
        inputs, labels, _ = inputs_and_labels(tokens, end)
        hidden = hidden_states(config, params, inputs).reshape(-1, config.hidden_size)
        kernel, layout = last_layer(config, params)
        kernel = kernel.astype(jnp.float32) if layout == "hv" else kernel.astype(jnp.float32).T
        return (hidden.astype(jnp.float32) @ rotation.T).astype(hidden.dtype), rotation @ kernel, labels.reshape(-1)

    return layer


def run(args: argparse.Namespace) -> None:
    if (args.out / RESULTS).exists() and not args.overwrite:
        raise RunError(f"{args.out} has {RESULTS}: --overwrite replaces it, --out names another folder")
    began, corpus = time.perf_counter(), options.corpus_of(args)
    config, learning = options.model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    loss_fn = language_model_loss(Head("jliger"), config, corpus.end_of_text)
    training = text_training("model", args.out, loss_fn, config, learning, corpus.train)
    tokens = args.batch_size * args.length
    runs.say(f"compiling for {tokens}, {args.wide}, {corpus.vocab_size} ...")
    layer = Layer(tokens, args.wide, corpus.vocab_size, args.dtype, args.limits)
    widened = rotated(config, args.wide, corpus.end_of_text)
    (batch,) = heldout_batches(corpus.heldout, args.batch_size, args.length, 1)
    training.begin(None, False)
    training.prepare()
    records: list[Record] = []
    for step in range(args.steps + 1):
        if step:
            training.advance(step)
        if step not in args.measure_at:
            continue
        hidden, kernel, labels = widened(training.state["parameters"], batch)
        value = float(jax.jit(partial(loss, None))(hidden, kernel, labels)[0])
        records += [
            {"step": step, "loss": value, **each} for each in layer.measure(hidden, kernel, labels, args.seconds)
        ]
        results = {
            "environment": {**environment(), "command": args.command},
            "layer": {"tokens": tokens, "hidden_size": args.wide, "vocab_size": corpus.vocab_size},
            "settings": {**asdict(config), **asdict(learning), "training_tokens": len(corpus.train)},
            "records": records,
        }
        runs.write_json(args.out / RESULTS, results)
        runs.say(f"step {step} is measured ({time.perf_counter() - began:.0f} s)")
    tables = tables_of(runs.read_json(args.out / RESULTS))
    (args.out / TABLES).write_text(tables + "\n", encoding="utf-8")
    print(tables)


def tables_of(results: Record) -> str:
    """The tables of a results file, and what it was measured with."""
    records, about = results["records"], results["environment"]
    sizes = ", ".join(str(results["layer"][name]) for name in ("tokens", "hidden_size", "vocab_size"))
    names = ("jax", "jaxlib", "jax-triton", "triton")  # without a GPU, the last two need not be installed
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in names if name in about["versions"])
    of_segments = [each for each in records if "tiles" in each]
    return "\n\n".join(
        [
            f"Loss and gradients at ({sizes})\n{table_of(records, SPEED)}",
            "Shares of what has a larger gradient than ε, and errors if the rest were dropped\n"
            + table_of(of_segments, SHARES),
            f"{about['device']}, {versions}\n{about['command']}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("measure_skipping", run, parse_args(argv))


if __name__ == "__main__":
    main()
