"""The head benchmark: one device, loss and gradients against the matrix products alone."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from jliger.bench import cases, peers, report
from jliger.bench.cases import Shape, Way
from jliger.bench.timing import Sample, time_in_turn

# Each shape with the share of the products' speed that loss and gradients are meant to reach.
GPU_SHAPES = {
    Shape(8192, 4096, 128256): 0.97,
    Shape(32768, 4096, 128256): 0.97,
    Shape(131072, 4096, 128256): 0.97,
    Shape(8192, 5120, 151936): 0.97,
    Shape(8192, 2048, 131072): 0.93,
    Shape(16384, 2304, 256000): 0.92,
    Shape(8192, 1024, 50304): 0.90,
    Shape(4096, 896, 151936): 0.85,
}
UNALIGNED = Shape(8191, 4096, 128257)
MAIN = Shape(8192, 4096, 128256)
CPU_SHAPE = Shape(2048, 512, 32768)
FULL_LOGITS_LIMIT = 16384 * 256000  # tokens · vocabulary up to which full logits are tried


class Effort(NamedTuple):
    """How long to measure: as `time_in_turn` takes it."""

    least_rounds: int
    seconds: float


def run(out: Path, effort: Effort, *, with_peers: bool, only: Sequence[str] = ()) -> list[report.Record]:
    """Measures every case, prints a table a shape, writes `out` and a plot beside it."""
    on_gpu = jax.default_backend() == "gpu"
    plan = (
        [(shape, _gpu_ways(shape, least)) for shape, least in GPU_SHAPES.items()]
        if on_gpu
        else [(CPU_SHAPE, _cpu_ways())]
    )
    if on_gpu:
        plan.insert(1, (UNALIGNED, [way for dtype in ("float32", "bfloat16") for way in cases.own_ways(dtype, 0.95)]))
    plan = [(shape, ways) for shape, ways in plan if not only or str(shape) in only]
    records: list[report.Record] = []
    with tqdm(total=sum(len(ways) for _, ways in plan), unit="way") as progress:
        for shape, ways in plan:
            floor_shape = MAIN if shape == UNALIGNED else shape
            torch_here = on_gpu and with_peers and shape == MAIN
            records += measure(shape, ways, floor_shape, effort, with_torch=torch_here, progress=progress)
            report.write_json(out, records)
            progress.write(report.table([r for r in records if r["shape"] == str(shape)], COLUMNS))
    return records


COLUMNS = {
    "N, H, V": "shape",
    "what": "name",
    "ms": "milliseconds",
    "of the floor": "of_floor",
    "to reach": "least",
    "times loss + gradients": "of_beside",
    "times to reach": "least_beside",
    "TFLOP/s": "tflops",
    "extra memory, MiB": "extra_mib",
}


def _gpu_ways(shape: Shape, least: float) -> list[Way]:
    ways = [way for dtype in ("float32", "bfloat16") for way in cases.own_ways(dtype, least)]
    if shape.tokens * shape.vocab <= FULL_LOGITS_LIMIT:
        ways.append(Way("plain JAX, full logits", cases.loss_and_gradients(cases.full_logits)))
        ways.append(Way("jax.checkpoint over chunks", cases.loss_and_gradients(cases.checkpointed_chunks)))
    if shape == MAIN:
        ways += [way for dtype in ("float32", "bfloat16") for way in cases.option_ways(dtype)] + peers.tokamax_ways()
    elif shape.tokens == 131072:
        ways.append(cases.option_ways("float32")[-1])
    return ways


def _cpu_ways() -> list[Way]:
    plain = cases.loss_and_gradients(cases.full_logits)
    return [*cases.own_ways("float32"), Way("plain JAX, full logits", plain)]


def measure(
    shape: Shape, ways: Sequence[Way], floor_shape: Shape, effort: Effort, *, with_torch: bool, progress: "tqdm[Any]"
) -> list[report.Record]:
    """All ways at one shape, timed in turn with the products alone."""
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    hidden, kernel, labels = cases.operands(shape, "float32", dtype)
    kernels = {"float32": kernel, "bfloat16": kernel.astype("bfloat16")}
    functions: dict[str, Callable[[], Any]] = {}
    extra: dict[str, int | None] = {}
    for way in ways:
        compiled = jax.jit(way.function).lower(hidden, kernels[way.kernel_dtype], labels).compile()
        functions[way.name] = functools.partial(compiled, hidden, kernels[way.kernel_dtype], labels)
        extra[way.name] = report.extra_memory(compiled)
        progress.update()
    torch_functions = peers.torch_ways(shape) if with_torch else {}
    for name, (step, extra_memory) in torch_functions.items():
        functions[name] = step
        extra[name] = extra_memory()
    products = cases.products(floor_shape, dtype)
    samples: dict[str, dict[str, Sample]] = {}
    beside = {way.name: way.beside for way in ways}
    for name, function in functions.items():
        # Each way in turn with what it is compared with, and nothing else: what ran before sets the clock it runs at.
        other = beside.get(name)
        in_turn = {**products, **({other: functions[other]} if other else {}), name: function}
        samples[name] = time_in_turn(in_turn, least_rounds=effort.least_rounds, seconds=effort.seconds)
    ways = [*ways, *[Way(name, lambda *_: None, "bfloat16") for name in torch_functions]]
    return _floor_records(shape, samples[ways[0].name]) + [
        _record(way, shape, samples[way.name], extra[way.name]) for way in ways
    ]


def _floors(samples: dict[str, Sample]) -> dict[str, float]:
    medians = {name: sample.median for name, sample in samples.items() if name.startswith("product: ")}
    return {"three products": sum(medians.values()), "one product": medians["product: logits"]}


def _floor_records(shape: Shape, samples: dict[str, Sample]) -> list[report.Record]:
    return [report.floor(shape, name, seconds, _flops(name, shape)) for name, seconds in _floors(samples).items()]


def _flops(floor: str, shape: Shape) -> int:
    return (3 if floor == "three products" else 1) * shape.product_flops


def _record(way: Way, shape: Shape, samples: dict[str, Sample], extra: int | None) -> report.Record:
    sample = samples[way.name]
    speed = report.speed(
        sample,
        floor=way.floor,
        floor_seconds=_floors(samples)[way.floor],
        flops=_flops(way.floor, shape),
        least=way.least,
        extra=extra,
    )
    return {
        "shape": str(shape),
        "name": way.name,
        **speed,
        "of_beside": None if way.beside is None else samples[way.beside].median / sample.median,
        "least_beside": way.least_beside,
    }
