"""Measures what examples/study.py's offloading rests on: copies between host and device, and AdamW on either of them.

    python examples/host_memory.py --out results/host_memory.json

On a GPU, XLA allows 64 GiB of pinned host memory unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says otherwise.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import options
import runs
from jax.experimental.compute_on import compute_on
from options import COUNT
from runs import Record, say, write_json
from sweeps import command_of

from jliger.bench.report import environment

MEBI = 2**20
ADAMW = optax.adamw(1e-3)
PLACES = ("device", "device, moments from the host and back", "host")


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> float:
    """The median time of a call that is waited for, after one that does not count."""
    times = []
    for _ in range(1 + calls):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])


def copies(mebibytes: int, calls: int) -> Iterator[Record]:
    """An array from one memory to the other, inside a program and outside of one."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind("pinned_host")
    on_device = jax.device_put(jnp.ones(mebibytes * MEBI // 4, jnp.float32), device)
    on_host = jax.device_put(on_device, host)
    cases: list[tuple[str, Callable[..., Any], jax.Array]] = [
        ("device to host, in a program", jax.jit(partial(jax.device_put, device=jax.memory.Space.Host)), on_device),
        ("host to device, in a program", jax.jit(partial(jax.device_put, device=jax.memory.Space.Device)), on_host),
        ("device to host, outside", partial(jax.device_put, device=host), on_device),
        ("host to device, outside", partial(jax.device_put, device=device), on_host),
    ]
    for what, function, array in cases:
        yield {"what": what, "bytes": array.nbytes, "milliseconds": milliseconds(function, (array,), calls)}


def updated(gradients: jax.Array, state: Any, params: jax.Array) -> Any:
    updates, state = ADAMW.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def streamed(gradients: jax.Array, state: Any, params: jax.Array) -> Any:
    """AdamW on the device, with moments that lie in host memory between updates."""
    params, state = updated(gradients, jax.device_put(state, jax.memory.Space.Device), params)
    return params, to_host(state)


def to_host(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Host)


def adamw(millions: int, calls: int, where: str) -> Record:
    """AdamW's update, computed on the device or on the host."""
    params = jnp.ones(millions * 1_000_000, jnp.float32)
    arguments = (params, ADAMW.init(params), params)
    function = updated
    if where == "device, moments from the host and back":
        function, arguments = streamed, (params, jax.jit(to_host)(arguments[1]), params)
    if where == "host":
        function = compute_on(updated, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
        arguments = jax.jit(to_host)(arguments)
    return {
        "what": f"AdamW, {millions:,} million parameters: {where}",
        "bytes": 2 * params.nbytes,
        "milliseconds": milliseconds(jax.jit(function), arguments, calls),
    }


def run(args: argparse.Namespace, command: str) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about, records = {**environment(), "command": command}, []
    updates = (adamw(count, args.calls, where) for where in PLACES for count in args.millions)
    for record in chain(copies(args.mebibytes, args.calls), updates):
        records.append(record)
        say(f"{record['what']}: {record['milliseconds']:.2f} ms for {record['bytes'] / MEBI:,.0f} MiB")
        write_json(args.out, {"environment": about, "records": records})


def main(argv: Sequence[str] | None = None) -> None:
    parser = options.parser_of("host_memory", __doc__)
    add = parser.add_argument
    add("--mebibytes", type=COUNT, default=2048, metavar="N", help="of the array that is copied (%(default)s)")
    add("--millions", type=COUNT, nargs="+", default=[1, 64], metavar="N", help="of AdamW's parameters (1 64)")
    add("--calls", type=COUNT, default=10, metavar="N", help="timed, after one (%(default)s)")
    add("--out", type=Path, default=Path("results/host_memory.json"), help="results (%(default)s)")
    command = command_of("host_memory", argv)
    runs.run_program("host_memory", partial(run, command=command), parser.parse_args(argv))


if __name__ == "__main__":
    main()
