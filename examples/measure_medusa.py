"""Measures steps of Medusa's two stages at the shape of a published model, with random weights and tokens.

    python examples/measure_medusa.py --shape llama-3-8b --head jliger --stages 1 --medusa-heads 3 5 --batch 4 out.json

A device's peak memory cannot be reset, so examples/sweep_medusa.py gives each measurement a process of its own. The
heads begin with zeros, which take as long as any others.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import pretrained
import runs
from decoder import DecoderConfig
from language_model import HEADS, Head
from measuring import Records, in_words, measured
from options import COUNT, DTYPES, NUMBER
from runs import DeviceMemoryError, Record, say
from shapes import SHAPES
from speculation import Medusa
from training import build_program, compile_step, device_memory_errors

LEARNING_RATE = 1e-5


def measure(args: argparse.Namespace, model: Medusa, stage: int) -> Record:
    """A training step with AdamW's update."""
    create = partial(decoder.initial_parameters, model.config, jax.random.key(0), args.param_dtype)
    backbone = jax.eval_shape(create)

    def heads() -> Any:
        shapes = jax.eval_shape(model.initial_parameters, backbone)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # The frozen decoder of stage 1 is no part of what the optimizer sees.
    loss_fn, initial, given = model.stage_1, heads, (backbone,)
    if stage == 2:
        loss_fn, initial, given = model.stage_2, lambda: {"backbone": create(), "heads": heads()}, ()
    tokens = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    program = build_program(loss_fn, initial, optax.adamw(LEARNING_RATE), tokens, *given)
    compiled = compile_step(program.step)
    with device_memory_errors():
        frozen = (jax.block_until_ready(jax.jit(create)()),) if stage == 1 else ()
        state = jax.block_until_ready(program.initial_state())
    random = np.random.default_rng(0)
    batch = jax.device_put(random.integers(1, model.config.vocab_size, tokens.shape, np.int32))
    losses = []

    def run() -> Any:
        nonlocal state
        state, result = compiled.step(state, batch, *frozen)
        losses.append(result.loss)
        return state

    record = measured(compiled, run, args.timed_steps, args.timed_seconds)
    speed = {"tokens_per_second": args.batch * args.length / record["milliseconds"] * 1e3}
    return {**record, **speed, "losses": [float(loss) for loss in losses]}


def config_of(args: argparse.Namespace) -> DecoderConfig:
    return pretrained.decoder_config(SHAPES[args.shape], args.shape, args.dtype)


def run(args: argparse.Namespace) -> None:
    config = config_of(args)
    records = Records(args.record, parameters=decoder.parameter_count(config))
    common = {name: getattr(args, name) for name in ("head", "batch", "length", "dtype", "param_dtype")}
    for count in sorted(args.medusa_heads):
        model = Medusa(config, count, Head(args.head), end_of_text=-1)
        for stage in args.stages:
            about = {"config": args.shape, **common, "medusa_heads": count, "stage": stage}
            about |= {"case": f"{count} heads, stage {stage}"}
            record = records.add(about, partial(measure, args, model, stage))
            say(f"{args.shape}, {args.head}, {count} heads, stage {stage}: {in_words(record)}")
            if record["out_of_memory"]:
                raise DeviceMemoryError(record["reason"])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure_medusa", __doc__)
    add = parser.add_argument
    add("record", type=Path, metavar="FILE", help="the JSON file to write")
    add("--shape", choices=list(SHAPES), required=True, help="of the model")
    add("--head", choices=HEADS, required=True, help="how losses are computed")
    add("--medusa-heads", type=COUNT, nargs="+", default=[3, 5], metavar="K", help="heads (3 5)")
    add("--stages", type=int, choices=(1, 2), nargs="+", default=[1], help="1: the heads, 2: everything (1)")
    add("--batch", type=COUNT, default=4, metavar="N", help="rows per step (%(default)s)")
    add("--length", type=COUNT, default=1024, metavar="N", help="tokens per row (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--param-dtype", choices=DTYPES, default="bfloat16", help="of the parameters (%(default)s)")
    add("--timed-steps", type=COUNT, default=4, metavar="N", help="steps to time (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=8.0, metavar="X", help="no more of them after this time (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("measure_medusa", run, parse_args(argv))


if __name__ == "__main__":
    main()
