"""The distillation benchmark: compares losses and gradients with the four matrix products that they need."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jliger import losses, reference
from jliger.bench import problem
from jliger.bench.methods import DTYPES
from jliger.bench.problem import FOUR, TWO, Bound, Floor, Method, Problem


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a problem: tokens, the hidden sizes of teacher and student, and the vocabulary."""

    tokens: int
    teacher_hidden: int
    student_hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.teacher_hidden} → {self.student_hidden}, {self.vocab})"

    @property
    def student(self) -> problem.Shape:
        return problem.Shape(self.tokens, self.student_hidden, self.vocab)

    @property
    def teacher(self) -> problem.Shape:
        return problem.Shape(self.tokens, self.teacher_hidden, self.vocab)


GPU_SHAPE = Shape(8192, 4096, 2048, 128256)
CPU_SHAPE = Shape(512, 256, 128, 16384)


class Arrays(NamedTuple):
    """The arrays of a loss, with both kernels of one dtype."""

    student_hidden: Array
    student_kernel: Array
    teacher_hidden: Array
    teacher_kernel: Array
    labels: Array


def problems() -> list[Problem]:
    on_gpu = jax.default_backend() == "gpu"
    shape = GPU_SHAPE if on_gpu else CPU_SHAPE
    return [Problem(shape, functools.partial(_operands, shape), _floors(shape), _methods(shape, on_gpu=on_gpu))]


def _methods(shape: Shape, *, on_gpu: bool) -> list[Method]:
    # The bytes of the bounds: both models' logits are read once, the student's logit gradients are written once, and
    # both kernels are cast.
    casts = shape.student.cast_bytes + shape.teacher.cast_bytes
    result: list[Method] = []
    for dtype in DTYPES if on_gpu else ("float32",):
        # bfloat16 kernels need no cast; instead the float32 sum of the student's kernel gradient is cast.
        bound = Bound(
            (FOUR,), 3 * shape.student.logit_bytes + (casts if dtype == "float32" else shape.student.cast_bytes)
        )
        betas = {"JSD": 0.5, "forward KL": 0.0, "reverse KL": 1.0} if dtype == "float32" else {"JSD": 0.5}
        for name, beta in betas.items():
            step = _loss_and_gradients(_fused, beta=beta)
            result.append(Method(f"{name}, {dtype} kernels", step, dtype, FOUR, bound))
    hard = _loss_and_gradients(_fused, beta=0.5, temperature=2.0, hard_weight=0.5)
    alone = Bound((TWO,), 2 * shape.student.logit_bytes + casts)
    return [
        *result,
        Method("JSD with labels, temperature 2, float32 kernels", hard, floor=FOUR),
        Method("JSD, student kernel frozen, float32 kernels", _loss_and_gradients(_fused, (0,), beta=0.5), floor=FOUR),
        Method("JSD, loss alone, float32 kernels", _of_arrays(_fused, beta=0.5), floor=TWO, bound=alone),
        Method("JSD, plain JAX (jliger.reference), float32 kernels", _loss_and_gradients(_plain, beta=0.5), floor=FOUR),
    ]


def _fused(arrays: Arrays, hard_weight: float = 0.0, **options: Any) -> Any:
    labels = arrays.labels if hard_weight else None
    return losses.fused_linear_jsd(*arrays[:4], labels=labels, hard_weight=hard_weight, **options)


def _plain(arrays: Arrays, **options: Any) -> Any:
    return reference.fused_linear_jsd(*arrays[:4], **options)


def _of_arrays(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arrays: loss(Arrays(*arrays), **options)


def _loss_and_gradients(loss: Callable[..., Any], wrt: tuple[int, ...] = (0, 1), **options: Any) -> Callable[..., Any]:
    """Loss and gradients with respect to the student's hidden states (0), its kernel (1), or both."""

    def function(*operands: Array) -> Any:
        arrays = Arrays(*operands)

        def of_student(hidden: Array, kernel: Array) -> Any:
            return loss(arrays._replace(student_hidden=hidden, student_kernel=kernel), **options)

        return jax.value_and_grad(of_student, wrt)(arrays.student_hidden, arrays.student_kernel)

    return function


def _operands(shape: Shape, kernel_dtype: str) -> Arrays:
    dtype = problem.hidden_dtype()
    student, teacher = (problem.operands(one, dtype, kernel_dtype) for one in (shape.student, shape.teacher))
    # Both models come from the same random numbers. Reversing the teacher's columns makes them different.
    return Arrays(*student[:2], teacher[0], teacher[1][:, ::-1], student[2])


def _floors(shape: Shape) -> list[Floor]:
    """The student's three products and the teacher's one, and the products of both models' logits only."""
    three, one = problem.head_floors(shape.student)
    _, teacher = problem.head_floors(shape.teacher)
    assert three.times == 1, shape

    def of_four(*operands: Array) -> tuple[Array, ...]:
        return (*problem.three_products(*operands[:3]), problem.logits_product(*operands[3:]))

    def of_two(*operands: Array) -> tuple[Array, ...]:
        return problem.logits_product(*operands[:2]), problem.logits_product(*operands[2:])

    return [
        Floor(FOUR, of_four, lambda: (*three.operands(), *teacher.operands()), 1, three.flops + teacher.flops),
        Floor(TWO, of_two, lambda: (*one.operands(), *teacher.operands()), 1, one.flops + teacher.flops),
    ]
