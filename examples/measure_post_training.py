"""Measures a training step of ORPO, DPO or GRPO on a Llama-shaped decoder with one head: time and memory.

    python examples/measure_post_training.py --loss grpo --head jliger --config llama3.2-1b --out record.json

Weights and tokens are random, and so are the log-probabilities that the losses are given. `sweep_post_training.py` runs
this program, a process for each loss and head: a device's peak memory can't be reset.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import optax
from accumulation_memory import measured
from grpo import PolicyConfig, policy_loss
from language_model import DTYPES
from llama import LlamaConfig
from post_training import Head, Tree
from preference import BETA, pair_loss
from reporting import Record, write_json
from runs import RunError, interruptible, positive
from steps import OUT_OF_MEMORY_EXIT, DeviceMemoryError, compile_step, device_memory, device_memory_errors
from train_lm import HEADS
from train_sharded import in_words, rates

from jliger import LinearLogprobs
from jliger.bench.report import environment

LOSSES = (*BETA, "grpo")
# Learns nothing from random tokens, and stays finite.
LEARNING_RATE = 1e-5
GRPO = PolicyConfig(beta=0.04)


def loss_of(loss: str, found: LinearLogprobs, where: jax.Array, batch: Tree) -> tuple[jax.Array, Any]:
    """Loss and metrics, of log-probabilities `[B, T]`; a pair's chosen sequence is in the first half."""
    if loss == "grpo":
        return policy_loss(GRPO, found, where, batch)
    return pair_loss(loss, found.logprobs, where, BETA[loss], batch.get("reference"))


def random_batch(loss: str, config: LlamaConfig, sequences: int, length: int, key: jax.Array) -> Tree:
    """Tokens `[B, T+1]`, and what the loss needs beside them, near what a model of random weights would give."""
    keys = jax.random.split(key, 4)
    guess = -math.log(config.vocab_size)

    def logprobs(key: jax.Array) -> jax.Array:
        return guess + 0.1 * jax.random.normal(key, (sequences, length))

    batch = {"tokens": jax.random.randint(keys[0], (sequences, length + 1), 0, config.vocab_size)}
    if loss == "dpo":
        batch["reference"] = logprobs(keys[1]).sum(axis=1)
    if loss == "grpo":
        batch["advantages"] = jax.random.normal(keys[3], (sequences,))
        batch |= {"old": logprobs(keys[1]), "reference": logprobs(keys[2])}
    return batch


def build_step(args: argparse.Namespace, config: LlamaConfig) -> tuple[jax.stages.Traced, Callable[[], Any]]:
    """The step, traced from shapes, and what makes its first arguments, state and batch."""
    head = Head(args.head, args.implementation, args.chunk_size)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.95))

    def create() -> tuple[Tree, Tree]:
        # A generator that is quick to compile and to run.
        keys = jax.random.split(jax.random.key(args.seed, impl="rbg"))
        params = decoder.initial_parameters(config, keys[0], DTYPES[args.parameters])
        batch = random_batch(args.loss, config, args.sequences, args.length, keys[1])
        return {"parameters": params, "optimizer": optimizer.init(params)}, batch

    def step(state: Tree, batch: Tree) -> tuple[Tree, tuple[jax.Array, Any]]:
        inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        where = jnp.broadcast_to(jnp.arange(1, args.length + 1) >= args.prompt_length, labels.shape)

        def of_parameters(params: Tree) -> tuple[jax.Array, Any]:
            hidden = decoder.hidden_states(config, params, inputs, DTYPES[args.dtype])
            found = head.logprobs(hidden, params["embedding"], labels, where=where, kernel_layout="vh")
            return loss_of(args.loss, found, where, batch)

        params = state["parameters"]
        found, gradients = jax.value_and_grad(of_parameters, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], params)
        return {"parameters": optax.apply_updates(params, updates), "optimizer": optimizer_state}, found

    created = jax.jit(create)
    try:
        return jax.jit(step, donate_argnums=0).trace(*jax.eval_shape(created)), created
    # What jliger refuses, it names with the argument and what to do instead.
    except (ValueError, NotImplementedError) as error:
        raise RunError(str(error)) from error


def measure(
    args: argparse.Namespace, config: LlamaConfig, lowered: jax.stages.Lowered, create: Callable[[], Any]
) -> Record:
    """Compiles the step and runs it a few times."""
    compiled = compile_step(lowered)
    with device_memory_errors():
        state, batch = jax.block_until_ready(create())
    losses = []

    def run() -> Any:
        nonlocal state
        state, (loss, _) = compiled.step(state, batch)
        losses.append(loss)
        return state, loss

    found = measured(args, compiled.step, run)
    speed = rates(args, config, args.sequences, found["milliseconds"] / 1e3)
    about = {
        "compile_seconds": compiled.seconds,
        "rows_by": compiled.rows_by,
        "losses": [float(each) for each in losses],
    }
    return {**found, **speed, **about}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="measure_post_training", description=(__doc__ or "").partition("\n")[0])
    count, count_or_zero, number = positive(int), positive(int, zero=True), positive(float)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the record's file")
    add("--loss", choices=LOSSES, required=True, help="what the step minimises")
    add("--head", choices=HEADS, required=True, help="how log-probabilities are computed")
    add("--config", choices=list(decoder.CONFIGS), default="tiny", help="sizes of the model (%(default)s)")
    add("--sequences", type=count, default=32, metavar="N", help="a step; two are a pair (%(default)s)")
    add("--length", type=count, default=2048, metavar="N", help="tokens a sequence (%(default)s)")
    add(
        "--prompt-length",
        type=count_or_zero,
        default=0,
        metavar="N",
        help="of which this many don't count (%(default)s)",
    )
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--parameters", choices=list(DTYPES), default="float32", help="of parameters and AdamW's moments (%(default)s)")
    add("--implementation", choices=["triton", "xla"], help="jliger's backend (default: what fits the device)")
    add("--chunk-size", type=count, metavar="N", help="tokens per chunk of jliger (default: what fits the device)")
    add("--seed", type=count_or_zero, default=0, metavar="N", help="of all that is random (%(default)s)")
    add("--timed-steps", type=count, default=2, metavar="N", help="steps to time, after one that is not (%(default)s)")
    add("--timed-seconds", type=number, default=10.0, metavar="X", help="but no more of them after this (%(default)s)")
    add("--peak-tflops", type=number, metavar="X", help="of the device (default: known for H100 and H200)")
    add("--wait", action="store_true", help="for a line of input before anything is compiled")
    args = parser.parse_args(argv)
    if args.loss != "grpo" and args.sequences % 2:
        parser.error(f"--sequences {args.sequences} must be even for --loss {args.loss}: two are a pair")
    if args.prompt_length > args.length:
        parser.error(f"--prompt-length {args.prompt_length} leaves nothing of --length {args.length} that counts")
    return args


@interruptible("measure_post_training")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the record; a step that doesn't fit is a record, too."""
    args = parse_args(argv)
    config = decoder.CONFIGS[args.config]
    about = {
        **environment(),
        "bytes_limit": device_memory("bytes_limit"),
        "parameters": decoder.parameter_count(config),
    }
    names = ("loss", "head", "config", "sequences", "length", "prompt_length", "dtype", "parameters")
    record: Record = {name: getattr(args, name) for name in names}
    try:
        traced, create = build_step(args, config)
        lowered = traced.lower()
        if args.wait and not sys.stdin.readline():
            sys.exit("measure_post_training: error: --wait: the input ended, and there was no line")
        record |= {"out_of_memory": False, **measure(args, config, lowered, create)}
        words = in_words(record)
    except DeviceMemoryError as error:
        record |= {"out_of_memory": True, "reason": str(error)}
        words = f"out of memory ({error})"
    except (RunError, OSError) as error:
        sys.exit(f"measure_post_training: error: {error}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"environment": about, "records": [record]})
    print(f"{args.loss}, {args.head}: {words}", flush=True)
    if record["out_of_memory"]:
        sys.exit(OUT_OF_MEMORY_EXIT)


if __name__ == "__main__":
    main()
