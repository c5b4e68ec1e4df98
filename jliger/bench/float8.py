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
    return [
        *methods.own(shape, dtypes),
        *(_float8(dtype, "float8") for dtype in dtypes),
        _float8(first, "float8_forward"),
        _float8(first, "float8", "all tokens count", ignore_index=None),
        _float8(first, "float8", "chunk_size=4096", chunk_size=4096),
        *(_per_token(shape, first) if shape is not SMALL[0] else ()),
    ]


def _float8(dtype: str, products: Products, what: str = "", **options: Any) -> Method:
    name = methods.own_name(dtype, f"{products}, {what}" if what else products)
    step = methods.loss_and_gradients(functools.partial(methods.fused, products=products, **options))
    timed = dtype == "float32" and products == "float8" and not what
    return Method(name, step, dtype, baseline=methods.own_name(dtype), first_call=timed)


def _per_token(shape: Shape, dtype: str) -> list[Method]:
    """Losses of tokens in 16 and 8 bits, which cost what log-probabilities do."""
    (own,) = methods.per_token(shape, [dtype])
    step = functools.partial(methods.token_losses_and_gradients, products="float8")
    in_8_bits = Method(methods.own_name(dtype, "float8, per token"), step, dtype, baseline=own.name)
    return [dataclasses.replace(own, first_call=False), in_8_bits]
