"""The benchmark of 8-bit products: loss and gradients, compared with the 16-bit products that other methods need."""

import dataclasses
import functools
from typing import Any

import jax

from jliger.bench import methods
from jliger.bench.head import CPU_SHAPE, MAIN, SMALL, problem
from jliger.bench.problem import Method, Problem, Shape
from jliger.ops.linear_head.types import Products


def problems(*, quick: bool = False) -> list[Problem]:
    """The problems to measure: one small shape on a CPU; on a GPU two, or only the first if `quick`."""
    if jax.default_backend() != "gpu":
        return [problem(CPU_SHAPE, _methods(CPU_SHAPE, methods.DTYPES[:1]))]
    return [problem(shape, _methods(shape, methods.DTYPES)) for shape in (MAIN, SMALL[0])[: 1 if quick else 2]]


def _methods(shape: Shape, dtypes: tuple[str, ...]) -> list[Method]:
    first, *_ = dtypes
    in_8_bits = [_float8(dtype, products) for dtype in dtypes for products in ("float8", "float8_forward")]
    return [
        *methods.own(shape, dtypes),
        *in_8_bits,
        _float8(first, "float8", "all tokens count", ignore_index=None),
        _float8(first, "float8", "chunk_size=4096", chunk_size=4096),
        dataclasses.replace(*methods.per_token(shape, [first]), first_call=False),
        *(_per_token(first, products) for products in ("float8", "float8_forward")),
    ]


def _float8(dtype: str, products: Products, what: str = "", **options: Any) -> Method:
    name = methods.own_name(dtype, f"{products}, {what}" if what else products)
    step = methods.loss_and_gradients(functools.partial(methods.fused, products=products, **options))
    timed = dtype == "float32" and products == "float8" and not what
    return Method(name, step, dtype, baseline=methods.own_name(dtype), first_call=timed)


def _per_token(dtype: str, products: Products) -> Method:
    step = functools.partial(methods.token_losses_and_gradients, products=products)
    name = methods.own_name(dtype, f"{products}, per token")
    return Method(name, step, dtype, baseline=methods.own_name(dtype, "per token"))
