"""The chunk-size benchmark: loss and gradients of the head, with more and less memory for logits."""

import functools

import jax

from jliger.bench import methods
from jliger.bench.head import CPU_SHAPE, MAIN, SMALL, problem
from jliger.bench.problem import Method, Problem, Shape

SIZES = (512, 1024, 2048, 4096, 8192)


def problems(*, with_peers: bool = False) -> list[Problem]:
    """The problems to measure: one small shape on a CPU; on a GPU two, the first with peers."""
    if jax.default_backend() != "gpu":
        return [problem(CPU_SHAPE, _methods(CPU_SHAPE, methods.DTYPES[:1]))]
    return [
        problem(MAIN, _methods(MAIN, methods.DTYPES), with_peers=with_peers),
        problem(SMALL[0], _methods(SMALL[0], methods.DTYPES[:1])),
    ]


def _methods(shape: Shape, dtypes: tuple[str, ...]) -> list[Method]:
    own = [_with_chunks(shape, dtype, size) for dtype in dtypes for size in SIZES if size <= shape.tokens]
    return [*own, methods.plain(), methods.checkpointed()]


def _with_chunks(shape: Shape, dtype: str, size: int) -> Method:
    line = methods.own_name(dtype)
    step = methods.loss_and_gradients(functools.partial(methods.fused, chunk_size=size))
    about = {"line": line, "setting": f"chunk_size={size}"}
    return Method(f"{line}, chunk_size={size}", step, dtype, bound=methods.bound(shape), about=about)
