"""The parts of a benchmark: problems, methods, floors and bounds.

A *floor* is the time of the matrix products that every method needs. A *bound* also includes the time to move the bytes
that must be moved outside of the products.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jliger.bench.timing import Timed

FLOOR_LOGITS = 2**32  # with more logits, the floor is timed on a fraction of the tokens and multiplied
THREE, ONE, FOUR, TWO = "three products", "one product", "four products", "two products"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a problem: `tokens` N, `hidden` H, `vocab` V."""

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
        """The bytes of one array of 16-bit logits."""
        return 2 * self.tokens * self.vocab

    @property
    def cast_bytes(self) -> int:
        """The bytes moved by a cast of the kernel from 32 to 16 bits, or from 16 to 32."""
        return 6 * self.hidden * self.vocab


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound of the time: that of products, plus that of bytes that must be moved outside of them.

    Attributes:
      floors: the names of the floors whose times are added.
      bytes: the bytes read and written, at the bandwidth of a copy.
    """

    floors: tuple[str, ...]
    bytes: int

    def seconds(self, floors: Mapping[str, float], bandwidth: float) -> float:
        return sum(floors[name] for name in self.floors) + self.bytes / bandwidth


@dataclasses.dataclass(frozen=True)
class Method:
    """One method of computing a loss.

    Attributes:
      name: the name in tables.
      function: takes the problem's operands.
      kernel_dtype: the dtype of the kernel among its operands: `"float32"` or `"bfloat16"`.
      floor: the name of the floor that it is compared with, or None.
      bound: its bound, or None.
      baseline: the name of another method that it is compared with, or None.
      flags: XLA flags, in addition to those of the process.
      first_call: whether its first call is timed.
      memory_only: whether it is only compiled and not run, because it does not fit in memory.
      repeats: how many times `function` does its work; its time is divided by it, and so is that of its bound.
      about: more fields of its record.
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
    repeats: int = 1
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Floor:
    """A program of matrix products and nothing else.

    Attributes:
      name: the name that methods refer to.
      function: takes `operands`.
      operands: makes the operands, in the products' dtype.
      times: the factor from this program to the problem's products.
      flops: floating-point operations of the problem's products.
    """

    name: str
    function: Callable[..., Any]
    operands: Callable[[], tuple[Array, ...]]
    times: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method of another library, outside of JAX.

    Attributes:
      name: the name in tables.
      prepare: makes its operands; returns the call to time, and a function that measures its extra memory in bytes.
      floor: the name of the floor that it is compared with.
    """

    name: str
    prepare: Callable[[], tuple[Timed, Callable[[], int]]]
    floor: str = THREE


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shape, and what is measured at it.

    Attributes:
      shape: its string is the name in tables.
      operands: makes the methods' operands, given the kernel's dtype.
      floors: the floors that methods are compared with.
      methods: methods in JAX.
      peers: methods of other libraries.
    """

    shape: Any
    operands: Callable[[str], tuple[Array, ...]]
    floors: Sequence[Floor]
    methods: Sequence[Method]
    peers: Sequence[Peer] = ()


def hidden_dtype() -> str:
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def operands(shape: Shape, dtype: str, kernel_dtype: str) -> tuple[Array, Array, Array]:
    """Random hidden states, a kernel that gives logits with standard deviation 1, and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.hidden), jnp.dtype(dtype))
    kernel = jax.random.normal(keys[1], (shape.hidden, shape.vocab), jnp.dtype(kernel_dtype)) * shape.hidden**-0.5
    labels = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    return hidden, kernel, labels


def head_floors(shape: Shape) -> list[Floor]:
    """The products of logits, hidden gradient and kernel gradient; and the product of logits only."""
    part, times = floor_part(shape)
    return [
        Floor(THREE, three_products, functools.partial(_three_operands, part), times, 3 * shape.product_flops),
        Floor(ONE, logits_product, lambda: _three_operands(part)[:2], times, shape.product_flops),
    ]


def floor_part(shape: Shape) -> tuple[Shape, int]:
    """A shape with few enough tokens that logits and their gradients fit in memory, and the factor to `shape`."""
    times = 1
    while shape.tokens // times * shape.vocab > FLOOR_LOGITS:
        times *= 2
    return dataclasses.replace(shape, tokens=shape.tokens // times), times


def three_products(hidden: Array, kernel: Array, logit_grads: Array) -> tuple[Array, ...]:
    """The products of logits, hidden gradient and kernel gradient."""
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
    # Repeats 1024 random rows: to generate random numbers for all rows would take more memory than the products.
    rows = jax.random.normal(jax.random.key(3), (min(1024, shape.tokens), shape.vocab), hidden.dtype)
    return hidden, kernel, jnp.resize(rows, (shape.tokens, shape.vocab))
