"""The options of a norm, the same for every backend."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from jliger.core.backend import Choice


class NormConfig(NamedTuple):
    """The options of a norm.

    Attributes:
      epsilon: added to the variance, or to the mean of squares.
      scale_offset: added to the scale.
      centered: whether the mean is subtracted (layer norm), or not (RMS norm).
      round_first: whether the normalized values are rounded before the scale multiplies them.
      with_offset: whether there is an offset.
      dtype: the dtype of the result.
      implementation: the backend.
      compute_capability: the GPU to compile for, or None for the one present.
    """

    epsilon: float
    scale_offset: float
    centered: bool
    round_first: bool
    with_offset: bool
    dtype: Any
    implementation: Choice
    compute_capability: int | None = None


class NormInputs(NamedTuple):
    """The arrays of a norm. `residual` is added to `x` first; None for 0. `offset` is added last; None for 0."""

    x: Float[Array, "*B H"]
    residual: Float[Array, "*B H"] | None
    scale: Float[Array, " H"]
    offset: Float[Array, " H"] | None


class NormResult(NamedTuple):
    """The result, and what the backward pass needs beside the inputs.

    Attributes:
      output: the normalized, scaled values.
      total: `x + residual`, or None without a residual.
      mean: of each row, or None for an RMS norm.
      inverse: the factor of each row, `1 / √(variance + epsilon)`.
    """

    output: Float[Array, "*B H"]
    total: Float[Array, "*B H"] | None
    mean: Float[Array, "*B"] | None
    inverse: Float[Array, "*B"]


class NormSaved(NamedTuple):
    """What the backward pass gets. Fields are as in `NormResult`; `total` is `x` without a residual.

    Attributes:
      grad: the cotangent of the output.
      total_grad: the cotangent of `x + residual`, or None without a residual.
    """

    total: Float[Array, "*B H"]
    scale: Float[Array, " H"]
    mean: Float[Array, "*B"] | None
    inverse: Float[Array, "*B"]
    grad: Float[Array, "*B H"]
    total_grad: Float[Array, "*B H"] | None


class NormGrads(NamedTuple):
    """Gradients. That of `x` is that of the residual too. Those of parameters are sums in the accumulator's dtype."""

    x: Float[Array, "*B H"]
    scale: Float[Array, " H"]
    offset: Float[Array, " H"] | None
