"""The mesh benchmark: compares several devices with the sum of one device's work and of the collectives."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jliger import reference
from jliger.bench import methods, problem
from jliger.bench.measure import MIB, Record
from jliger.bench.problem import Shape
from jliger.bench.timing import Effort, Timed, median, time_in_turn


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One way to shard the operation.

    Attributes:
      name: the name in tables.
      data: the number of devices that shard the tokens.
      model: the number of devices that shard the vocabulary.
      fsdp: whether the data axis also shards the kernel.
    """

    name: str
    data: int
    model: int
    fsdp: bool = False

    @property
    def kernel_spec(self) -> P:
        return P("data" if self.fsdp else None, "model")


def arrangements(devices: int) -> list[Arrangement]:
    """The arrangements to measure on this number of devices."""
    if devices == 1:
        return [Arrangement("one device", 1, 1)]
    result = [
        Arrangement("data parallel", devices, 1),
        Arrangement("FSDP", devices, 1, fsdp=True),
        Arrangement("vocabulary parallel", 1, devices),
    ]
    if devices >= 4:
        result.append(Arrangement("FSDP + vocabulary parallel", devices // 2, 2, fsdp=True))
    return result


def plan() -> list[tuple[int, Arrangement]]:
    """All numbers of devices (1, 2, 4, …) with their arrangements."""
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    return [(count, arrangement) for count in counts for arrangement in arrangements(count)]


def per_device() -> Shape:
    return Shape(8192, 4096, 128256) if jax.default_backend() == "gpu" else Shape(256, 128, 2048)


def measure(devices: int, arrangement: Arrangement, per_device: Shape, effort: Effort) -> Record:
    """Times an arrangement, its local work, its collectives, and XLA's partitioning of full logits, alternately."""
    dtype = problem.hidden_dtype()
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
    loss = methods.loss_and_gradients(methods.fused)
    plain = methods.loss_and_gradients(reference.fused_linear_cross_entropy)
    ours = _compiled(loss, mesh, arrangement, everything, dtype)
    full = _compiled(plain, mesh, arrangement, everything, dtype)
    local_operands = jax.jit(functools.partial(problem.operands, local, dtype, "float32"))()
    things = {
        "ours": Timed(ours.call),
        "local": Timed(functools.partial(jax.jit(loss), *local_operands)),
        "full": Timed(full.call),
    }
    if devices > 1:
        things["collectives"] = Timed(_collectives(mesh, arrangement, everything))
    result = time_in_turn(things, effort)
    milliseconds = {name: median(seconds) * 1e3 for name, seconds in result.items()}
    together = milliseconds["local"] + milliseconds.get("collectives", 0.0)
    return {
        "devices": devices,
        "name": arrangement.name,
        "shape": str(everything),
        "milliseconds": milliseconds["ours"],
        "bursts": [1e3 * seconds for seconds in result["ours"]],
        "local_milliseconds": milliseconds["local"],
        "collective_milliseconds": milliseconds.get("collectives"),
        "of_sum": together / milliseconds["ours"],
        "tokens_per_second": everything.tokens / median(result["ours"]),
        "extra_mib": ours.extra_mib,
        "full_milliseconds": milliseconds["full"],
        "full_extra_mib": full.extra_mib,
    }


@dataclasses.dataclass(frozen=True)
class _Program:
    call: Callable[[], Any]
    extra_mib: float | None


def _compiled(function: Callable[..., Any], mesh: Mesh, arrangement: Arrangement, shape: Shape, dtype: str) -> _Program:
    """Compiles `function` for a mesh; gradients have the shardings of their arrays."""
    tokens, kernel = (NamedSharding(mesh, spec) for spec in (P("data"), arrangement.kernel_spec))
    make = jax.jit(functools.partial(problem.operands, shape, dtype, "float32"), out_shardings=(tokens, kernel, tokens))
    operands = make()
    whole = NamedSharding(mesh, P())
    compiled = jax.jit(function, out_shardings=(whole, (tokens, kernel))).lower(*operands).compile()
    analysis = compiled.memory_analysis()
    extra = None if analysis is None else analysis.temp_size_in_bytes / MIB
    return _Program(functools.partial(compiled, *operands), extra)


def _collectives(mesh: Mesh, arrangement: Arrangement, shape: Shape) -> Callable[[], Any]:
    """The collectives of the arrangement and nothing else, in float32."""
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
