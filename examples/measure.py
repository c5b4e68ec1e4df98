"""Measures training steps, or the loss alone, with one head in a process of its own: memory and time.

    python examples/measure.py --what step --head jliger --config llama3.2-1b --lengths 16384 32768 --out record.json
    python examples/measure.py --what grpo --head jliger --config llama3.2-1b --rows 32 --out record.json

`gradient_accumulation.py` and `sweep_post_training.py` run this program, because a device's peak memory can't be reset.
The text of `step` is that of Python's library; weights are random, and so is everything that ORPO, DPO and GRPO need.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import options
from grpo import GrpoConfig, Policy
from jax.sharding import PartitionSpec as P
from language_model import HEADS, Head, language_model_loss
from llama import BATCH, LlamaConfig, Tree, initial_parameters, parameter_count, parameters, placed
from measuring import Records, in_words, measured, measured_steps
from options import COUNT, COUNT_OR_ZERO, DTYPES, NUMBER
from preference import BETA, Preference
from runs import DeviceMemoryError, Record, run_program
from train_sharded import make_mesh, mesh_axes
from training import Program, build_program, compile_step, device_memory, state_shardings

# All but the last one with the embedding as last layer.
CONFIGS = {
    # Seconds on a CPU.
    "tiny": LlamaConfig(16384, 64, 192, 2, 4, 2, tie_embeddings=True),
    # GPT-2's sizes and vocabulary, rounded down to thousands.
    "small": LlamaConfig(50_000, 768, 2048, 12, 12, 12, tie_embeddings=True),
    "llama3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, tie_embeddings=True),
    "llama3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8),
}
POST_TRAINING = (*BETA, "grpo")
# The MLP processes this many tokens of a sequence at a time.
PIECE = 8192
# What is to be measured, and how.
Task = tuple[Record, Callable[[], Record]]


def tasks_of(args: argparse.Namespace, what: str) -> Iterator[Task]:
    """The loss alone in each dtype and with each chunk size, or steps of each length and number of microbatches."""
    if what == "loss":
        about = {"what": what, "tokens": args.tokens, "vocab_size": args.vocab}
        for dtype in ("bfloat16", "float32"):
            for size in [*args.chunk_sizes, None] if args.head == "jliger" else [None]:
                yield {**about, "dtype": dtype, "chunk_size": size}, partial(measure_loss, args, dtype, size)
        return
    about = {"what": what, "dtype": args.dtype, "parameters": args.parameters, "rows": args.rows, "mesh": args.mesh}
    if what != "step":
        about |= {"loss": what, "sequences": args.rows, "prompt_length": args.prompt_length}
    for length in sorted(args.lengths):
        for count in sorted(args.microbatches, reverse=True):
            yield {**about, "length": length, "microbatches": count}, partial(measure_step, args, what, length, count)


def measure_loss(args: argparse.Namespace, dtype: str, chunk_size: int | None) -> Record:
    """The loss of `[tokens, hidden]` and its two gradients."""
    config = replace(CONFIGS[args.config], vocab_size=args.vocab, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, args.tokens, config.hidden_size), dtype)
    kernel = 0.02 * jax.random.normal(keys[1], (args.vocab, config.hidden_size), dtype)
    labels = jax.random.randint(keys[2], (1, args.tokens), 0, args.vocab)
    head = Head(args.head, args.implementation, chunk_size)

    @partial(jax.value_and_grad, argnums=(0, 1))
    def mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return head.loss_sum(config, {"embedding": kernel}, hidden, labels, labels >= 0) / args.tokens

    compiled = compile_step(jax.jit(mean).trace(hidden, kernel, labels))
    return measured(compiled, partial(compiled.step, hidden, kernel, labels), args.timed_steps, args.timed_seconds)


def measure_step(args: argparse.Namespace, what: str, length: int, microbatches: int) -> Record:
    """A whole training step, with AdamW's update."""
    config = replace(CONFIGS[args.config], dtype=args.dtype, mlp_pieces=-(-length // PIECE))
    with nullcontext() if args.mesh is None else jax.set_mesh(make_mesh(args.mesh)):
        program, batch = program_of(args, config, what, length, microbatches)
        return measured_steps(program, batch, config, (args.rows, length), args)


def program_of(
    args: argparse.Namespace, config: LlamaConfig, what: str, length: int, microbatches: int
) -> tuple[Program, Tree]:
    """The traced step and its batch."""
    head = Head(args.head, args.implementation, args.chunk_size)
    # A generator that is quick to compile and to run; on a mesh, one whose numbers each device can make a part of.
    keys = jax.random.split(jax.random.key(args.seed, impl="rbg" if args.mesh is None else "threefry2x32"))
    create = partial(initial_parameters, config, keys[0], args.parameters)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.learning_rate, b2=0.95))
    shardings = state_shardings(optimizer, jax.tree.map(lambda leaf: leaf.spec, parameters(config)))
    rows = placed(P(BATCH))
    if what == "step":
        loss_fn = language_model_loss(head, config)
        # The first bytes of the modules of Python's library, repeated if there are too few.
        modules = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        text = np.resize(np.frombuffer(modules, np.uint8), (args.rows, length + 1))
        batch = jax.device_put(text.astype(np.int32), rows)
    else:
        loss_fn = Preference(what, head, config, BETA.get(what, 0.0), args.prompt_length, end_of_text=-1)
        if what == "grpo":
            loss_fn = Policy(head, config, GrpoConfig(beta=0.04), args.prompt_length)
        make = jax.jit(random_batch, static_argnums=(0, 1, 2, 3), out_shardings=rows)
        batch = make(what, config, args.rows, length, keys[1])
    return build_program(loss_fn, create, optimizer, batch, microbatches=microbatches, shardings=shardings), batch


def random_batch(what: str, config: LlamaConfig, rows: int, length: int, key: jax.Array) -> Tree:
    """Tokens `[B, T+1]`, and what the loss needs beside them, close to what a model with random weights would give."""
    keys = jax.random.split(key, 3)
    batch = {"tokens": jax.random.randint(keys[0], (rows, length + 1), 0, config.vocab_size)}
    old, reference = -math.log(config.vocab_size) + 0.1 * jax.random.normal(keys[1], (2, rows, length))
    if what == "dpo":
        batch["reference"] = reference.sum(axis=1)
    if what == "grpo":
        batch |= {"advantages": jax.random.normal(keys[2], (rows,)), "old": old, "reference": reference}
    return batch


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the records' file")
    options.add_head_options(add, choices=HEADS)
    add("--what", choices=("loss", "step", *POST_TRAINING), nargs="+", default=["step"], help="(default: step)")
    add("--config", choices=list(CONFIGS), default="tiny", help="sizes of the model (%(default)s)")
    add("--mesh", type=mesh_axes, metavar="AXES", help="of all devices, as in fsdp=4, for steps (default: one device)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of a step's arithmetic (%(default)s)")
    add("--parameters", choices=DTYPES, default="float32", help="of parameters and AdamW's moments (%(default)s)")
    add("--rows", "--sequences", type=COUNT, default=1, metavar="N", help="sequences a step (%(default)s)")
    add("--lengths", "--length", type=COUNT, nargs="+", default=[2048], metavar="N", help="tokens a sequence (2048)")
    add("--prompt-length", type=COUNT_OR_ZERO, default=0, metavar="N", help="that don't count (%(default)s)")
    add("--microbatches", type=COUNT, nargs="+", default=[1], metavar="N", help="in a step (1)")
    add("--tokens", type=COUNT, default=8192, metavar="N", help="of the loss alone (%(default)s)")
    add("--vocab", type=COUNT, default=50_000, metavar="N", help="of the loss alone (%(default)s)")
    add("--chunk-sizes", type=COUNT, nargs="*", default=[], metavar="N", help="of the loss alone, beside jliger's own")
    add("--learning-rate", type=NUMBER, default=1e-3, metavar="X", help="of AdamW (%(default)s)")
    add("--timed-steps", type=COUNT, default=2, metavar="N", help="calls to time, after one (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=10.0, metavar="X", help="no more of them after this time (%(default)s)")
    add("--peak-tflops", type=NUMBER, metavar="X", help="of the device (default: known for H100 and H200)")
    add("--limit", type=NUMBER, metavar="GB", help="check that JAX may use no more of the device's memory than this")
    args = parser.parse_args(argv)
    options.check(parser, args)
    for loss in set(args.what) & set(BETA):
        if args.rows % 2:
            parser.error(f"--rows {args.rows} must be even for {loss}: two are a pair")
    if args.mesh is not None:
        # No pair is on two devices.
        share = args.mesh["data"] * args.mesh["fsdp"] * (2 if set(args.what) & set(BETA) else 1)
        if args.rows % (share * max(args.microbatches)):
            parser.error(f"--rows {args.rows} must be a multiple of {share} on this mesh, times --microbatches")
    if args.prompt_length > min(args.lengths):
        parser.error(f"--prompt-length {args.prompt_length} leaves nothing of --length {min(args.lengths)} that counts")
    return args


def run(args: argparse.Namespace) -> None:
    limit = device_memory("bytes_limit")
    if args.limit is not None and (limit is None or limit > 1e9 * args.limit):
        sys.exit(f"measure: error: --limit {args.limit:g} GB, and JAX may use {limit} bytes")
    records = Records(args.out, parameters=parameter_count(CONFIGS[args.config]))
    common = {"head": args.head, "config": args.config, "limit_gb": args.limit}
    for what in args.what:
        for about, measure in tasks_of(args, what):
            record = records.add({**common, **about}, measure)
            print(f"{what}, {args.head}: {in_words(record)}", flush=True)
            if record["out_of_memory"]:
                raise DeviceMemoryError(record["reason"])


def main(argv: Sequence[str] | None = None) -> None:
    run_program("measure", run, parse_args(argv), "what had been measured is kept")


if __name__ == "__main__":
    main()
