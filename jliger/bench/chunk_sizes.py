"""The chunk-size benchmark: loss and gradients of the head, with more and less memory for logits."""

import functools

import jax

from jliger.bench import methods
from jliger.bench.head import CPU_SHAPE, MAIN, SMALL, problem
from jliger.bench.problem import Method, Problem, Shape

SIZES = (512, 1024, 2048, 4096, 8192)


def problems(*, with_peers: bool = False) -> list[Problem]:
    on_gpu = jax.default_backend() == "gpu"
    shapes, dtypes = ([MAIN, SMALL[0]], methods.DTYPES) if on_gpu else ([CPU_SHAPE], methods.DTYPES[:1])
    result = []
    for shape in shapes:
        own = [_with_chunks(shape, dtype, size) for dtype in dtypes for size in SIZES if size <= shape.tokens]
        result.append(problem(shape, [*own, methods.plain(), methods.checkpointed()], with_peers=with_peers))
    return result


def _with_chunks(shape: Shape, dtype: str, size: int) -> Method:
    line = methods.own_name(dtype)
    step = methods.loss_and_gradients(functools.partial(methods.fused, chunk_size=size))
    about = {"line": line, "setting": f"chunk_size={size}"}
    return Method(f"{line}, chunk_size={size}", step, dtype, bound=methods.bound(shape), about=about)
