"""Measures steps of Medusa's two stages at the shape of a published model, with random weights and tokens.

    python examples/measure_medusa.py --shape llama-3-8b --head jliger --cases 3:1:4 5:1:4 -- out.json

`3:1:4` is a step with 3 heads of stage 1 with 4 rows. A device's peak memory cannot be reset: begin with the case that
needs the least. The heads begin with zeros, which take as long as any others.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import options
import runs
from jax.sharding import PartitionSpec as P
from language_model import HEADS, Head
from llama import BATCH, placed
from measuring import Records, in_words, measured
from options import COUNT, DTYPES, NUMBER
from runs import DeviceMemoryError, Record, say
from shapes import SHAPES
from speculation import Medusa
from train_sharded import make_mesh, mesh_axes
from training import build_program, compile_step, device_memory_errors, state_shardings

LEARNING_RATE = 1e-5


def measure(args: argparse.Namespace, model: Medusa, stage: int, batch_size: int) -> Record:
    """A training step with AdamW's update."""
    create = partial(decoder.initial_parameters, model.config, jax.random.key(0), args.param_dtype)
    specs: Any = {"backbone": jax.tree.map(lambda leaf: leaf.spec, decoder.parameters(model.config))}
    shapes = jax.eval_shape(model.initial_parameters, jax.eval_shape(create))
    specs["heads"] = model.specs(shapes)
    backbone = on_mesh(jax.eval_shape(create), specs["backbone"])

    def heads() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    # The frozen decoder of stage 1 is no part of what the optimizer sees.
    loss_fn, initial, own, given = model.stage_1, heads, specs["heads"], (backbone,)
    if stage == 2:
        loss_fn, initial, own, given = model.stage_2, lambda: {"backbone": create(), "heads": heads()}, specs, ()
    optimizer = optax.adamw(LEARNING_RATE)
    tokens = jax.ShapeDtypeStruct((batch_size, args.length), jnp.int32, sharding=placed(P(BATCH)))
    program = build_program(loss_fn, initial, optimizer, tokens, *given, shardings=state_shardings(optimizer, own))
    compiled = compile_step(program.step)
    places = jax.tree.map(lambda leaf: leaf.sharding, backbone)
    with device_memory_errors():
        frozen = (jax.block_until_ready(jax.jit(create, out_shardings=places)()),) if stage == 1 else ()
        state = jax.block_until_ready(program.initial_state())
    random = np.random.default_rng(0)
    batch = jax.device_put(random.integers(1, model.config.vocab_size, tokens.shape, np.int32), tokens.sharding)
    losses = []

    def run() -> Any:
        nonlocal state
        state, result = compiled.step(state, batch, *frozen)
        losses.append(result.loss)
        return state

    record = measured(compiled, run, args.timed_steps, args.timed_seconds)
    speed = {"tokens_per_second": batch_size * args.length / record["milliseconds"] * 1e3}
    return {**record, **speed, "losses": [float(loss) for loss in losses]}


def on_mesh(shapes: Any, specs: Any) -> Any:
    """The shapes, with shardings on the mesh that is set, if there is one."""
    return jax.tree.map(lambda leaf, spec: leaf.update(sharding=placed(spec)), shapes, specs)


def run(args: argparse.Namespace) -> None:
    config = architectures.decoder_config(SHAPES[args.shape], args.shape, args.dtype)
    mesh = make_mesh(args.mesh) if jax.device_count() > 1 or args.mesh else None
    records = Records(args.record, parameters=decoder.parameter_count(config))
    common = {name: getattr(args, name) for name in ("head", "length", "dtype", "param_dtype")}
    common |= {"config": args.shape, "mesh": None if mesh is None else dict(mesh.shape)}
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        for count, stage, batch_size in args.cases:
            model = Medusa(config, count, Head(args.head), end_of_text=-1)
            about = {**common, "medusa_heads": count, "stage": stage, "batch": batch_size}
            about |= {"case": f"{count} heads, stage {stage}, batch {batch_size}"}
            record = records.add(about, partial(measure, args, model, stage, batch_size))
            say(f"{args.shape}, {args.head}, {about['case']}: {in_words(record)}")
    if failed := [record["case"] for record in records.records if record["out_of_memory"]]:
        raise DeviceMemoryError(f"of {args.head}: {'; '.join(failed)}")


def case(text: str) -> tuple[int, int, int]:
    """An argparse type: how many heads, the stage, and the batch, as in 3:1:4."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts) or parts[1] not in ("1", "2"):
        raise argparse.ArgumentTypeError(f"{text!r}: needed is HEADS:STAGE:BATCH, with stage 1 (the heads) or 2")
    count, stage, batch_size = map(int, parts)
    return count, stage, batch_size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("measure_medusa", __doc__)
    add = parser.add_argument
    add("record", type=Path, metavar="FILE", help="the JSON file to write")
    add("--shape", choices=list(SHAPES), required=True, help="of the model")
    add("--head", choices=HEADS, required=True, help="how losses are computed")
    add("--cases", type=case, nargs="+", required=True, metavar="CASE", help="as in 3:1:4: 3 heads, stage 1, batch 4")
    add("--length", type=COUNT, default=1024, metavar="N", help="tokens per row (%(default)s)")
    add("--mesh", type=mesh_axes, metavar="AXES", help="as in fsdp=2,tensor=1 (default: all devices on fsdp)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--param-dtype", choices=DTYPES, default="bfloat16", help="of the parameters (%(default)s)")
    add("--timed-steps", type=COUNT, default=4, metavar="N", help="steps to time (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=8.0, metavar="X", help="no more of them after this time (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("measure_medusa", run, parse_args(argv))


if __name__ == "__main__":
    main()
