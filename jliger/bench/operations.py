"""The benchmark of norms, rotary embeddings and gated products: XLA and Triton, compared with a copy of their bytes.

Each program does its work several times, on operands of their own that together are larger than the L2 cache: a
single call of the smaller shapes takes about as long as Python needs to start it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jliger
from jliger.bench.problem import Bound, Method, Problem
from jliger.core.backend import Implementation, can_run_triton, has_triton

MIB = 2**20
ELEMENTS = 2**24
TOTAL = 2**27  # elements of one operand in all repetitions of a program
FORWARD, BOTH = "forward", "forward and backward"


@dataclasses.dataclass(frozen=True)
class Shape:
    """An operation and its shape: tokens, and the dimensions of a token."""

    operation: str
    tokens: int
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.operation} ({', '.join(map(str, (self.tokens, *self.dims)))})"

    @property
    def elements(self) -> int:
        return self.tokens * math.prod(self.dims)

    @property
    def repeats(self) -> int:
        return max(1, TOTAL // self.elements) if jax.default_backend() == "gpu" else 2


@dataclasses.dataclass(frozen=True)
class Case:
    """How an operation is measured.

    Attributes:
      arrays: the number of operands `[tokens, *dims]`; the cotangents of its results come after them.
      results: the number of results, of the same shape.
      parameters: the number of parameters `[H]`.
      moved: the arrays of that shape that the forward pass must read or write, and the same for the backward pass.
      functions: by backend; each takes the arrays, then the parameters.
      left_out: the gradients that are not returned: a residual's is that of `x`, and to return both takes a copy.
    """

    arrays: int
    results: int
    parameters: int
    moved: tuple[int, int]
    functions: dict[str, Callable[..., Any]]
    left_out: tuple[int, ...] = ()


def problems(*, quick: bool = False) -> list[Problem]:
    """The problems to measure: small ones on a CPU; if `quick`, one shape of each operation."""
    of_rows = [_problem(shape) for shape in _shapes(quick=quick)]
    return [*of_rows, *_loss_problems(quick=quick), *_mlp_problems(quick=quick)]


def _shapes(*, quick: bool) -> list[Shape]:
    norms = ("rms_norm", "rms_norm with residual", "layer_norm")
    if jax.default_backend() != "gpu":
        shapes = [Shape(name, 16, (64,)) for name in (*norms, "swiglu", "geglu")]
        return [*shapes, Shape("apply_rope", 16, (2, 16))]
    widths = (4096,) if quick else (1024, 2048, 4096, 8192)
    shapes = [Shape(name, ELEMENTS // width, (width,)) for name in norms for width in widths]
    if not quick:
        shapes += [Shape(name, 131072, (4096,)) for name in norms]
        shapes += [Shape("rms_norm", 8192, (5120,))]
    shapes += [Shape(name, 8192, (14336,)) for name in ("swiglu", "geglu")]
    shapes += [Shape("apply_rope", 4096, (32, 128)), Shape("apply_rope, interleaved", 4096, (32, 128))]
    if not quick:
        shapes += [
            Shape("swiglu", 2048, (8192,)),
            Shape("geglu", 2048, (8192,)),
            Shape("apply_rope", 131072, (32, 128)),
        ]
    return shapes


def _problem(shape: Shape) -> Problem:
    case = _case(shape)
    methods: list[Method] = []
    for direction in (FORWARD, BOTH):
        for backend, function in case.functions.items():
            methods.append(_method(shape, case, backend, function, direction))
    methods.append(_method(shape, dataclasses.replace(case, moved=(2, 0)), "copy", lambda x, *_: -x, FORWARD))
    return Problem(shape, functools.partial(_operands, shape, case), [], methods)


def _method(shape: Shape, case: Case, backend: str, function: Callable[..., Any], direction: str) -> Method:
    moved = case.moved[0] if direction == FORWARD else sum(case.moved)
    step = functools.partial(_forward if direction == FORWARD else _both, case, function)
    about: dict[str, Any] = {"operation": shape.operation, "backend": backend, "direction": direction}
    if direction == BOTH:
        about["saved_mib"] = _saved_bytes(shape, case, function) / MIB
    return Method(
        f"{backend}, {direction}",
        functools.partial(_repeated, step, shape.repeats),
        floor=None,
        bound=Bound((), shape.repeats * moved * 2 * shape.elements),
        baseline=None if backend in ("xla", "copy") else f"xla, {direction}",
        repeats=shape.repeats,
        about=about,
    )


def _case(shape: Shape) -> Case:
    def rms(implementation: Implementation, x: Array, scale: Array) -> Array:
        return jliger.rms_norm(x, scale, implementation=implementation)

    def residual(implementation: Implementation, x: Array, residual: Array, scale: Array) -> Any:
        return jliger.rms_norm(x, scale, residual=residual, implementation=implementation)

    def layer(implementation: Implementation, x: Array, scale: Array, offset: Array) -> Array:
        return jliger.layer_norm(x, scale, offset, implementation=implementation)

    if shape.operation == "rms_norm":
        return Case(1, 1, 1, (2, 3), _backends(rms, _plain_rms))
    if shape.operation == "rms_norm with residual":
        plain = lambda x, y, scale: (_plain_rms(x + y, scale), x + y)  # noqa: E731
        return Case(2, 2, 1, (4, 4), _backends(residual, plain), left_out=(1,))
    if shape.operation == "layer_norm":
        return Case(1, 1, 2, (2, 3), _backends(layer, _plain_layer))
    if shape.operation.startswith("apply_rope"):
        return Case(1, 1, 0, (2, 2), _rope(shape))
    return Case(2, 1, 0, (3, 5), _products(shape.operation))


def _products(operation: str) -> dict[str, Callable[..., Any]]:
    if operation == "swiglu":
        return {"xla": jliger.swiglu, "plain JAX": lambda gate, up: jax.nn.silu(gate) * up}
    return {"xla": jliger.geglu, "plain JAX": lambda gate, up: jax.nn.gelu(gate) * up}


def _backends(function: Callable[..., Any], plain: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    names = ["xla", *(["triton"] if _has_kernels() else [])]
    return {**{name: functools.partial(function, name) for name in names}, "plain JAX": plain}


def _rope(shape: Shape) -> dict[str, Callable[..., Any]]:
    positions, pairs = jnp.arange(shape.tokens), shape.dims[-1] // 2
    interleaved = shape.operation.endswith("interleaved")

    def angles() -> Array:
        return positions[:, None] * 10000.0 ** (-jnp.arange(pairs) / pairs)[None]

    def plain(x: Array) -> Array:
        cos, sin = jnp.cos(angles())[:, None], jnp.sin(angles())[:, None]
        x32 = x.astype(jnp.float32)
        first, second = (x32[..., ::2], x32[..., 1::2]) if interleaved else jnp.split(x32, 2, axis=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        result = jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
        return result.astype(x.dtype)

    return {"xla": lambda x: jliger.apply_rope(x, positions, interleaved=interleaved), "plain JAX": plain}


def _has_kernels() -> bool:
    return has_triton() and can_run_triton()


def _plain_rms(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * scale


def _plain_layer(x: Array, scale: Array, offset: Array) -> Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-6)
    return (normalized * scale + offset).astype(x.dtype)


def _operands(shape: Shape, case: Case, dtype: str) -> tuple[Array, ...]:
    """The arrays, parameters and cotangents of every repetition."""
    del dtype
    count = case.arrays + case.parameters + case.results
    keys = jax.random.split(jax.random.key(0), shape.repeats * count)

    def operand(index: int, key: Array) -> Array:
        is_parameter = case.arrays <= index < case.arrays + case.parameters
        return jax.random.normal(key, shape.dims if is_parameter else (shape.tokens, *shape.dims), jnp.bfloat16)

    return tuple(operand(index % count, key) for index, key in enumerate(keys))


def _repeated(step: Callable[..., Any], repeats: int, *operands: Array) -> Any:
    """Runs `step` on each of several equal groups of operands, one after the other."""
    count = len(operands) // repeats
    results: list[Any] = []
    for index in range(repeats):
        own = operands[index * count : (index + 1) * count]
        if results:
            # XLA must not fuse repetitions with each other.
            own, results[-1] = jax.lax.optimization_barrier((own, results[-1]))
        results.append(step(*own))
    return results


def _forward(case: Case, function: Callable[..., Any], *operands: Array) -> Any:
    return function(*operands[: case.arrays + case.parameters])


def _both(case: Case, function: Callable[..., Any], *operands: Array) -> Any:
    inputs, cotangents = operands[: case.arrays + case.parameters], operands[case.arrays + case.parameters :]
    results, pull_back = jax.vjp(function, *inputs)
    # In a model there is much between the two passes: XLA must not fuse them.
    results, cotangents = jax.lax.optimization_barrier((results, cotangents))
    grads = pull_back(cotangents if case.results > 1 else cotangents[0])
    return results, [grad for index, grad in enumerate(grads) if index not in case.left_out]


def _saved_bytes(shape: Shape, case: Case, function: Callable[..., Any]) -> int:
    """The bytes that are kept from the forward pass for the backward pass, inputs among them."""
    operands = jax.eval_shape(functools.partial(_operands, shape, case, ""))[: case.arrays + case.parameters]
    saved = jax.eval_shape(lambda *inputs: jax.vjp(function, *inputs)[1], *operands)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


def _loss_problems(*, quick: bool) -> list[Problem]:
    """The loss of given logits."""
    sizes = [(8192, 128256)] if quick else [(8192, 128256), (16384, 32000)]
    if jax.default_backend() != "gpu":
        sizes = [(16, 64)]

    def plain(implementation: None, logits: Array, labels: Array) -> Array:
        del implementation
        logits = logits.astype(jnp.float32)
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - label_logits).mean()

    def ours(implementation: Implementation, logits: Array, labels: Array) -> Array:
        return jliger.softmax_cross_entropy(logits, labels, implementation=implementation)

    def operands(size: tuple[int, int], dtype: str) -> tuple[Array, ...]:
        del dtype
        keys = jax.random.split(jax.random.key(0))
        return jax.random.normal(keys[0], size, jnp.bfloat16), jax.random.randint(keys[1], size[:1], 0, size[1])

    def method(size: tuple[int, int], backend: str, direction: str) -> Method:
        loss = functools.partial(plain if backend == "plain JAX" else ours, None if backend == "plain JAX" else backend)
        moved = 1 if direction == FORWARD else 3
        return Method(
            f"{backend}, {direction}",
            loss if direction == FORWARD else jax.value_and_grad(loss),
            floor=None,
            bound=Bound((), moved * 2 * math.prod(size)),
            baseline=None if backend == "xla" else f"xla, {direction}",
            about={"operation": "softmax_cross_entropy", "backend": backend, "direction": direction},
        )

    backends = ["xla", *(["triton"] if _has_kernels() else []), "plain JAX"]
    return [
        Problem(
            f"softmax_cross_entropy {size}",
            functools.partial(operands, size),
            [],
            [method(size, backend, direction) for direction in (FORWARD, BOTH) for backend in backends],
        )
        for size in sizes
    ]


def _mlp_problems(*, quick: bool) -> list[Problem]:
    """The gated feed-forward block, all tokens at once and in chunks: its time and its memory."""
    sizes = [(8192, 4096, 14336)] if quick else [(8192, 4096, 14336), (65536, 4096, 14336)]
    if jax.default_backend() != "gpu":
        sizes = [(64, 8, 16)]

    def whole(x: Array, gate: Array, up: Array, down: Array) -> Array:
        return jliger.swiglu(x @ gate, x @ up) @ down

    def step(function: Callable[..., Any], x: Array, gate: Array, up: Array, down: Array, grad: Array) -> Any:
        result, pull_back = jax.vjp(function, x, gate, up, down)
        return result, pull_back(grad)

    def operands(size: tuple[int, int, int], dtype: str) -> tuple[Array, ...]:
        del dtype
        tokens, width, inner = size
        shapes = [(tokens, width), (width, inner), (width, inner), (inner, width), (tokens, width)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return tuple(
            jax.random.normal(key, shape, jnp.bfloat16) * width**-0.5 for key, shape in zip(keys, shapes, strict=True)
        )

    def method(name: str, function: Callable[..., Any], baseline: str | None) -> Method:
        about = {"operation": "gated_mlp", "backend": "xla", "direction": BOTH}
        return Method(name, functools.partial(step, function), floor=None, baseline=baseline, about=about)

    names = {"all tokens at once": whole, "in chunks": jliger.gated_mlp}
    if not quick:
        names["in chunks of 16384"] = functools.partial(jliger.gated_mlp, chunk_size=16384)
    return [
        Problem(
            f"gated_mlp {size}",
            functools.partial(operands, size),
            [],
            [
                method(name, function, None if function is whole else "all tokens at once")
                for name, function in names.items()
            ],
        )
        for size in sizes
    ]
