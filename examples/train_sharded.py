"""Trains a Llama-shaped decoder on a mesh of devices, with jliger or with full logits, or measures its steps.

    python examples/train_sharded.py --devices 8 --mesh data=2,fsdp=2,tensor=2
    python examples/train_sharded.py --config llama3-8b --batch 64 128 --benchmark record.json

Parameters, gradients and optimizer state are sharded (FSDP, and `tensor` where a dimension allows); a run goes on
under another mesh. docs/train_sharded.md has the options and says what a run leaves behind.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoints import CheckpointError, Checkpoints
from corpus import SMALLEST_VOCAB, Batches, Corpus, CorpusError, load_corpus
from jax.experimental import multihost_utils
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import DTYPES
from llama import (
    AXES,
    BATCH,
    CONFIGS,
    HEAD_SPEC,
    LlamaConfig,
    Tree,
    flops_per_token,
    gathered,
    hidden_states,
    initial_parameters,
    parameter_count,
    parameters,
)
from reporting import MIB, MetricsFile, Record, write_json
from runs import (
    CHECKPOINTS,
    METRICS,
    SUMMARY,
    TOKENIZER,
    RunError,
    begin_folder,
    check_folder,
    fit_warmup,
    inputs_and_labels,
    interruptible,
    positive,
)
from steps import OUT_OF_MEMORY_EXIT, DeviceMemoryError, compile_step, device_memory, device_memory_errors
from tqdm import tqdm

import jliger
from jliger.bench.report import environment

HEADS = ("jliger", "full")
# Where --batch, --length and --learning-rate are left out.
DEFAULTS = {"tiny": (8, 128, 3e-3), "llama3-1b": (64, 512, 3e-4), "llama3-8b": (64, 512, 3e-4)}
# Dense bfloat16 operations per second of an H100 or H200 (SXM) by NVIDIA's data sheets, in 10¹².
HOPPER_TFLOPS = 989.0


# ---- the step --------------------------------------------------------------------------------------------------


def full_loss(hidden: jax.Array, head: jax.Array, labels: jax.Array, where: jax.Array, count: jax.Array) -> jax.Array:
    """Summed cross entropy over `count`, the usual way: `[B, T, V]` logits in memory."""
    logits = hidden @ gathered(head, HEAD_SPEC, hidden.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.sum(losses, where=where) / count


def jliger_loss(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, where: jax.Array, count: jax.Array, **options: Any
) -> jax.Array:
    """The same through jliger, which follows its inputs' shardings: the logits exist a chunk at a time."""
    head = with_sharding_constraint(head.astype(hidden.dtype), HEAD_SPEC)
    return jliger.fused_linear_cross_entropy(hidden, head, labels, where=where, normalizer=count, **options)


def loss_and_gradients(
    loss_of: Callable[..., jax.Array], params: Tree, tokens: jax.Array, end_of_text: int, parts: int, specs: Tree
) -> tuple[jax.Array, Tree]:
    """Mean loss and its gradients over `[B, T+1]` tokens, computed in `parts` microbatches and summed in float32.

    Each part divides by the token count of the whole batch: means of parts whose counts differ would not average to
    the batch's mean.
    """
    batch = inputs_and_labels(tokens, end_of_text)
    count = jnp.maximum(jnp.sum(batch[2]), 1).astype(jnp.float32)
    of_part = jax.value_and_grad(lambda params, part: loss_of(params, *part, count))
    if parts == 1:
        return of_part(params, batch)

    def split(array: jax.Array) -> jax.Array:
        # A microbatch is every parts-th sequence: each device keeps its own, and none moves.
        return with_sharding_constraint(array.reshape(-1, parts, array.shape[1]).swapaxes(0, 1), P(None, BATCH, None))

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_part(params, part)), None

    zeros = jax.tree.map(lambda leaf, spec: with_sharding_constraint(jnp.zeros_like(leaf), spec), params, specs)
    sums, _ = jax.lax.scan(add, (jnp.float32(0), zeros), jax.tree.map(split, batch))
    return sums


@dataclass(frozen=True)
class Program:
    """The training step and what belongs to it; the state is parameters and optimizer state."""

    step: jax.stages.Traced
    abstract_state: Tree
    initial_state: Callable[[], Tree]
    schedule: optax.Schedule


def build_program(
    args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, batch_size: int, end_of_text: int
) -> Program:
    """Traces the training step under the current mesh; nothing is compiled or run yet."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=args.learning_rate / 10,
        peak_value=args.learning_rate,
        warmup_steps=args.warmup_steps,
        decay_steps=args.steps,
        end_value=args.learning_rate / 10,
    )
    described = parameters(config)
    adamw = optax.adamw(
        schedule,
        b2=0.95,
        weight_decay=args.weight_decay,
        mask=jax.tree.map(lambda leaf: leaf.is_matrix, described),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    specs = jax.tree.map(lambda leaf: leaf.spec, described)

    def create() -> Tree:
        params = initial_parameters(config, jax.random.key(args.seed))
        return {"parameters": params, "optimizer": optimizer.init(params)}

    shapes = jax.eval_shape(create)
    # What the optimizer keeps for a parameter lies where the parameter lies.
    optimizer_specs = optax.tree_map_params(
        optimizer, lambda _, spec: spec, shapes["optimizer"], specs, transform_non_params=lambda _: P()
    )
    shardings = jax.tree.map(partial(NamedSharding, mesh), {"parameters": specs, "optimizer": optimizer_specs})
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    options = {"implementation": args.implementation, "chunk_size": args.chunk_size}
    head_loss = full_loss if args.head == "full" else partial(jliger_loss, **options)

    def loss_of(params: Tree, inputs: jax.Array, labels: jax.Array, where: jax.Array, count: jax.Array) -> jax.Array:
        hidden = hidden_states(config, params, inputs, DTYPES[args.dtype])
        return head_loss(hidden, params["head"], labels, where, count)

    def step(state: Tree, tokens: jax.Array) -> tuple[Tree, jax.Array]:
        params = state["parameters"]
        loss, gradients = loss_and_gradients(loss_of, params, tokens, end_of_text, args.accumulate, specs)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], params)
        return {"parameters": optax.apply_updates(params, updates), "optimizer": optimizer_state}, loss

    tokens = jax.ShapeDtypeStruct((batch_size, args.length + 1), jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))
    # The step's result takes over the memory of the state that it replaces.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    try:
        traced = jitted.trace(abstract_state, tokens)
    # What jliger refuses, it names with the argument and what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error
    # Each device makes its own part: no array is ever whole on one of them.
    return Program(traced, abstract_state, jax.jit(create, out_shardings=shardings), schedule)


def on_devices(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch that every process has, of which each device takes its sequences."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH)), batch, batch.shape)


# ---- figures ---------------------------------------------------------------------------------------------------


def rates(args: argparse.Namespace, config: LlamaConfig, batch_size: int, seconds: float) -> Record:
    """Tokens a second and, where the devices' peak is known, the share of it that the model's operations are."""
    tokens_per_second = batch_size * args.length / seconds
    peak = args.peak_tflops
    if peak is None and any(name in jax.devices()[0].device_kind for name in ("H100", "H200")):
        peak = HOPPER_TFLOPS
    needed = flops_per_token(config, args.length) * tokens_per_second
    return {
        "tokens_per_second": tokens_per_second,
        "model_flop_utilisation": None if peak is None else needed / (peak * 1e12 * jax.device_count()),
    }


def in_words(figures: Record) -> str:
    """Time, speed and memory of a step, in one line."""
    parts = [f"{figures['milliseconds']:.1f} ms a step", f"{figures['tokens_per_second']:,.0f} tokens/s"]
    if figures["model_flop_utilisation"] is not None:
        parts.append(f"{100 * figures['model_flop_utilisation']:.1f} % model-flop utilisation")
    if figures["peak_bytes"] is not None:
        parts.append(f"peak memory {figures['peak_bytes'] / MIB:,.0f} MiB a device")
    memory = figures["memory_bytes"]
    parts.append(f"XLA's account {memory['total'] / MIB:,.0f} MiB a device, {memory['temporary'] / MIB:,.0f} temporary")
    return ", ".join(parts)


# ---- training --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus, settings: Record) -> None:
    """Trains from the latest checkpoint, or from the seed, up to `--steps` or `--stop-at`."""
    (batch_size,) = args.batch
    batches = Batches(corpus.train, batch_size, args.length, args.seed)
    program = build_program(args, config, mesh, batch_size, corpus.end_of_text)
    check_folder(args.out, settings, resume=args.resume, overwrite=args.overwrite)
    # No process begins the folder before every process has looked at it.
    multihost_utils.sync_global_devices("folder checked")
    is_first = jax.process_index() == 0
    if is_first and not args.resume:
        begin_folder(args.out, settings, (METRICS, CHECKPOINTS, TOKENIZER, SUMMARY))
        corpus.tokenizer.save(str(args.out / TOKENIZER))
    multihost_utils.sync_global_devices("folder begun")
    last: int = args.steps if args.stop_at is None else args.stop_at
    with Checkpoints(args.out / CHECKPOINTS, args.keep_checkpoints) as checkpoints, device_memory_errors():
        restored = checkpoints.restore_latest(program.abstract_state)
        if restored is None:
            start, state = 0, program.initial_state()
            if args.resume:
                say("begins with step 1, as there is no checkpoint")
        else:
            start, state, batches.position = restored
            say(f"goes on from the checkpoint of step {start}")
        if start >= last:
            say(f"the run in {args.out} is at step {start} already")
            return
        compiled = compile_step(program.step.lower())
        metrics = MetricsFile(args.out / METRICS) if is_first else None
        bar = tqdm(total=last, initial=start, desc=args.head, unit="step", disable=args.no_progress or not is_first)
        if metrics is not None:
            metrics.write(
                "compiled",
                start,
                seconds=compiled.seconds,
                memory=compiled.memory,
                rows_by=compiled.rows_by,
                mesh=dict(mesh.shape),
                accumulate=args.accumulate,
            )
        times = []
        loss = math.nan
        for step in range(start + 1, last + 1):
            began = time.perf_counter()
            state, value = compiled.step(state, on_devices(next(batches), mesh))
            loss = float(value)
            times.append(time.perf_counter() - began)
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss is {loss} at step {step}: try a lower --learning-rate. "
                    f"The steps before are in {args.out}"
                )
            speed = rates(args, config, batch_size, times[-1])
            if metrics is not None:
                metrics.write(
                    "train",
                    step,
                    loss=loss,
                    learning_rate=float(program.schedule(step - 1)),
                    tokens=batch_size * args.length,
                    seconds=times[-1],
                    **speed,
                )
            bar.set_postfix(loss=f"{loss:.4f}", tokens_s=f"{speed['tokens_per_second']:,.0f}", refresh=False)
            bar.update()
            if step % args.checkpoint_every == 0 or step == last:
                checkpoints.save(step, state, batches.position)
        bar.close()
    # The median leaves out the steps that the first calls or another process slowed down.
    seconds = statistics.median(times)
    summary = {
        "steps": last,
        "train_loss": loss,
        "milliseconds": 1e3 * seconds,
        **rates(args, config, batch_size, seconds),
        "peak_bytes": device_memory("peak_bytes_in_use"),
        "memory_bytes": compiled.memory,
        "rows_by": compiled.rows_by,
        "mesh": dict(mesh.shape),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if is_first:
        write_json(args.out / SUMMARY, {**settings, **summary})
    say(f"step {last}: loss {loss:.6f}; median of {len(times)} steps: {in_words(summary)}")
    if last < args.steps:
        say(f"Stopped at step {last} of {args.steps}; --resume goes on.")
    say(f"metrics, checkpoints and {SUMMARY} are in {args.out}")


# ---- measuring -------------------------------------------------------------------------------------------------


def largest_batch(measured: Sequence[tuple[int, int]], limit: int, multiple: int) -> int | None:
    """The batch whose memory reaches `limit` on the line through the last two `(batch, bytes)`, or None."""
    if len(measured) < 2:
        return None
    (first, less), (second, more) = measured[-2:]
    if more <= less:
        return None
    batch = int(second + (limit - more) * (second - first) / (more - less)) // multiple * multiple
    return batch if batch > second else None


def measure(
    args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus, batch_size: int, state: Tree
) -> tuple[Record, Tree]:
    """One batch size's record, and the state after its steps."""
    program = build_program(args, config, mesh, batch_size, corpus.end_of_text)
    compiled = compile_step(program.step.lower())
    limit = device_memory("bytes_limit")
    if limit is not None and compiled.memory["total"] > limit:
        raise DeviceMemoryError(f"the compiled step needs {compiled.memory['total']} bytes of {limit}")
    batches = Batches(corpus.train, batch_size, args.length, args.seed)
    times: list[float] = []
    with device_memory_errors():
        while len(times) < args.warm_up + args.timed_steps:
            tokens = jax.block_until_ready(on_devices(next(batches), mesh))
            began = time.perf_counter()
            state, loss = compiled.step(state, tokens)
            jax.block_until_ready((state, loss))
            times.append(time.perf_counter() - began)
            if sum(times[args.warm_up :]) > args.timed_seconds:
                break
    timed = times[args.warm_up :]
    seconds = statistics.median(timed)
    record = {
        "out_of_memory": False,
        "milliseconds": 1e3 * seconds,
        "milliseconds_of_steps": [1e3 * each for each in timed],
        **rates(args, config, batch_size, seconds),
        "peak_bytes": device_memory("peak_bytes_in_use"),
        "memory_bytes": compiled.memory,
        "compile_seconds": compiled.seconds,
        "rows_by": compiled.rows_by,
        "loss": float(loss),
    }
    return record, state


def benchmark(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh, corpus: Corpus) -> None:
    """Measures the batch sizes in ascending order, and writes the records after each.

    A device's peak memory can't be reset, but a larger batch's is larger: in this order each peak is its own batch's.
    """
    common = {
        "config": args.config,
        "mesh": dict(mesh.shape),
        "head": args.head,
        "length": args.length,
        "accumulate": args.accumulate,
        "dtype": args.dtype,
    }
    about = {
        **environment(),
        "command": " ".join(["python", "examples/train_sharded.py", *args.command]),
        "parameters": parameter_count(config),
        "flops_per_token": flops_per_token(config, args.length),
        "bytes_limit": device_memory("bytes_limit"),
    }
    records: list[Record] = []
    state: Tree | None = None

    def try_batch(batch_size: int) -> Record:
        nonlocal state
        try:
            if state is None:
                program = build_program(args, config, mesh, batch_size, corpus.end_of_text)
                with device_memory_errors():
                    state = jax.block_until_ready(program.initial_state())
            record, state = measure(args, config, mesh, corpus, batch_size, state)
        except DeviceMemoryError as error:
            record = {"out_of_memory": True, "reason": str(error)}
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            state = None
        record = {**common, "batch": batch_size, **record}
        records.append(record)
        if jax.process_index() == 0:
            args.benchmark.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.benchmark, {"environment": about, "records": records})
        words = f"out of memory ({record['reason']})" if record["out_of_memory"] else in_words(record)
        say(f"{args.head}, batch {batch_size}: {words}")
        return record

    for batch_size in sorted(args.batch):
        if try_batch(batch_size)["out_of_memory"]:
            break
    limit = about["bytes_limit"]
    if args.largest and limit is not None and not records[-1]["out_of_memory"]:
        multiple = 4 * args.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
        guess = largest_batch(
            [(record["batch"], record["peak_bytes"]) for record in records], int(0.99 * limit), multiple
        )
        # The line is a guess: where it was too bold, a little less is tried.
        for batch_size in range(guess, records[-1]["batch"], -multiple)[:4] if guess else ():
            if not try_batch(batch_size)["out_of_memory"]:
                break
    say(f"records are in {args.benchmark}")
    refused = [record["batch"] for record in records if record["out_of_memory"] and record["batch"] in args.batch]
    if refused:
        raise DeviceMemoryError(f"batch {refused[0]} doesn't fit into a device's memory; the record says so")


# ---- the command line ------------------------------------------------------------------------------------------


def mesh_axes(text: str) -> dict[str, int]:
    """An argparse type: `data=2,fsdp=4` to sizes, 1 for an axis that isn't named."""
    sizes = dict.fromkeys(AXES, 1)
    named = set()
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"{text!r} has an axis {name!r}; the axes are {', '.join(AXES)}")
        if name in named:
            raise argparse.ArgumentTypeError(f"{text!r} has the axis {name} twice")
        if not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: axis {name} needs a whole number above 0, as in {name}=2")
        named.add(name)
        sizes[name] = int(size)
    return sizes


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="train_sharded", description=(__doc__ or "").partition("\n")[0])
    count, count_or_zero = positive(int), positive(int, zero=True)
    number, number_or_zero = positive(float), positive(float, zero=True)

    group = parser.add_argument_group("devices")
    add = group.add_argument
    add("--mesh", type=mesh_axes, metavar="AXES", help="as in data=2,fsdp=2,tensor=1 (default: all devices on fsdp)")
    add("--devices", type=count, metavar="N", help="simulate N devices (of each process) on this machine's CPU")
    add("--coordinator", metavar="HOST:PORT", help="of several processes: where the first one listens")
    add("--num-processes", type=count, metavar="N", help="how many there are")
    add("--process-id", type=count_or_zero, metavar="I", help="which one this is, from 0")

    group = parser.add_argument_group("corpus")
    add = group.add_argument
    add("--corpus", type=Path, nargs="+", metavar="PATH", help="files and folders of text (default: Python's library)")
    add("--max-bytes", type=count, default=16_000_000, metavar="N", help="read this much text at most (%(default)s)")
    add("--vocab-size", type=count, default=32768, metavar="N", help="tokens of the byte-level BPE (%(default)s)")
    add("--heldout-fraction", type=number, default=0.05, metavar="X", help="share of the text held out (%(default)s)")
    add("--cache-dir", type=Path, default=Path("runs/cache"), help="keeps tokenizers and tokens (%(default)s)")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--config", choices=list(CONFIGS), default="tiny", help="sizes of the model (%(default)s)")
    add("--dtype", choices=list(DTYPES), help="of the arithmetic (default: bfloat16, on a CPU float32)")
    add("--head", choices=HEADS, default="jliger", help="last layer and loss to train with (%(default)s)")
    add("--implementation", choices=["triton", "xla"], help="jliger's backend (default: what fits the device)")
    add("--chunk-size", type=count, metavar="N", help="tokens per chunk of jliger (default: what fits the device)")

    defaults = ", ".join(f"{name}: {{}}" for name in DEFAULTS)
    batches, lengths, learning_rates = (defaults.format(*(each[i] for each in DEFAULTS.values())) for i in range(3))
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--steps", type=count, default=30, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch", type=count, nargs="+", metavar="N", help=f"sequences per step, over all devices ({batches})")
    add("--length", type=count, metavar="N", help=f"tokens per sequence ({lengths})")
    add("--accumulate", type=count, default=1, metavar="K", help="microbatches per step (%(default)s)")
    add("--learning-rate", type=number, metavar="X", help=f"the highest, after warmup ({learning_rates})")
    add("--warmup-steps", type=count_or_zero, metavar="N", help="steps up to it (a third of the steps, at most 10)")
    add("--weight-decay", type=number_or_zero, default=0.1, metavar="X", help="of AdamW (%(default)s)")
    add("--seed", type=count_or_zero, default=0, metavar="N", help="of parameters and data order (%(default)s)")

    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs/train_sharded"), help="the run's folder (%(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the run in --out, under any mesh")
    either.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    add = group.add_argument
    add("--stop-at", type=count, metavar="STEP", help="stop here, with the schedule of all --steps")
    add("--checkpoint-every", type=count, default=10, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--keep-checkpoints", type=count, default=2, metavar="N", help="how many, the latest (%(default)s)")
    add("--peak-tflops", type=number, metavar="X", help=f"of a device (default: {HOPPER_TFLOPS:.0f} on H100 and H200)")
    add("--no-progress", action="store_true", help="draw no progress bar")

    group = parser.add_argument_group("measuring")
    add = group.add_argument
    add("--benchmark", type=Path, metavar="FILE", help="measure steps of each --batch into this file; keep no run")
    add("--largest", action="store_true", help="then the largest batch that fits, guessed from the last two")
    add("--warm-up", type=count, default=1, metavar="N", help="steps before the timed ones (%(default)s)")
    add("--timed-steps", type=count, default=5, metavar="N", help="steps to time at each batch (%(default)s)")
    add(
        "--timed-seconds",
        type=number,
        default=10.0,
        metavar="X",
        help="but no more of them after this time (%(default)s)",
    )

    args = parser.parse_args(argv)
    args.command = list(sys.argv[1:] if argv is None else argv)
    batch, args.length, args.learning_rate = (
        default if given is None else given
        for given, default in zip((args.batch, args.length, args.learning_rate), DEFAULTS[args.config], strict=True)
    )
    args.batch = [batch] if isinstance(batch, int) else batch
    if args.vocab_size < SMALLEST_VOCAB:
        parser.error(f"--vocab-size {args.vocab_size}: a byte-level BPE needs {SMALLEST_VOCAB} or more")
    if args.config != "tiny" and args.vocab_size > CONFIGS[args.config].vocab_size:
        parser.error(f"--vocab-size {args.vocab_size}: {args.config} has {CONFIGS[args.config].vocab_size}")
    if args.heldout_fraction >= 1:
        parser.error(f"--heldout-fraction {args.heldout_fraction}: must be below 1")
    fit_warmup(parser, args, "steps", share=3)
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(f"--stop-at {args.stop_at} is beyond --steps {args.steps}")
    if args.seed >= 2**31:
        parser.error(f"--seed {args.seed}: must be below 2**31")
    if len(args.batch) > 1 and args.benchmark is None:
        parser.error("several --batch sizes are for --benchmark; a run has one")
    if args.largest and (args.benchmark is None or len(args.batch) < 2):
        parser.error("--largest goes with --benchmark and two --batch sizes or more, to guess from")
    processes = (args.coordinator, args.num_processes, args.process_id)
    if any(given is not None for given in processes) and None in processes:
        parser.error("--coordinator, --num-processes and --process-id go together")
    if args.process_id is not None and args.process_id >= args.num_processes:
        parser.error(f"--process-id {args.process_id} must be below --num-processes {args.num_processes}")
    return args


def say(text: str) -> None:
    """Prints, from the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def find_devices(args: argparse.Namespace) -> None:
    """Simulated devices and other processes, as the command line asks; JAX looks for devices after that."""
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
    """The mesh asked for, of all devices."""
    devices = jax.device_count()
    if sizes is None:
        sizes = {"data": 1, "fsdp": devices, "tensor": 1}
    if math.prod(sizes.values()) != devices:
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise RunError(
            f"--mesh {asked} has {math.prod(sizes.values())} devices and JAX sees {devices}: choose axes whose "
            f"product is {devices}, or simulate devices on a CPU with --devices"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_sizes(args: argparse.Namespace, config: LlamaConfig, mesh: Mesh) -> None:
    """Refuses sizes that the mesh's axes don't divide."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    for batch_size in args.batch:
        if batch_size % (args.accumulate * data * fsdp):
            raise RunError(
                f"--batch {batch_size} must be a multiple of {args.accumulate * data * fsdp}: --accumulate "
                f"{args.accumulate} times data={data} times fsdp={fsdp}"
            )
    for name in ("heads", "kv_heads", "mlp_size", "vocab_size"):
        if getattr(config, name) % tensor:
            raise RunError(f"--mesh: tensor={tensor} doesn't divide {name} {getattr(config, name)} of {args.config}")
    if config.hidden_size % (fsdp * tensor):
        raise RunError(
            f"--mesh: fsdp={fsdp} times tensor={tensor} doesn't divide hidden_size {config.hidden_size} of "
            f"{args.config}"
        )


def run(args: argparse.Namespace) -> None:
    """Devices, corpus, then training or measuring."""
    find_devices(args)
    is_cpu = jax.default_backend() == "cpu"
    if args.dtype is None:
        args.dtype = "float32" if is_cpu else "bfloat16"
    if args.implementation == "triton" and is_cpu:
        raise RunError("--implementation triton needs a GPU; JAX's default backend here is cpu")
    if args.largest and (device_memory("bytes_limit") is None or jax.process_count() > 1):
        raise RunError("--largest needs devices that say how much memory they have, all of one process")
    config = CONFIGS[args.config]
    if args.config == "tiny":
        config = replace(config, vocab_size=args.vocab_size)
    mesh = make_mesh(args.mesh)
    check_sizes(args, config, mesh)
    began = time.perf_counter()
    corpus = load_corpus(
        args.corpus,
        vocab_size=args.vocab_size,
        max_bytes=args.max_bytes,
        heldout_fraction=args.heldout_fraction,
        cache_dir=args.cache_dir,
    )
    multihost_utils.assert_equal(
        np.frombuffer(corpus.digest.encode(), np.uint8),
        "the processes read different texts: give all the same --corpus",
    )
    device = jax.devices()[0]
    say(
        f"corpus: {corpus.documents} files, {corpus.size / 1e6:.1f} MB, {len(corpus.train)} tokens to train on, "
        f"vocabulary {corpus.vocab_size} ({time.perf_counter() - began:.1f} s)"
    )
    if corpus.vocab_size < config.vocab_size:
        say(
            f"the model's vocabulary is {config.vocab_size}: the tokenizer's {corpus.vocab_size} tokens are its first, "
            "the others occur in no text"
        )
    say(
        f"model: {args.config}, {parameter_count(config):,} parameters, head {args.head}, {args.dtype}; mesh "
        f"{', '.join(f'{name}={size}' for name, size in mesh.shape.items())} of {device.platform} "
        f"({device.device_kind}), {jax.process_count()} process(es), JAX {jax.__version__}"
    )
    # What shapes the curve; the mesh and the parts of a batch do to rounding alone, and may change.
    names = ("config", "dtype", "head", "steps", "length", "learning_rate", "warmup_steps", "weight_decay", "seed")
    settings = {
        "corpus": corpus.digest,
        **asdict(config),
        **{name: getattr(args, name) for name in names},
        "batch": args.batch[0],
    }
    # GPUs would otherwise round float32 products to fewer bits.
    precision = "highest" if args.dtype == "float32" else "default"
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        if args.benchmark is None:
            train(args, config, mesh, corpus, settings)
        else:
            benchmark(args, config, mesh, corpus)


@interruptible("train_sharded", "--resume goes on from the latest checkpoint, where there is one")
def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a user's mistake ends in one line, not in a traceback."""
    args = parse_args(argv)
    try:
        run(args)
    except DeviceMemoryError as error:
        print(f"train_sharded: out of memory: {error}. Try a smaller --batch or more --accumulate", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY_EXIT)
    except (RunError, CheckpointError, CorpusError, OSError) as error:
        sys.exit(f"train_sharded: error: {error}")


if __name__ == "__main__":
    main()
