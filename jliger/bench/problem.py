"""What a benchmark is made of: problems, the methods that solve them, and what no method can do without."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.bench.timing import Timed

FLOOR_LOGITS = 2**32  # a floor of more logits is that of fewer tokens, several times
THREE, ONE, FOUR, TWO = "three products", "one product", "four products", "two products"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A problem's size: `tokens` N, `hidden` H, `vocab` V."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.hidden}, {self.vocab})"

    @property
    def product_flops(self) -> int:
        return 2 * self.tokens * self.hidden * self.vocab

    @property
    def logit_bytes(self) -> int:
        """One array of logits, in 16 bits."""
        return 2 * self.tokens * self.vocab

    @property
    def cast_bytes(self) -> int:
        """Reading the kernel in 32 bits and writing it in 16, or the other way round."""
        return 6 * self.hidden * self.vocab


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time: that of products, and of bytes that must be moved outside of them.

    Attributes:
      floors: the names of floors whose times are added.
      bytes: read and written, at the bandwidth of a copy.
    """

    floors: tuple[str, ...]
    bytes: int

    def seconds(self, floors: Mapping[str, float], bandwidth: float) -> float:
        return sum(floors[name] for name in self.floors) + self.bytes / bandwidth


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of computing a loss.

    Attributes:
      name: as tables show it.
      function: of the problem's operands.
      kernel_dtype: which operands it gets: `"float32"` or `"bfloat16"`, for the kernel's dtype.
      floor: the products that its speed is a share of, or None.
      bound: its least time, if it is judged by that.
      baseline: another method that it is compared with, by name.
      flags: XLA's, beyond those of the process.
      first_call: whether its first call is timed, in a process of its own.
      memory_only: whether it is compiled and not run, because it does not fit.
    """

    name: str
    function: Callable[..., Any]
    kernel_dtype: str = "float32"
    floor: str | None = THREE
    bound: Bound | None = None
    baseline: str | None = None
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    first_call: bool = False
    memory_only: bool = False


@dataclasses.dataclass(frozen=True)
class Floor:
    """Matrix products and nothing else, in one program.

    Attributes:
      name: as methods name it.
      function: of `operands`.
      operands: makes them, in the products' dtype.
      times: how many times it makes up the problem's products.
      flops: of the problem's products.
    """

    name: str
    function: Callable[..., Any]
    operands: Callable[[], tuple[Array, ...]]
    times: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another library's method, which is not JAX.

    Attributes:
      name: as tables show it.
      prepare: makes its operands; returns what is timed, and a function that measures its extra memory in bytes.
      floor: the products that its speed is a share of.
    """

    name: str
    prepare: Callable[[], tuple[Timed, Callable[[], int]]]
    floor: str = THREE


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shape and what is measured at it.

    Attributes:
      shape: prints as the tables show it.
      operands: makes the methods' operands, for a kernel's dtype.
      floors: what methods are held against.
      methods: JAX's.
      peers: other libraries'.
    """

    shape: Any
    operands: Callable[[str], tuple[Array, ...]]
    floors: Sequence[Floor]
    methods: Sequence[Method]
    peers: Sequence[Peer] = ()


def hidden_dtype() -> str:
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def operands(shape: Shape, dtype: str, kernel_dtype: str) -> tuple[Array, Array, Array]:
    """Random hidden states, a kernel that gives logits of unit size, and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.hidden), jnp.dtype(dtype))
    kernel = jax.random.normal(keys[1], (shape.hidden, shape.vocab), jnp.dtype(kernel_dtype)) * shape.hidden**-0.5
    labels = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    return hidden, kernel, labels


def head_floors(shape: Shape) -> list[Floor]:
    """The products of logits, hidden gradient and kernel gradient, and that of logits alone."""
    part, times = floor_part(shape)
    return [
        Floor(THREE, three_products, functools.partial(_three_operands, part), times, 3 * shape.product_flops),
        Floor(ONE, logits_product, lambda: _three_operands(part)[:2], times, shape.product_flops),
    ]


def floor_part(shape: Shape) -> tuple[Shape, int]:
    """A shape whose logits and their gradients fit side by side, and how many times it makes up `shape`."""
    times = 1
    while shape.tokens // times * shape.vocab > FLOOR_LOGITS:
        times *= 2
    return dataclasses.replace(shape, tokens=shape.tokens // times), times


def three_products(hidden: Array, kernel: Array, logit_grads: Array) -> tuple[Array, ...]:
    """Logits, hidden gradient, kernel gradient."""
    return (
        logits_product(hidden, kernel),
        _product(logit_grads, kernel, (1, 1)),
        _product(hidden, logit_grads, (0, 0)),
    )


def logits_product(hidden: Array, kernel: Array) -> Array:
    return _product(hidden, kernel, (1, 0))


def _product(left: Array, right: Array, dims: tuple[int, int]) -> Array:
    dimensions = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=left.dtype)


def _three_operands(shape: Shape) -> tuple[Array, Array, Array]:
    hidden, kernel, _ = operands(shape, hidden_dtype(), hidden_dtype())
    # The same rows again and again: random numbers for all of them would take more memory than the products.
    rows = jax.random.normal(jax.random.key(3), (min(1024, shape.tokens), shape.vocab), hidden.dtype)
    return hidden, kernel, jnp.resize(rows, (shape.tokens, shape.vocab))
