"""The benchmark of 8-bit products: loss and gradients, compared with the 16-bit products that other methods need."""

import functools
from typing import Any

import jax

from jliger.bench import methods
from jliger.bench.head import CPU_SHAPE, MAIN, SMALL, problem
from jliger.bench.problem import Method, Problem, Shape


def problems(*, quick: bool = False) -> list[Problem]:
    """The problems to measure: one small shape on a CPU; on a GPU two, or only the first if `quick`."""
    if jax.default_backend() != "gpu":
        return [problem(CPU_SHAPE, _methods(CPU_SHAPE, methods.DTYPES[:1]))]
    return [problem(shape, _methods(shape, methods.DTYPES)) for shape in (MAIN, SMALL[0])[: 1 if quick else 2]]


def _methods(shape: Shape, dtypes: tuple[str, ...]) -> list[Method]:
    first, *_ = dtypes
    own = [method for dtype in dtypes for method in (*methods.own(shape, [dtype]), _float8(dtype))]
    all_count = _float8(first, "all tokens count", ignore_index=None)
    return [*own, all_count, _float8(first, "chunk_size=4096", chunk_size=4096)]


def _float8(dtype: str, what: str = "", **options: Any) -> Method:
    name = methods.own_name(dtype, f"float8, {what}" if what else "float8")
    step = methods.loss_and_gradients(functools.partial(methods.fused, products="float8", **options))
    return Method(name, step, dtype, baseline=methods.own_name(dtype), first_call=dtype == "float32" and not what)
