"""Trains a Llama-shaped decoder on a mesh of devices, with jliger or with full logits, or measures its steps.

    python examples/train_sharded.py --devices 8 --mesh data=2,fsdp=2,tensor=2
    python examples/train_sharded.py --config llama3-8b --batch 64 128 --benchmark record.json

Parameters, gradients and optimizer state are sharded (FSDP, and `tensor` if a dimension allows); a run can continue
under another mesh. docs/train_sharded.md has the options and says what a run leaves behind.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import options
import reporting
import runs
from corpus import Batches, Corpus, windows
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import language_model_loss
from llama import AXES, BATCH, LlamaConfig, flops_per_token, parameter_count, parameters
from measuring import HOPPER_TFLOPS, Records, in_words, measured_steps, rates
from options import COUNT, COUNT_OR_ZERO, DTYPES, NUMBER, NUMBER_OR_ZERO
from runs import DeviceMemoryError, Record, RunError, say
from training import Program, Training, TrainingConfig, build_program, device_memory, state_shardings, train

HEADS = ("jliger", "full")
CONFIGS = {
    # Trains in seconds on a CPU.
    "tiny": LlamaConfig(32768, 128, 384, 4, 8, 4),
    # Llama 3.2 1B with a last layer of its own, where the original's is the embedding.
    "llama3-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8),
    "llama3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8),
}
# The defaults of --batch, --length and --learning-rate.
DEFAULTS = {"tiny": (8, 128, 3e-3), "llama3-1b": (64, 512, 3e-4), "llama3-8b": (64, 512, 3e-4)}


def program_of(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, batch_size: int, end_of_text: int) -> Program:
    """Traces the training step under the current mesh; nothing is compiled or run."""
    learning = replace(TrainingConfig.of(args), batch_size=batch_size)
    optimizer = learning.optimizer(config)
    shardings = state_shardings(optimizer, jax.tree.map(lambda leaf: leaf.spec, parameters(config)))
    loss_fn = language_model_loss(options.heads_of(args)[0], config, end_of_text)
    tokens = jax.ShapeDtypeStruct((batch_size, args.length + 1), np.int32, sharding=NamedSharding(mesh, P(BATCH)))
    create = partial(learning.initial_parameters, config)
    return build_program(loss_fn, create, optimizer, tokens, microbatches=args.accumulate, shardings=shardings)


def on_devices(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A batch that every process has; each device takes its sequences."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH)), batch, batch.shape)


def train_run(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus) -> None:
    """Trains from the latest checkpoint, or from the seed, up to `--steps` or `--stop-at`."""
    learning = TrainingConfig.of(args)
    rate = partial(rates, config, (learning.batch_size, args.length), peak_tflops=args.peak_tflops)
    batches = Batches(windows(corpus.train, args.length), learning.batch_size, args.seed)
    about = {"mesh": dict(mesh.shape), "accumulate": args.accumulate}
    training = Training(
        args.head,
        args.out,
        program_of(args, config, mesh, learning.batch_size, corpus.end_of_text),
        lambda step, params: on_devices(mesh, batches[step - 1]),
        figures=lambda results, batch, seconds: rate(seconds),
        about=about,
    )
    # What shapes the curve. The mesh and the microbatches only change the rounding, and may change.
    settings = {"corpus": corpus.digest, "head": args.head, **asdict(config), **asdict(learning)}
    runs.open_folder(args, settings, (runs.METRICS, runs.CHECKPOINTS), corpus.tokenizer)
    last: int = args.steps if args.stop_at is None else args.stop_at
    train([training], args, last)
    if training.start >= last:
        say(f"the run in {args.out} is at step {training.start} already")
    elif jax.process_index() == 0:
        figures = reporting.figures_of(runs.read_metrics(args.out))
        seconds = figures["step_seconds"]
        figures |= {"milliseconds": 1e3 * seconds, "peak_bytes": device_memory("peak_bytes_in_use"), **rate(seconds)}
        about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        runs.write_json(args.out / runs.SUMMARY, {**settings, **figures, **about})
        say(f"step {last}: loss {figures['train_loss']:.6f}; in the median {in_words(figures)}")
        if last < args.steps:
            say(f"Stopped at step {last} of {args.steps}; --resume continues.")
        say(f"metrics, checkpoints and {runs.SUMMARY} are in {args.out}")


def largest_batch(measurements: Sequence[tuple[int, int]], limit: int, multiple: int) -> int | None:
    """The batch whose memory reaches `limit` on the line through the last two `(batch, bytes)`, or None."""
    if len(measurements) < 2:
        return None
    (first, less), (second, more) = measurements[-2:]
    if more <= less:
        return None
    batch = int(second + (limit - more) * (second - first) / (more - less)) // multiple * multiple
    return batch if batch > second else None


def measure(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus, batch_size: int) -> Record:
    program = program_of(args, config, mesh, batch_size, corpus.end_of_text)
    tokens = on_devices(mesh, Batches(windows(corpus.train, args.length), batch_size, args.seed)[0])
    return measured_steps(program, tokens, config, (batch_size, args.length), args)


def benchmark(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus) -> None:
    """Measures the batch sizes in ascending order, and writes the records after each."""
    about = {name: getattr(args, name) for name in ("config", "head", "length", "accumulate", "dtype")}
    about["mesh"] = dict(mesh.shape)
    records = Records(
        args.benchmark,
        command=" ".join(["python", "examples/train_sharded.py", *args.command]),
        parameters=parameter_count(config),
        flops_per_token=flops_per_token(config, args.length),
    )

    def try_batch(batch_size: int) -> Record:
        record = records.add({**about, "batch": batch_size}, partial(measure, args, config, mesh, corpus, batch_size))
        say(f"{args.head}, batch {batch_size}: {in_words(record)}")
        return record

    for batch_size in sorted(args.batch):
        if try_batch(batch_size)["out_of_memory"]:
            raise DeviceMemoryError(f"batch {batch_size} does not fit into a device's memory; the record says so")
    if args.largest:
        multiple = 4 * args.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
        measurements = [(record["batch"], record["peak_bytes"]) for record in records.records]
        guess = largest_batch(measurements, int(0.99 * device_memory("bytes_limit")), multiple)
        # The line is a guess: if that batch does not fit, slightly smaller ones are tried.
        for batch_size in range(guess, measurements[-1][0], -multiple)[:4] if guess else ():
            if not try_batch(batch_size)["out_of_memory"]:
                break
    say(f"records are in {args.benchmark}")


def mesh_axes(text: str) -> dict[str, int]:
    """An argparse type: `data=2,fsdp=4` to sizes, with 1 for an axis that is not named."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"{text!r} has an axis {name!r}; the axes are {', '.join(AXES)}")
        if name in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} has the axis {name} twice")
        if not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: axis {name} needs a whole number above 0, as in {name}=2")
        sizes[name] = int(size)
    return dict.fromkeys(AXES, 1) | sizes


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("train_sharded", __doc__)
    add = parser.add_argument_group("devices").add_argument
    add("--mesh", type=mesh_axes, metavar="AXES", help="as in data=2,fsdp=2,tensor=1 (default: all devices on fsdp)")
    add("--devices", type=COUNT, metavar="N", help="simulate N devices (of each process) on this machine's CPU")
    add("--coordinator", metavar="HOST:PORT", help="of several processes: where the first one listens")
    add("--num-processes", type=COUNT, metavar="N", help="how many there are")
    add("--process-id", type=COUNT_OR_ZERO, metavar="I", help="which one this is, from 0")
    options.add_corpus_options(parser)
    add = parser.add_argument_group("model").add_argument
    add("--config", choices=list(CONFIGS), default="tiny", help="sizes of the model (%(default)s)")
    add("--dtype", choices=DTYPES, help="of the arithmetic (default: bfloat16, on a CPU float32)")

    given = [", ".join(f"{name}: {each[i]}" for name, each in DEFAULTS.items()) for i in range(3)]
    add = parser.add_argument_group("training").add_argument
    options.add_head_options(add, choices=HEADS)
    add("--steps", type=COUNT, default=30, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch", type=COUNT, nargs="+", metavar="N", help=f"sequences per step, over all devices ({given[0]})")
    add("--length", type=COUNT, metavar="N", help=f"tokens per sequence ({given[1]})")
    add("--accumulate", type=COUNT, default=1, metavar="K", help="microbatches per step (%(default)s)")
    add("--learning-rate", type=NUMBER, metavar="X", help=f"the highest, after warmup ({given[2]})")
    add("--warmup-steps", type=COUNT_OR_ZERO, metavar="N", help="(default: a third of the steps, at most 10)")
    add("--weight-decay", type=NUMBER_OR_ZERO, default=0.1, metavar="X", help="of AdamW (%(default)s)")

    add = options.add_run_options(parser, "runs/train_sharded", checkpoint_every=10)
    add("--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps")
    add("--peak-tflops", type=NUMBER, metavar="X", help=f"of a device (default: {HOPPER_TFLOPS:.0f} on H100 and H200)")

    add = parser.add_argument_group("measuring").add_argument
    add("--benchmark", type=Path, metavar="FILE", help="measure steps of each --batch into this file; keep no run")
    add("--largest", action="store_true", help="then the largest batch that fits, guessed from the last two")
    add("--timed-steps", type=COUNT, default=5, metavar="N", help="steps to time at each batch (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=10.0, metavar="X", help="no more of them after this time (%(default)s)")

    args = parser.parse_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    batch, length, learning_rate = DEFAULTS[args.config]
    args.batch, args.length = args.batch or [batch], args.length or length
    args.batch_size, args.learning_rate = args.batch[0], args.learning_rate or learning_rate
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.config != "tiny" and args.vocab_size > CONFIGS[args.config].vocab_size:
        parser.error(f"--vocab-size {args.vocab_size}: {args.config} has {CONFIGS[args.config].vocab_size}")
    options.check(parser, args, share=3)
    if len(args.batch) > 1 and args.benchmark is None:
        parser.error("several --batch sizes are for --benchmark; a run has one")
    if args.largest and (args.benchmark is None or len(args.batch) < 2):
        parser.error("--largest goes with --benchmark and two --batch sizes or more, to guess from")
    processes = (args.coordinator, args.num_processes, args.process_id)
    if any(given is not None for given in processes) and None in processes:
        parser.error("--coordinator, --num-processes and --process-id go together")
    if args.process_id is not None and args.process_id >= args.num_processes:
        parser.error(f"--process-id {args.process_id} must be below --num-processes {args.num_processes}")


def find_devices(args: argparse.Namespace) -> None:
    """Simulates devices and connects processes, as the command line asks; only then JAX may look for devices."""
    try:
        if args.devices is not None:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", args.devices)
        if args.coordinator is not None:
            jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        jax.devices()
    except RuntimeError as error:
        raise RunError(f"no devices as asked for: {error}") from error


def make_mesh(sizes: dict[str, int] | None) -> Mesh:
    sizes = sizes or {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    if (asked := math.prod(sizes.values())) != (devices := jax.device_count()):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        what_to_do = f"choose axes whose product is {devices}, or simulate devices on a CPU with --devices"
        raise RunError(f"--mesh {text} has {asked} devices and JAX sees {devices}: {what_to_do}")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(config: Any, sizes: Mapping[str, int], model: str) -> None:
    """Refuses a mesh whose axes do not divide the sizes of the model that they share."""
    tensor = sizes["tensor"]
    divisors = dict.fromkeys(("heads", "kv_heads", "mlp_size", "vocab_size"), tensor)
    for name, divisor in {**divisors, "hidden_size": sizes["fsdp"] * tensor}.items():
        if getattr(config, name) % divisor:
            raise RunError(f"--mesh: {divisor} devices can't share {name} {getattr(config, name)} of {model}")


def check_sizes(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh) -> None:
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    share = args.accumulate * data * fsdp
    for batch_size in args.batch:
        if batch_size % share:
            product = f"--accumulate {args.accumulate} times data={data} times fsdp={fsdp}"
            raise RunError(f"--batch {batch_size} must be a multiple of {share}: {product}")
    check_model(config, mesh.shape, args.config)


def run(args: argparse.Namespace) -> None:
    find_devices(args)
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if args.largest and (device_memory("bytes_limit") is None or jax.process_count() > 1):
        raise RunError("--largest needs devices that say how much memory they have, all of one process")
    vocab_size = args.vocab_size if args.config == "tiny" else CONFIGS[args.config].vocab_size
    config = replace(CONFIGS[args.config], dtype=args.dtype, vocab_size=vocab_size)
    mesh = make_mesh(args.mesh)
    check_sizes(args, config, mesh)
    corpus = options.corpus_of(args)
    multihost_utils.assert_equal(
        np.frombuffer(corpus.digest.encode(), np.uint8),
        "the processes read different texts: give all the same --corpus",
    )
    say(
        f"model: {args.config}, {parameter_count(config):,} parameters, head {args.head}, {args.dtype}; mesh "
        f"{', '.join(f'{name}={size}' for name, size in mesh.shape.items())}, {jax.process_count()} process(es)"
    )
    # GPUs would otherwise round float32 operands of products to fewer bits.
    precision = "highest" if args.dtype == "float32" else "default"
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        (train_run if args.benchmark is None else benchmark)(args, config, mesh, corpus)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("train_sharded", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
