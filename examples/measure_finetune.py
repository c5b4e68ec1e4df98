"""Measures the steps of a fine-tuning at the shape of a published model, with random weights and tokens.

    python examples/measure_finetune.py --shape qwen3-0.6b --largest full jliger -- record.json

The rows are full, one example each. Both heads are measured in one process: XLA then chooses the kernels of the layers
once for both. examples/sweep_finetune.py runs this for several models.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import architectures
import decoder
import jax
import numpy as np
import optax
import options
import runs
from decoder import DecoderConfig
from jax.sharding import Mesh
from measuring import Records, in_words, measured
from options import COUNT, COUNT_OR_ZERO, DTYPES, NUMBER
from runs import DeviceMemoryError, Record, RunError, say
from shapes import SHAPES
from train_sharded import make_mesh, mesh_axes
from training import Compiled, Program, compile_step, device_memory, device_memory_errors
from tuning import Tuning, leaf_count, sharding_on

LEARNING_RATE = 1e-5
# The share of a device's memory that the largest batch may take according to XLA, what a first guess is made for, and
# below which a second guess is worth its compilation.
FITS, FIRST, NEAR = 0.98, 0.93, 0.85


def tuning_of(args: argparse.Namespace, head: str, mesh: Mesh | None) -> Tuning:
    return Tuning(
        config=architectures.decoder_config(SHAPES[args.shape], args.shape, args.dtype),
        head=head,
        rank=args.lora_rank,
        alpha=2.0 * args.lora_rank,
        groups=("attention", "mlp"),
        dtype=args.param_dtype,
        is_packed=False,
        mesh=mesh,
        head_options={},
    )


@cache
def creation(config: DecoderConfig, dtype: str, mesh: Mesh | None) -> Callable[[jax.Array], Any]:
    """Makes random parameters of a key. Cached, so that all steps share one compilation."""
    described = decoder.parameters(config)
    places = jax.tree.map(lambda leaf: sharding_on(mesh, leaf.spec), described)
    return jax.jit(partial(decoder.initial_parameters, config, dtype=dtype), out_shardings=places)


def random_parameters(tuning: Tuning) -> Any:
    with device_memory_errors():
        return jax.block_until_ready(creation(tuning.config, tuning.dtype, tuning.mesh)(jax.random.key(0)))


def random_rows(config: DecoderConfig, batch_size: int, length: int) -> np.ndarray:
    """Rows as `instructions.pack` makes them, of one example each in which every token counts."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch_size, length + 1), dtype=np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length))
    return np.stack([tokens[:, :-1], tokens[:, 1:], np.ones_like(places), places], axis=1)


@dataclass(frozen=True)
class Prepared:
    """A step of one head at one batch, compiled."""

    tuning: Tuning
    batch_size: int
    program: Program
    compiled: Compiled

    @property
    def is_small_enough(self) -> bool:
        return self.compiled.memory["total"] <= FITS * device_memory("bytes_limit")

    @property
    def fills_memory(self) -> bool:
        return self.is_small_enough and self.compiled.memory["total"] >= NEAR * device_memory("bytes_limit")


def prepare(args: argparse.Namespace, tuning: Tuning, batch_size: int) -> Prepared:
    initial = partial(tuning.initial_adapters, 0) if tuning.rank else partial(random_parameters, tuning)
    program = tuning.program(optax.adamw(LEARNING_RATE), initial, batch_size, args.length)
    return Prepared(tuning, batch_size, program, compile_step(program.step))


def measure(args: argparse.Namespace, prepared: Prepared, base: tuple[Any, ...]) -> Record:
    tuning, batch_size, compiled = prepared.tuning, prepared.batch_size, prepared.compiled
    with device_memory_errors():
        state = jax.block_until_ready(prepared.program.initial_state())
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


def devices_of(tuning: Tuning) -> int:
    return 1 if tuning.mesh is None else tuning.mesh.size


def whole_batch(args: argparse.Namespace, tuning: Tuning, tokens: float) -> int:
    """The largest batch of at most so many tokens whose rows divide by the devices and by `--multiple` on each."""
    multiple = args.multiple * devices_of(tuning)
    return max(int(tokens) // args.length // multiple, 1) * multiple


def first_guess(args: argparse.Namespace, tuning: Tuning) -> int:
    """The batch that full logits probably allow, from the sizes of the model.

    Their step needs most at the loss: parameters, moments, each layer's input, and 6 bytes a logit, for float32 and for
    the 16-bit gradient. A softcap's derivative is 4 bytes more.
    """
    config, size = tuning.config, np.dtype(tuning.dtype).itemsize
    fixed = decoder.parameter_count(config) * size * (1 if tuning.rank else 3) / devices_of(tuning)
    each = config.vocab_size * (6 if config.logit_softcap is None else 10) + 2 * config.hidden_size * config.layers
    return whole_batch(args, tuning, (FIRST * device_memory("bytes_limit") - fixed) / each * devices_of(tuning))


def next_guess(args: argparse.Namespace, prepared: Prepared) -> int:
    """The batch that fills the memory, from the compiler's account of another one.

    What grows with the batch is all but the arguments and, with jliger, the gradients. With full logits the peak is at
    the last layer, before there are others.
    """
    memory = prepared.compiled.memory
    fixed = memory["arguments"] + (memory["aliased"] // 3 if prepared.tuning.head == "jliger" else 0)
    room = FITS * device_memory("bytes_limit") - fixed
    rows = room / max(memory["total"] - fixed, 1) * prepared.batch_size
    return whole_batch(args, prepared.tuning, rows * args.length)


def largest(args: argparse.Namespace, tuning: Tuning, batch_size: int) -> Prepared:
    """The step at the largest batch, with `batch_size` as the first guess; if no guess is right, the last one.

    Only compiled, not run: XLA says how much memory a step needs.
    """
    prepared = prepare(args, tuning, batch_size)
    for _ in range(args.tries - 1):
        if prepared.fills_memory or (better := next_guess(args, prepared)) == prepared.batch_size:
            break
        prepared = prepare(args, tuning, better)
    return prepared


def run(args: argparse.Namespace) -> None:
    if args.largest and device_memory("bytes_limit") is None:
        raise RunError("--largest needs a device that says how much memory it has")
    mesh = make_mesh(args.mesh) if jax.device_count() > 1 else None
    tunings = {head: tuning_of(args, head, mesh) for head in decoder.HEAD_NAMES if head in args.head}
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        measure_all(args, tunings)


def measure_all(args: argparse.Namespace, tunings: dict[str, Tuning]) -> None:
    """Measures the batches that were asked for and the largest ones, those that need least memory first."""
    tuning = next(iter(tunings.values()))
    base = (random_parameters(tuning),) if tuning.rank else ()
    about = {name: getattr(args, name) for name in ("shape", "length", "lora_rank", "dtype", "param_dtype")}
    about["mesh"] = None if tuning.mesh is None else dict(tuning.mesh.shape)
    about |= {"parameters": decoder.parameter_count(tuning.config), "trained": leaf_count(tuning.trained())}
    records = Records(args.record)

    def add(prepared: Prepared) -> Record:
        head, batch = prepared.tuning.head, prepared.batch_size
        record = records.add({**about, "head": head, "batch": batch}, partial(measure, args, prepared, base))
        say(f"{args.shape}, {head}, batch {batch}: {in_words(record)}")
        return record

    fused = None
    for batch_size in sorted(args.batch):
        for own in tunings.values():
            prepared = prepare(args, own, batch_size)
            fused = prepared if own.head == "jliger" else fused
            if add(prepared)["out_of_memory"]:
                raise DeviceMemoryError(f"batch {batch_size} does not fit into the device's memory; the record says so")
    if "full" in args.largest:
        full = largest(args, tunings["full"], first_guess(args, tunings["full"]))
        # Their largest batch is where the heads are compared.
        if "jliger" in tunings:
            fused = prepare(args, tunings["jliger"], full.batch_size)
            add(fused)
        add(full)
        del full
    if "jliger" in args.largest:
        fused = fused or prepare(args, tunings["jliger"], first_guess(args, tunings["jliger"]))
        if (guess := next_guess(args, fused)) > fused.batch_size:
            add(largest(args, tunings["jliger"], guess))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure_finetune", __doc__)
    add = parser.add_argument
    add("record", type=Path, metavar="FILE", help="the JSON file to write")
    add("--shape", choices=list(SHAPES), required=True, help="of the model")
    heads = decoder.HEAD_NAMES
    add("--head", choices=heads, nargs="+", default=list(heads), help="the last layer and loss (both)")
    add("--batch", type=COUNT, nargs="*", default=[], metavar="N", help="rows per step, for each head")
    add("--largest", choices=heads, nargs="*", default=[], help="then the largest batch of these heads (none)")
    add("--length", type=COUNT, default=512, metavar="N", help="tokens per row (%(default)s)")
    add("--lora-rank", type=COUNT_OR_ZERO, default=0, metavar="R", help="of adapters; 0: train all (%(default)s)")
    add("--mesh", type=mesh_axes, metavar="AXES", help="as in fsdp=2,tensor=1 (default: all devices on fsdp)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--param-dtype", choices=DTYPES, default="bfloat16", help="of the parameters (%(default)s)")
    add("--multiple", type=COUNT, default=4, metavar="N", help="of a device's rows, for the largest (%(default)s)")
    add("--tries", type=COUNT, default=2, metavar="N", help="compilations to find the largest (%(default)s)")
    add("--timed-steps", type=COUNT, default=4, metavar="N", help="steps to time at each batch (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=8.0, metavar="X", help="no more of them after this time (%(default)s)")
    args = parser.parse_args(argv)
    if not args.batch and not args.largest:
        parser.error("--batch or --largest is needed")
    if not set(args.largest) <= set(args.head):
        parser.error("--largest is for heads of --head")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("measure_finetune", run, parse_args(argv))


if __name__ == "__main__":
    main()
