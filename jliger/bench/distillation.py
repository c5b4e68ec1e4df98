"""The distillation benchmark: both models' logits and the student's gradients against those four products alone."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from tqdm import tqdm

from jliger import losses, reference
from jliger.bench import cases, report
from jliger.bench.head import COLUMNS, Effort
from jliger.bench.timing import Sample, time_in_turn


@dataclasses.dataclass(frozen=True)
class Shape:
    """A problem: tokens, the teacher's and the student's hidden size, and the vocabulary."""

    tokens: int
    teacher_hidden: int
    student_hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.teacher_hidden} → {self.student_hidden}, {self.vocab})"

    @property
    def student(self) -> cases.Shape:
        return cases.Shape(self.tokens, self.student_hidden, self.vocab)

    @property
    def teacher(self) -> cases.Shape:
        return cases.Shape(self.tokens, self.teacher_hidden, self.vocab)


GPU_SHAPES = [Shape(8192, 4096, 2048, 128256), Shape(32768, 4096, 2048, 128256)]
CPU_SHAPE = Shape(1024, 512, 256, 16384)
FULL_LOGITS_LIMIT = 8192 * 128256  # tokens · vocabulary up to which full logits are tried


class Arrays(NamedTuple):
    """What a loss is given, with kernels of one dtype."""

    student_hidden: Array
    student_kernel: Array
    teacher_hidden: Array
    teacher_kernel: Array
    labels: Array


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute a loss, as `jliger.bench.cases.Way`.

    Attributes:
      name: as the table shows it.
      function: of `Arrays`.
      kernel_dtype: of both kernels.
      floor: `"four products"`, or `"two products"` without gradients.
      least: the share of the floor's speed that it is meant to reach, or None.
    """

    name: str
    function: Callable[[Arrays], Any]
    kernel_dtype: str = "float32"
    floor: str = "four products"
    least: float | None = None


def run(out: Path, effort: Effort) -> list[report.Record]:
    """Measures every way at every shape, prints a table a shape, writes `out`."""
    records: list[report.Record] = []
    shapes = GPU_SHAPES if jax.default_backend() == "gpu" else [CPU_SHAPE]
    plan = [(shape, _ways(shape)) for shape in shapes]
    with tqdm(total=sum(len(ways) for _, ways in plan), unit="way") as progress:
        for shape, ways in plan:
            found = _measure(shape, ways, effort, progress)
            records += found
            report.write_json(out, records)
            progress.write(report.table(found, COLUMNS))
    return records


def _ways(shape: Shape) -> list[Way]:
    ways: list[Way] = []
    for dtype in ("float32", "bfloat16") if jax.default_backend() == "gpu" else ("float32",):
        ways += [
            Way(f"forward KL, {dtype} kernels", _loss_and_gradients(_fused, beta=0.0), dtype, least=0.8),
            Way(f"reverse KL, {dtype} kernels", _loss_and_gradients(_fused, beta=1.0), dtype, least=0.8),
            Way(f"JSD, {dtype} kernels", _loss_and_gradients(_fused, beta=0.5), dtype, least=0.8),
        ]
    hard = {"temperature": 2.0, "hard_weight": 0.5}
    ways += [
        Way("JSD with labels, temperature 2, float32 kernels", _loss_and_gradients(_fused, beta=0.5, **hard)),
        Way("JSD, student kernel frozen, float32 kernels", _loss_and_gradients(_fused, wrt=(0,), beta=0.5)),
        Way("JSD, loss alone, float32 kernels", functools.partial(_fused, beta=0.5), floor="two products"),
    ]
    if shape.tokens * shape.vocab <= FULL_LOGITS_LIMIT:
        plain = _loss_and_gradients(_plain, beta=0.5)
        ways.append(Way("JSD, plain JAX, full logits, float32 kernels", plain))
    return ways


def _fused(arrays: Arrays, hard_weight: float = 0.0, **options: Any) -> Any:
    labels = arrays.labels if hard_weight else None
    return losses.fused_linear_jsd(*arrays[:4], labels=labels, hard_weight=hard_weight, **options)


def _plain(arrays: Arrays, **options: Any) -> Any:
    return reference.fused_linear_jsd(*arrays[:4], **options)


def _loss_and_gradients(
    loss: Callable[..., Any], wrt: tuple[int, ...] = (0, 1), **options: Any
) -> Callable[[Arrays], Any]:
    """Loss and gradients by the student's hidden states (0), its kernel (1), or both."""

    def function(arrays: Arrays) -> Any:
        def of_student(hidden: Array, kernel: Array) -> Any:
            return loss(arrays._replace(student_hidden=hidden, student_kernel=kernel), **options)

        return jax.value_and_grad(of_student, wrt)(arrays.student_hidden, arrays.student_kernel)

    return function


def _measure(shape: Shape, ways: list[Way], effort: Effort, progress: "tqdm[Any]") -> list[report.Record]:
    """All ways at one shape, each timed in turn with the products alone."""
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    student, teacher = (cases.operands(one, "float32", dtype) for one in (shape.student, shape.teacher))
    in_float32 = Arrays(*student[:2], teacher[0], teacher[1][:, ::-1], student[2])
    arrays = {"float32": in_float32, "bfloat16": _with_kernels(in_float32, jnp.bfloat16)}
    products = _products(shape, dtype)
    samples: dict[str, dict[str, Sample]] = {}
    extra: dict[str, int | None] = {}
    for way in ways:
        compiled = jax.jit(way.function).lower(arrays[way.kernel_dtype]).compile()
        extra[way.name] = report.extra_memory(compiled)
        in_turn = {**products, way.name: functools.partial(compiled, arrays[way.kernel_dtype])}
        samples[way.name] = time_in_turn(in_turn, least_rounds=effort.least_rounds, seconds=effort.seconds)
        progress.update()
    flops = {
        "four products": 3 * shape.student.product_flops + shape.teacher.product_flops,
        "two products": shape.student.product_flops + shape.teacher.product_flops,
    }
    first = samples[ways[0].name]
    records = [report.floor(shape, name, _floor(name, first), flops[name]) for name in flops]
    for way in ways:
        speed = report.speed(
            samples[way.name][way.name],
            floor=way.floor,
            floor_seconds=_floor(way.floor, samples[way.name]),
            flops=flops[way.floor],
            least=way.least,
            extra=extra[way.name],
        )
        records.append({"shape": str(shape), "name": way.name, **speed})
    return records


def _with_kernels(arrays: Arrays, dtype: jax.typing.DTypeLike) -> Arrays:
    return arrays._replace(
        student_kernel=arrays.student_kernel.astype(dtype), teacher_kernel=arrays.teacher_kernel.astype(dtype)
    )


def _products(shape: Shape, dtype: str) -> dict[str, Callable[[], Array]]:
    """The student's three products and the teacher's one, each alone."""
    teacher = cases.products(shape.teacher, dtype)["product: logits"]
    return {**cases.products(shape.student, dtype), "product: teacher logits": teacher}


def _floor(name: str, samples: dict[str, Sample]) -> float:
    """Seconds that the products take."""
    medians = {name: sample.median for name, sample in samples.items() if name.startswith("product: ")}
    gradients = sum(median for product, median in medians.items() if product.endswith("gradient"))
    return sum(medians.values()) - (gradients if name == "two products" else 0)
