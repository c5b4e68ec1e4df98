"""Measures the steps of a fine-tuning at the shape of a published model, with random weights and tokens.

    python examples/measure_finetune.py --shape qwen3-0.6b --head full --batch 16 --largest -- record.json

The rows are full, one example each. examples/sweep_finetune.py runs this for several models and both heads.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decoder
import jax
import numpy as np
import optax
import options
import pretrained
import runs
from decoder import DecoderConfig
from measuring import Records, in_words, measured
from options import COUNT, COUNT_OR_ZERO, DTYPES, NUMBER
from runs import DeviceMemoryError, Record, RunError, say
from shapes import SHAPES
from training import compile_step, device_memory, device_memory_errors
from tuning import Tuning, leaf_count

LEARNING_RATE = 1e-5
# The share of a device's memory that the largest batch is guessed for.
FILLED = 0.97


def tuning_of(args: argparse.Namespace) -> Tuning:
    return Tuning(
        config=pretrained.decoder_config(SHAPES[args.shape], args.shape, args.dtype),
        head=args.head,
        rank=args.lora_rank,
        alpha=2.0 * args.lora_rank,
        groups=("attention", "mlp"),
        dtype=args.param_dtype,
        is_packed=False,
        mesh=None,
        head_options={},
    )


def random_parameters(config: DecoderConfig, dtype: str) -> Any:
    create = partial(decoder.initial_parameters, config, dtype=dtype)
    with device_memory_errors():
        return jax.block_until_ready(jax.jit(create)(jax.random.key(0)))


def random_rows(config: DecoderConfig, batch_size: int, length: int) -> np.ndarray:
    """Rows as `instructions.pack` makes them, of one example each in which every token counts."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch_size, length + 1), dtype=np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))
    return np.stack([tokens[:, :-1], tokens[:, 1:], np.ones_like(places), places], axis=1)


def measure(args: argparse.Namespace, tuning: Tuning, base: tuple[Any, ...], batch_size: int) -> Record:
    initial = partial(random_parameters, tuning.config, tuning.dtype)
    if tuning.rank:
        initial = partial(tuning.initial_adapters, 0)
    program = tuning.program(optax.adamw(LEARNING_RATE), initial, batch_size, args.length)
    compiled = compile_step(program.step)
    # Known now, and of use for the next guess even if the step does not fit.
    args.needed[batch_size] = compiled.memory
    with device_memory_errors():
        state = jax.block_until_ready(program.initial_state())
    rows = tuning.on_devices(random_rows(tuning.config, batch_size, args.length))
    losses = []

    def run() -> Any:
        nonlocal state
        state, result = compiled.step(state, rows, *base)
        losses.append(result.loss)
        return state

    record = measured(compiled, run, args.timed_steps, args.timed_seconds)
    speed = {"tokens_per_second": batch_size * args.length / record["milliseconds"] * 1e3}
    return {**record, **speed, "losses": [float(loss) for loss in losses]}


def largest_batch(args: argparse.Namespace) -> int:
    """The batch that fills the memory, from the compiler's account of the largest one that is known.

    What grows with the batch is all but the arguments and, with jliger, the gradients. With full logits the peak is at
    the last layer, before there are others.
    """
    batch_size, memory = max(args.needed.items())
    fixed = memory["arguments"] + (memory["aliased"] // 3 if args.head == "jliger" else 0)
    room = FILLED * device_memory("bytes_limit") - fixed
    return int(room / max(memory["total"] - fixed, 1) * batch_size) // args.multiple * args.multiple


def run(args: argparse.Namespace) -> None:
    if args.largest is not None and device_memory("bytes_limit") is None:
        raise RunError("--largest needs a device that says how much memory it has")
    tuning, args.needed = tuning_of(args), {}
    base = (random_parameters(tuning.config, tuning.dtype),) if tuning.rank else ()
    about = {name: getattr(args, name) for name in ("shape", "head", "length", "lora_rank", "dtype", "param_dtype")}
    about |= {"parameters": decoder.parameter_count(tuning.config), "trained": leaf_count(tuning.trained())}
    records = Records(args.record)

    def try_batch(batch_size: int) -> Record:
        record = records.add({**about, "batch": batch_size}, partial(measure, args, tuning, base, batch_size))
        say(f"{args.shape}, {args.head}, batch {batch_size}: {in_words(record)}")
        return record

    for batch_size in sorted(args.batch):
        if try_batch(batch_size)["out_of_memory"]:
            raise DeviceMemoryError(f"batch {batch_size} does not fit into the device's memory; the record says so")
    if args.largest is not None:
        batch_size = args.largest or largest_batch(args)
        for _ in range(args.tries):
            fits = not try_batch(batch_size)["out_of_memory"]
            better = largest_batch(args)
            if fits and better <= 1.1 * batch_size:
                break
            batch_size = better if fits else min(better, batch_size - args.multiple)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure_finetune", __doc__)
    add = parser.add_argument
    add("record", type=Path, metavar="FILE", help="the JSON file to write")
    add("--shape", choices=list(SHAPES), required=True, help="of the model")
    add("--head", choices=decoder.HEAD_NAMES, required=True, help="the last layer and loss")
    add("--batch", type=COUNT, nargs="*", default=[], metavar="N", help="rows per step")
    add("--length", type=COUNT, default=512, metavar="N", help="tokens per row (%(default)s)")
    add("--lora-rank", type=COUNT_OR_ZERO, default=0, metavar="R", help="of adapters; 0: train all (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--param-dtype", choices=DTYPES, default="bfloat16", help="of the parameters (%(default)s)")
    add("--largest", type=COUNT, nargs="?", const=0, metavar="N", help="then the largest; N is where to look first")
    add("--multiple", type=COUNT, default=4, metavar="N", help="of which the largest is one (%(default)s)")
    add("--tries", type=COUNT, default=3, metavar="N", help="to find the largest (%(default)s)")
    add("--timed-steps", type=COUNT, default=4, metavar="N", help="steps to time at each batch (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=8.0, metavar="X", help="no more of them after this time (%(default)s)")
    args = parser.parse_args(argv)
    if not args.batch and not args.largest:
        parser.error("--batch or --largest N is needed")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("measure_finetune", run, parse_args(argv))


if __name__ == "__main__":
    main()
