"""Measures training steps, or the loss alone, of one head in one process: memory and time.

    python examples/accumulation_memory.py --head jliger --config llama3.2-1b --lengths 16384 32768 --out record.json

`gradient_accumulation.py` runs this program, a process for each head and memory limit: a device's peak memory can't be
reset. Within a process measurements ascend, and a peak is recorded if it is above the one before. The text is the
bytes of Python's own library.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decoder
import jax
import numpy as np
import optax
from accumulation_losses import HEADS, full_sums, jliger_sums, sums_of
from language_model import DTYPES
from reporting import Record, memory_of, write_json
from runs import interruptible, positive
from train_sharded import DeviceMemoryError, device_memory, device_memory_errors, rates

import jliger
from jliger.bench.report import environment

# Tokens of a sequence that the MLP goes over at a time.
PIECE = 8192


def text(count: int) -> np.ndarray:
    """The first bytes of the modules of Python's library, repeated where they don't suffice."""
    modules = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return np.resize(np.frombuffer(modules, np.uint8), count).astype(np.int32)


def measured(args: argparse.Namespace, compiled: jax.stages.Compiled, run: Callable[[], Any]) -> Record:
    """Time and memory of a compiled program; `run` calls it once and returns what to wait for.

    The first call counts only if it takes longer than `--timed-seconds`.
    """
    limit, memory = device_memory("bytes_limit"), memory_of(compiled.memory_analysis())
    if limit is not None and memory["total"] > limit:
        raise DeviceMemoryError(f"the compiled program needs {memory['total']} bytes of {limit}")
    times: list[float] = []
    with device_memory_errors():
        while len(times) < 1 + args.timed_steps:
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - began)
            if sum(times[1:]) > args.timed_seconds or times[0] > args.timed_seconds:
                break
    timed = times[1:] or times
    return {
        "milliseconds": 1e3 * statistics.median(timed),
        "milliseconds_of_calls": [1e3 * each for each in times],
        "warmed_up": len(times) > 1,
        "memory_bytes": memory,
        "peak_bytes": device_memory("peak_bytes_in_use"),
    }


# What is to be measured, and how.
Task = tuple[Record, Callable[[], Record]]


def loss_tasks(args: argparse.Namespace) -> Iterator[Task]:
    """The loss of `[tokens, hidden]` and its two gradients, alone, in each dtype and with each chunk size."""
    size = decoder.CONFIGS[args.config].hidden_size
    chunk_sizes = [*args.chunk_sizes, None] if args.head == "jliger" else [None]
    for dtype in ("bfloat16", "float32"):
        for chunk_size in chunk_sizes:

            def measure(dtype: str = dtype, chunk_size: int | None = chunk_size) -> Record:
                keys = jax.random.split(jax.random.key(0), 3)
                hidden = jax.random.normal(keys[0], (1, args.tokens, size), DTYPES[dtype])
                kernel = 0.02 * jax.random.normal(keys[1], (args.vocab, size), DTYPES[dtype])
                labels = jax.random.randint(keys[2], (1, args.tokens), 0, args.vocab)
                sums = full_sums if args.head == "full" else partial(jliger_sums, chunk_size=chunk_size)
                gradients = jax.jit(jax.value_and_grad(lambda *arrays: sums(*arrays)[0] / args.tokens, argnums=(0, 1)))
                began = time.perf_counter()
                with device_memory_errors():
                    compiled = gradients.lower(hidden, kernel, labels).compile()
                seconds = time.perf_counter() - began
                found = measured(args, compiled, partial(compiled, hidden, kernel, labels))
                return {"compile_seconds": seconds, **found}

            about = {"what": "loss", "dtype": dtype, "tokens": args.tokens, "hidden_size": size}
            yield about | {"vocab_size": args.vocab, "chunk_size": chunk_size}, measure


def step_tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Whole training steps, AdamW's update included, of each length and number of microbatches."""
    config, dtype, kept = decoder.CONFIGS[args.config], DTYPES[args.dtype], DTYPES[args.parameters]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(args.learning_rate, b2=0.95))
    holder = SimpleNamespace(state=None)

    def create() -> Any:
        params = decoder.initial_parameters(config, jax.random.key(0), kept)
        return params, optimizer.init(params)

    for length in sorted(args.lengths):
        for microbatches in sorted(args.microbatches, reverse=True):

            def measure(length: int = length, microbatches: int = microbatches) -> Record:
                pieces = -(-length // PIECE)
                sums = sums_of(args.head, config, dtype, pieces)

                def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
                    params, optimizer_state = state
                    found, gradients = jliger.accumulate_gradients(sums, microbatches)(params, batch)
                    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
                    return (optax.apply_updates(params, updates), optimizer_state), found.loss

                ids = text(args.rows * (length + 1)).reshape(args.rows, length + 1)
                batch = jax.device_put({"tokens": ids[:, :-1], "labels": ids[:, 1:]})
                began = time.perf_counter()
                with device_memory_errors():
                    if holder.state is None:
                        holder.state = jax.block_until_ready(jax.jit(create)())
                    compiled = jax.jit(step, donate_argnums=0).lower(holder.state, batch).compile()
                seconds = time.perf_counter() - began
                losses = []

                def run() -> Any:
                    holder.state, loss = compiled(holder.state, batch)
                    losses.append(loss)
                    return holder.state, loss

                found = measured(args, compiled, run)
                speed = rates(
                    SimpleNamespace(length=length, peak_tflops=None), config, args.rows, found["milliseconds"] / 1e3
                )
                return {"compile_seconds": seconds, "losses": [float(loss) for loss in losses], **speed, **found}

            about = {
                "what": "step",
                "dtype": args.dtype,
                "parameters": args.parameters,
                "rows": args.rows,
                "length": length,
                "microbatches": microbatches,
            }
            yield about, measure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="accumulation_memory", description=(__doc__ or "").partition("\n")[0])
    count, number = positive(int), positive(float)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the records' file")
    add("--head", choices=HEADS, required=True, help="last layer and loss")
    add("--what", choices=("loss", "step"), nargs="+", default=["step"], help="the loss alone, whole steps, or both")
    add("--config", choices=list(decoder.CONFIGS), default="tiny", help="sizes of the model (%(default)s)")
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="of a step's arithmetic (%(default)s)")
    add("--parameters", choices=list(DTYPES), default="float32", help="of parameters and AdamW's moments (%(default)s)")
    add("--rows", type=count, default=1, metavar="N", help="sequences a step (%(default)s)")
    add("--lengths", type=count, nargs="+", default=[256], metavar="N", help="tokens a sequence")
    add("--microbatches", type=count, nargs="+", default=[1], metavar="N", help="how many a step has")
    add("--tokens", type=count, default=8192, metavar="N", help="of the loss alone (%(default)s)")
    add("--vocab", type=count, default=50_000, metavar="N", help="of the loss alone (%(default)s)")
    add("--chunk-sizes", type=count, nargs="*", default=[], metavar="N", help="for jliger's loss alone, beside its own")
    add("--learning-rate", type=number, default=1e-3, metavar="X", help="of AdamW (%(default)s)")
    add("--timed-steps", type=count, default=3, metavar="N", help="calls to time (%(default)s)")
    add("--timed-seconds", type=number, default=3.0, metavar="X", help="but no more of them after this (%(default)s)")
    add("--limit", type=number, metavar="GB", help="what the device's memory is to be limited to, which is checked")
    return parser.parse_args(argv)


@interruptible("accumulation_memory")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the records after each measurement."""
    args = parse_args(argv)
    limit = device_memory("bytes_limit")
    if args.limit is not None and (limit is None or limit > 1e9 * args.limit):
        sys.exit(f"accumulation_memory: error: --limit {args.limit:g} GB, and JAX may use {limit} bytes")
    about = {**environment(), "bytes_limit": limit, "parameters": decoder.parameter_count(decoder.CONFIGS[args.config])}
    records: list[Record] = []
    peak = 0
    kinds = {"loss": loss_tasks, "step": step_tasks}
    for task, measure in (task for what in args.what for task in kinds[what](args)):
        record = {"head": args.head, "config": args.config, "limit_gb": args.limit, **task}
        try:
            record |= {"out_of_memory": False, **measure()}
            # Where an earlier peak was higher, this one's is not known.
            found = record["peak_bytes"] or 0
            record["peak_bytes"] = found if found > peak else None
            peak = max(peak, found)
        except DeviceMemoryError as error:
            record |= {"out_of_memory": True, "reason": str(error)}
        records.append(record)
        write_json(args.out, {"environment": about, "records": records})
        print(json.dumps(record), flush=True)
        if record["out_of_memory"]:
            break


if __name__ == "__main__":
    main()
