"""`apply_rope`: its checks and defaults."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jliger.core import checks
from jliger.core.backend import Implementation
from jliger.core.dtypes import accumulator_dtype
from jliger.core.meshes import replicated
from jliger.ops.rope.rotation import Rotation, rotate


def apply_rope(
    x: Float[Array, "*B heads head_dim"],
    positions: Int[Array, "*B"] | Int[Array, " sections *B"],
    *,
    theta: float = 10000.0,
    rotary_fraction: float = 1.0,
    interleaved: bool = False,
    frequencies: Float[Array, " pairs"] | Float[Array, "sections pairs"] | None = None,
    scale: float = 1.0,
    implementation: Implementation | None = None,
) -> Float[Array, "*B heads head_dim"]:
    r"""Rotates pairs of features by angles that are proportional to the token's position.

    Of each head, the first $R$ = `rotary_fraction` · `head_dim` features are rotated. The other features do not change.
    Pair $j$ consists of features $j$ and $j + R/2$ (Llama, GPT-NeoX), or $2j$ and $2j + 1$ with `interleaved`
    (GPT-J). With position $p$, frequency $f_j$ and `scale` $s$,

    $$y_1 = s\,(x_1 \cos p f_j - x_2 \sin p f_j), \quad y_2 = s\,(x_2 \cos p f_j + x_1 \sin p f_j)$$

    (Su et al., 2021, arXiv:2104.09864). Without `frequencies`, $f_j = \theta^{-2j/R}$. Angles and arithmetic are in
    float32; the result is rounded once to x's dtype. The backward pass rotates back, and needs positions and
    frequencies only. Positions and frequencies have no gradient.

    Any dimension of `x` but the last may be sharded over a mesh.

    Args:
      x: queries or keys, `[*B, heads, head_dim]`, such as `[batch, length, heads, head_dim]`: float32, bfloat16,
        float16 or float64.
      positions: the position of each token, `[*B]`, or `[sections, *B]` for tokens with several positions, such as
        time, height and width in Qwen2-VL.
      theta: `θ`, a Python number above 0.
      rotary_fraction: the part of a head that is rotated, in (0, 1]; `R` must be an even integer.
      interleaved: which features are a pair.
      frequencies: `[R/2]`: other frequencies, such as Llama 3.1's or YaRN's. With several positions they are required,
        as `[sections, R/2]`: the angle is the sum over sections of position times frequency, so that a pair that
        belongs to one section has frequency 0 in the others.
      scale: `s`, a Python number: YaRN's attention factor.
      implementation: `"xla"` or None. There is no Triton kernel: one was measured, and was not 5 % faster than XLA.

    Returns:
      `[*B, heads, head_dim]`, in x's dtype.

    Raises:
      ValueError: a shape that does not fit, an option out of its range, or `"triton"`.
      TypeError: something that is no array, a dtype that is not supported, or an option that is not a Python number.


    Examples:
      >>> import jax.numpy as jnp, jliger
      >>> queries = jnp.ones((2, 5, 3, 8))
      >>> positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
      >>> rotated = jliger.apply_rope(queries, positions, theta=500000.0)
      >>> print(rotated.shape, bool(jnp.all(rotated[:, 0] == queries[:, 0])))
      (2, 5, 3, 8) True
    """
    x, positions = checks.as_array("x", x), checks.as_array("positions", positions)
    checks.check_floating("x", x)
    checks.check_number("scale", scale)
    checks.check_choice("implementation", implementation, ("xla", None))
    if x.ndim < 2 or not x.shape[-1]:
        raise ValueError(f"x got shape {x.shape}; pass [*B, heads, head_dim].")
    if not (jnp.issubdtype(positions.dtype, jnp.integer) or jnp.issubdtype(positions.dtype, jnp.floating)):
        raise TypeError(f"positions got dtype {positions.dtype}; pass integers or real numbers.")
    has_sections = positions.ndim == x.ndim - 1
    if positions.shape[has_sections:] != x.shape[:-2]:
        raise ValueError(
            f"positions got shape {positions.shape}; pass one position per token, {x.shape[:-2]}, or several, "
            f"(sections, {', '.join(map(str, x.shape[:-2]))}). jnp.broadcast_to makes one of positions [length]."
        )
    pairs = _pairs(x.shape[-1], rotary_fraction)
    if frequencies is None:
        if has_sections:
            raise ValueError(
                f"frequencies got None with positions of {positions.shape[0]} sections; pass one row of frequencies "
                f"per section, {(positions.shape[0], pairs)}, with 0 where a pair does not belong to the section."
            )
        checks.check_number("theta", theta)
        if theta <= 0:
            raise ValueError(f"theta got {theta!r}; pass a number above 0.")
        frequencies = jnp.asarray(float(theta) ** (-np.arange(pairs) / pairs), accumulator_dtype(x.dtype))
    frequencies = checks.as_array("frequencies", frequencies)
    expected = (*positions.shape[:has_sections], pairs)
    checks.check_shape("frequencies", frequencies, expected, "one frequency per pair, and per section if there are any")
    checks.check_floating("frequencies", frequencies)
    angles = _angles(positions, replicated(frequencies), accumulator_dtype(x.dtype), has_sections=has_sections)
    return rotate(Rotation(bool(interleaved), float(scale)), x, jax.lax.stop_gradient(angles))


def _pairs(head_dim: int, rotary_fraction: float) -> int:
    checks.check_number("rotary_fraction", rotary_fraction, least=0, most=1)
    exact = head_dim * rotary_fraction
    # 100 · 0.14 is 14.000000000000002.
    rotated = round(exact)
    if rotated < 2 or rotated % 2 or abs(exact - rotated) > 1e-6:
        raise ValueError(
            f"rotary_fraction got {rotary_fraction!r}, which makes {exact:g} of {head_dim} features; pass a fraction "
            "that makes an even number of at least 2."
        )
    return rotated // 2


def _angles(positions: Array, frequencies: Array, dtype: Any, *, has_sections: bool) -> Float[Array, "*B pairs"]:
    positions, frequencies = positions.astype(dtype)[..., None], frequencies.astype(dtype)
    token_ndim = positions.ndim - 1 - has_sections
    own = jnp.expand_dims(frequencies, tuple(range(has_sections, has_sections + token_ndim)))
    if not has_sections:
        return positions * own
    # A sum in Python, not over an axis: XLA's CPU compiler (jaxlib 0.12.0) turns a sum over an axis of products of two
    # broadcast arrays into one that reads undefined memory, as with positions that are broadcast to a batch under jit.
    first, *others = (each * its for each, its in zip(positions, own, strict=True))
    return sum(others, first)
