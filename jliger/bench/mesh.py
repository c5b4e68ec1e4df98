"""The mesh benchmark: the operation on several devices against one device's work and the collectives alone."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from tqdm import tqdm

from jliger.bench import cases, report
from jliger.bench.cases import Shape
from jliger.bench.timing import time_in_turn

LIMIT = 1.05  # how many times (local work + collectives) each arrangement may take

COLUMNS = {
    "devices": "devices",
    "arrangement": "name",
    "ms": "milliseconds",
    "local work, ms": "local_milliseconds",
    "collectives, ms": "collective_milliseconds",
    "over their sum": "over_sum",
    "at most": "most_over_sum",
    "tokens/s": "tokens_per_second",
    "extra memory, MiB": "extra_mib",
    "full logits under jit, ms": "full_milliseconds",
    "their memory, MiB": "full_extra_mib",
}


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One way to spread the operation over devices.

    Attributes:
      name: as the table shows it.
      data: devices that share the tokens out.
      model: devices that share the vocabulary out.
      fsdp: whether the kernel is spread over the data axis too.
    """

    name: str
    data: int
    model: int
    fsdp: bool = False

    @property
    def kernel_spec(self) -> P:
        return P("data" if self.fsdp else None, "model")


def arrangements(devices: int) -> list[Arrangement]:
    """Those that make sense on so many devices."""
    if devices == 1:
        return [Arrangement("one device", 1, 1)]
    found = [
        Arrangement("data parallel", devices, 1),
        Arrangement("FSDP", devices, 1, fsdp=True),
        Arrangement("vocabulary parallel", 1, devices),
    ]
    if devices >= 4:
        found.append(Arrangement("FSDP + vocabulary parallel", devices // 2, 2, fsdp=True))
    return found


def run(out: Path, *, rounds: int, seconds: float) -> list[report.Record]:
    """Measures 1, 2, 4, … devices, prints a table, writes `out`."""
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    on_gpu = jax.default_backend() == "gpu"
    per_device = Shape(8192, 4096, 128256) if on_gpu else Shape(256, 128, 2048)
    dtype = "bfloat16" if on_gpu else "float32"
    plan = [(count, arrangement) for count in counts for arrangement in arrangements(count)]
    records = []
    for count, arrangement in tqdm(plan, unit="arrangement"):
        records.append(measure(count, arrangement, per_device, dtype, rounds=rounds, seconds=seconds))
        report.write_json(out, records)
    print(report.table(records, COLUMNS))
    return records


def measure(
    devices: int, arrangement: Arrangement, per_device: Shape, dtype: str, *, rounds: int, seconds: float
) -> report.Record:
    """One arrangement, its local work, its collectives, and XLA's own partitioning of full logits, timed in turn."""
    mesh = jax.make_mesh(
        (arrangement.data, arrangement.model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:devices],
    )
    everything = Shape(per_device.tokens * devices, per_device.hidden, per_device.vocab)
    local = dataclasses.replace(
        per_device, tokens=everything.tokens // arrangement.data, vocab=per_device.vocab // arrangement.model
    )
    loss = cases.loss_and_gradients(cases.fused)
    ours = _compiled(loss, mesh, arrangement, everything, dtype)
    full = _compiled(cases.loss_and_gradients(cases.full_logits), mesh, arrangement, everything, dtype)
    functions: dict[str, Callable[[], Any]] = {
        "ours": ours.call,
        "local": functools.partial(jax.jit(loss), *cases.operands(local, "float32", dtype)),
        "full": full.call,
    }
    if devices > 1:
        functions["collectives"] = _collectives(mesh, arrangement, everything)
    samples = time_in_turn(functions, least_rounds=rounds, seconds=seconds)
    milliseconds = {name: sample.median * 1e3 for name, sample in samples.items()}
    together = milliseconds["local"] + milliseconds.get("collectives", 0.0)
    return {
        "devices": devices,
        "name": arrangement.name,
        "shape": str(everything),
        "milliseconds": milliseconds["ours"],
        "least_milliseconds": samples["ours"].least * 1e3,
        "most_milliseconds": samples["ours"].most * 1e3,
        "rounds": samples["ours"].rounds,
        "local_milliseconds": milliseconds["local"],
        "collective_milliseconds": milliseconds.get("collectives"),
        "over_sum": milliseconds["ours"] / together,
        "most_over_sum": LIMIT,
        "tokens_per_second": everything.tokens / samples["ours"].median,
        "extra_mib": ours.extra_mib,
        "full_milliseconds": milliseconds["full"],
        "full_extra_mib": full.extra_mib,
    }


@dataclasses.dataclass(frozen=True)
class _Program:
    call: Callable[[], Any]
    extra_mib: float | None


def _compiled(function: Callable[..., Any], mesh: Mesh, arrangement: Arrangement, shape: Shape, dtype: str) -> _Program:
    """`function` on a mesh, gradients sharded like what they are the gradients of."""
    tokens, kernel = (NamedSharding(mesh, spec) for spec in (P("data"), arrangement.kernel_spec))
    make = jax.jit(functools.partial(cases.operands, shape, "float32", dtype), out_shardings=(tokens, kernel, tokens))
    operands = make()
    whole = NamedSharding(mesh, P())
    compiled = jax.jit(function, out_shardings=(whole, (tokens, kernel))).lower(*operands).compile()
    extra = report.extra_memory(compiled)
    return _Program(functools.partial(compiled, *operands), None if extra is None else extra / 2**20)


def _collectives(mesh: Mesh, arrangement: Arrangement, shape: Shape) -> Callable[[], Any]:
    """What the arrangement moves between devices, and nothing else: all in float32."""
    kernel = jnp.ones((shape.hidden, shape.vocab), jnp.float32)
    kernel = jax.device_put(kernel, NamedSharding(mesh, arrangement.kernel_spec))
    grad = jax.device_put(jnp.ones((shape.hidden, shape.vocab)), NamedSharding(mesh, P(None, "model")))
    hidden = jax.device_put(jnp.ones((shape.tokens, shape.hidden)), NamedSharding(mesh, P("data")))

    def move(kernel: Array, grad: Array, hidden: Array) -> tuple[Array, ...]:
        moved: list[Array] = []
        if arrangement.fsdp:
            moved.append(jax.lax.all_gather(kernel, "data", axis=0, tiled=True))
            moved.append(jax.lax.psum_scatter(grad, "data", scatter_dimension=0, tiled=True))
        elif arrangement.data > 1:
            moved.append(jax.lax.psum(grad, "data"))
        if arrangement.model > 1:
            moved.append(jax.lax.psum(hidden, "model"))
        return tuple(moved)

    gathered, scattered = P(None, "model"), arrangement.kernel_spec
    out_specs = ((gathered, scattered) if arrangement.fsdp else (gathered,) if arrangement.data > 1 else ()) + (
        (P("data"),) if arrangement.model > 1 else ()
    )
    shared = jax.shard_map(
        move,
        mesh=mesh,
        in_specs=(arrangement.kernel_spec, gathered, P("data")),
        out_specs=out_specs,
        check_vma=False,
    )
    return functools.partial(jax.jit(shared), kernel, grad, hidden)
