"""What host memory costs: the speed of copies, inside a program and outside, and of AdamW on the host.

    python examples/study_host.py

Prints a table. study.py offloads in the way that is fastest here: copies inside programs, arithmetic on the device.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import options
from jax.experimental.compute_on import compute_on
from options import COUNT
from reporting import table

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host
CALLS = 3


def gigabytes_per_second(amount: int, function: Callable[..., Any], *args: Any) -> str:
    """The speed at which a function moves `amount` bytes."""
    jax.block_until_ready(function(*args))
    began = time.perf_counter()
    for _ in range(CALLS):
        result = function(*args)
    jax.block_until_ready(result)
    return f"{CALLS * amount / (time.perf_counter() - began) / 1e9:.1f}"


def adamw(params: jax.Array, gradients: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    updates, state = optax.adamw(1e-3).update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def main() -> None:
    parser = options.parser_of("study_host", __doc__)
    parser.add_argument("--mib", type=COUNT, default=2048, metavar="N", help="size of an array (%(default)s)")
    size = parser.parse_args().mib * 2**20
    x = jnp.ones(size // 4)
    device = x.sharding
    host = device.with_memory_kind("pinned_host")
    y = jax.device_put(x, host)
    to_host, to_device = (
        jax.jit(lambda x: jax.device_put(x + 1, HOST)),
        jax.jit(lambda y: jax.device_put(y, DEVICE) + 1),
    )
    # Of AdamW: parameters and gradients are read, parameters written, moments both.
    part = x[: size // 16]
    quarter, state = jax.device_put((part, optax.adamw(1e-3).init(part)), host)
    on_host = jax.jit(compute_on(adamw, compute_type="device_host", out_memory_spaces=HOST))
    rows = [
        ["", "GB/s"],
        ["to the host, by jax.device_put", gigabytes_per_second(size, partial(jax.device_put, device=host), x)],
        ["to the device, by jax.device_put", gigabytes_per_second(size, partial(jax.device_put, device=device), y)],
        ["to the host, inside a program", gigabytes_per_second(size, to_host, x)],
        ["to the device, inside a program", gigabytes_per_second(size, to_device, y)],
        [
            "AdamW on the host, bytes read and written",
            gigabytes_per_second(7 * size // 4, on_host, quarter, quarter, state),
        ],
    ]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32 arrays of {size / 2**20:.0f} MiB")
    print(table(rows))


if __name__ == "__main__":
    main()
