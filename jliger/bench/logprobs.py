"""The log-probability benchmark: `linear_logprobs` with and without gradients, and with a low-rank adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from tqdm import tqdm

import jliger
from jliger import reference
from jliger.bench import report
from jliger.bench.cases import Shape, Way
from jliger.bench.head import COLUMNS, MAIN, Effort, measure

GPU_SHAPES = [MAIN, Shape(32768, 4096, 128256)]
CPU_SHAPE = Shape(1024, 256, 16384)
RANK = 16


def run(out: Path, effort: Effort) -> list[report.Record]:
    """Measures every way at every shape, prints a table a shape, writes `out`."""
    records: list[report.Record] = []
    shapes = GPU_SHAPES if jax.default_backend() == "gpu" else [CPU_SHAPE]
    plan = [(shape, _ways(shape)) for shape in shapes]
    with tqdm(total=sum(len(ways) for _, ways in plan), unit="way") as progress:
        for shape, ways in plan:
            found = measure(shape, ways, shape, effort, with_torch=False, progress=progress)
            records += found
            report.write_json(out, records)
            progress.write(report.table(found, COLUMNS))
    return records


def _ways(shape: Shape) -> list[Way]:
    ways: list[Way] = []
    on_gpu = jax.default_backend() == "gpu"
    for dtype in ("float32", "bfloat16") if on_gpu else ("float32",):
        ways += [
            Way(f"forward alone, {dtype} kernel", _forward, dtype, "one product", 0.93),
            Way(f"forward and backward, {dtype} kernel", _and_gradients(_logprobs), dtype, least=0.72),
            Way(f"with the entropy's gradient, {dtype} kernel", _and_gradients(_logprobs_and_entropy), dtype),
            Way(f"logits kept, {dtype} kernel", _and_gradients(_logprobs, keep_logits=True), dtype, least=0.9),
        ]
    ways.append(Way(f"an adapter of rank {RANK}, kernel frozen", _adapter_gradients))
    if shape in (MAIN, CPU_SHAPE):
        ways.append(Way("plain JAX, full logits", _and_gradients(_plain)))
    return ways


def _forward(hidden: Array, kernel: Array, labels: Array) -> Any:
    return jliger.linear_logprobs(hidden, kernel, labels)


def _logprobs(hidden: Array, kernel: Array, labels: Array, **options: Any) -> Any:
    return jliger.linear_logprobs(hidden, kernel, labels, **options).logprobs


def _logprobs_and_entropy(hidden: Array, kernel: Array, labels: Array) -> Any:
    found = jliger.linear_logprobs(hidden, kernel, labels)
    return found.logprobs, found.entropy


def _plain(hidden: Array, kernel: Array, labels: Array) -> Any:
    return reference.linear_logprobs(hidden, kernel, labels).logprobs


def _and_gradients(function: Callable[..., Any], **options: Any) -> Callable[[Array, Array, Array], Any]:
    """Values, and gradients with cotangents that differ from token to token."""

    def found(hidden: Array, kernel: Array, labels: Array) -> Any:
        values, pull_back = jax.vjp(lambda *args: function(*args, labels, **options), hidden, kernel)
        return values, pull_back(jax.tree.map(_cotangent, values))

    return found


def _adapter_gradients(hidden: Array, kernel: Array, labels: Array) -> Any:
    """Those of hidden states and of an adapter; the kernel's none."""
    keys = jax.random.split(jax.random.key(1))
    a = jax.random.normal(keys[0], (hidden.shape[1], RANK)) * hidden.shape[1] ** -0.5
    b = jax.random.normal(keys[1], (RANK, kernel.shape[1]))

    def logprobs(hidden: Array, a: Array, b: Array) -> Array:
        return _logprobs(hidden, kernel, labels, adapter=jliger.LinearAdapter(a, b, 0.1))

    values, pull_back = jax.vjp(logprobs, hidden, a, b)
    return values, pull_back(_cotangent(values))


def _cotangent(values: Array) -> Array:
    return jnp.linspace(0.5, 1.5, values.size, dtype=values.dtype).reshape(values.shape)
