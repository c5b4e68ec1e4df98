"""The head benchmark: compares loss and gradients on one device with the matrix products that they need."""

import functools
from collections.abc import Sequence

import jax

from jliger.bench import methods, peers
from jliger.bench.problem import Method, Problem, Shape, head_floors, hidden_dtype, operands

MAIN = Shape(8192, 4096, 128256)
SMALL = [Shape(8192, 2048, 131072), Shape(8192, 1024, 50304)]  # where gaps between kernels matter most
LONG = [Shape(32768, 4096, 128256), Shape(131072, 4096, 128256)]
RAGGED = Shape(8191, 4096, 128257)  # compared with the products of MAIN: products of odd sizes are slower
OTHERS = [Shape(8192, 5120, 151936), Shape(16384, 2304, 256000), Shape(4096, 896, 151936)]
CPU_SHAPE = Shape(1024, 256, 16384)


def problems(*, with_peers: bool = False, quick: bool = False, only: Sequence[str] = ()) -> list[Problem]:
    """The problems to measure: one small shape on a CPU; on a GPU all shapes, or only the first if `quick`."""
    if jax.default_backend() != "gpu":
        return [problem(CPU_SHAPE, [*methods.own(CPU_SHAPE, ["float32"]), methods.plain("float32")])]
    if quick:
        quick_methods = [*methods.own(MAIN), *methods.flagged(MAIN), methods.plain()]
        return [problem(MAIN, quick_methods, with_peers=with_peers)]
    result = [problem(MAIN, _all_methods(MAIN), with_peers=with_peers)]
    for shape in SMALL:
        some = [*methods.own(shape), *methods.per_token(shape, ["float32"]), methods.plain()]
        some += methods.flagged(shape) if shape == SMALL[-1] else []
        result.append(problem(shape, some, with_peers=with_peers))
    # If full logits do not fit, or hardly, only their memory is measured: the compiler reports it without running.
    memory_of = [methods.plain(dtype, memory_only=True) for dtype in ("bfloat16", "float32")]
    result.append(problem(LONG[0], [*methods.own(LONG[0]), methods.plain(), memory_of[1]]))
    result.append(problem(RAGGED, methods.own(RAGGED, ["float32"]), floors_of=MAIN))
    result += [problem(shape, methods.own(shape, ["float32"])) for shape in OTHERS]
    result.append(problem(LONG[1], [*methods.own(LONG[1], ["float32"]), *memory_of]))
    known = [str(one.shape) for one in result]
    if unknown := set(only) - set(known):
        raise SystemExit(f"--only got {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return [one for one in result if not only or str(one.shape) in only]


def problem(
    shape: Shape, to_measure: Sequence[Method], *, with_peers: bool = False, floors_of: Shape | None = None
) -> Problem:
    """The problem of one shape, compared with the products of `floors_of`, or with its own."""
    return Problem(
        shape,
        functools.partial(operands, shape, hidden_dtype()),
        head_floors(floors_of or shape),
        to_measure,
        peers.torch_peers(shape, at_all_settings=shape == MAIN) if with_peers else [],
    )


def _all_methods(shape: Shape) -> list[Method]:
    return [
        *methods.own(shape),
        *methods.flagged(shape)[1:],
        *methods.per_token(shape),
        *methods.options(shape),
        methods.plain(first_call=True),
        methods.plain("float32"),
        methods.checkpointed(),
        *methods.tokamax(),
    ]
