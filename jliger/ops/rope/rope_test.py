"""Tests rotary embeddings against float64, and against their definition with complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.operations import check_operation, random, saved_bytes
from jliger.testing.oracle import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernel")

POSITIONS = jnp.asarray([[0, 1, 2, 9], [5, 3, 1000, 7]])


def plain(x, *, positions=POSITIONS, frequencies=None, interleaved=False, scale=1.0, rotated=8):
    """Pairs of features as complex numbers, op by op, in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if frequencies is None:
        frequencies = 10000.0 ** (-np.arange(rotated // 2) / (rotated // 2))
    frequencies = jnp.asarray(frequencies, dtype)
    angles = positions.astype(dtype)[..., None] * frequencies
    turned, rest = x[..., :rotated].astype(dtype), x[..., rotated:]
    pairs = turned.reshape(*turned.shape[:-1], *((-1, 2) if interleaved else (2, rotated // 2)))
    pairs = pairs if interleaved else jnp.swapaxes(pairs, -1, -2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * scale * jnp.exp(1j * angles)[..., None, :]
    turned = jnp.stack([turned.real, turned.imag], -1)
    turned = turned if interleaved else jnp.swapaxes(turned, -1, -2)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], rotated).astype(x.dtype), rest], -1)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        pytest.param("bfloat16", {"interleaved": True}, marks=pytest.mark.exhaustive),
        ("float16", {"rotated": 4, "scale": 1.2}),
        ("float16", {"rotated": 6, "interleaved": True}),
        ("bfloat16", {"rotated": 4, "interleaved": True, "frequencies": np.array([1.0, 0.3])}),
    ],
)
def test_as_exact_as_plain_jax(dtype, options):
    options = dict(options)
    reference = functools.partial(plain, **options)
    options["rotary_fraction"] = options.pop("rotated", 8) / 8
    check_operation(
        functools.partial(jliger.apply_rope, positions=POSITIONS, **options),
        reference,
        {"x": random(0, 2, 4, 3, 8, dtype=dtype)},
    )


def test_several_positions_of_a_token():
    """As in Qwen2-VL: each pair belongs to time, height or width."""
    x, sections = random(0, 2, 4, 3, 12), jnp.stack([POSITIONS, POSITIONS[::-1], POSITIONS + 3])
    frequencies = 10000.0 ** (-np.arange(6) / 6)
    owner = np.repeat([0, 1, 2], [1, 2, 3])
    table = np.where(owner == np.arange(3)[:, None], frequencies, 0)
    result = jliger.apply_rope(x, sections, frequencies=table)
    for pair, section in enumerate(owner):
        one = plain(x[..., [pair, pair + 6]], positions=sections[section], frequencies=frequencies[[pair]], rotated=2)
        np.testing.assert_allclose(result[..., [pair, pair + 6]], one, rtol=1e-5, atol=1e-5)


def test_several_positions_that_are_broadcast_to_a_batch():
    """XLA's CPU compiler must not see a sum over sections, which it gets wrong."""
    x, sections = jnp.ones((32, 64, 1, 16)), np.indices((4, 16)).reshape(2, 1, 64)
    table = np.kron(np.eye(2), 100.0 ** (-np.arange(4) / 4))

    @jax.jit
    def rotated(x):
        return jliger.apply_rope(x, jnp.broadcast_to(jnp.asarray(sections), (2, 32, 64)), frequencies=table)

    angles = np.einsum("st,sp->tp", sections[:, 0], table)
    expected = np.cos(angles) - np.sin(angles)
    np.testing.assert_allclose(rotated(x)[:, :, 0, :8], np.broadcast_to(expected, (32, 64, 8)), rtol=1e-5, atol=1e-5)


def test_only_angles_are_saved():
    x = random(0, 2, 4, 3, 8, dtype="bfloat16")
    saved = saved_bytes(lambda x: jliger.apply_rope(x, POSITIONS), x)
    assert saved == POSITIONS.size * 4 * 4


def test_frequencies_have_no_gradient():
    frequencies = jnp.ones(4)
    grad = jax.grad(lambda f: jliger.apply_rope(random(0, 2, 4, 3, 8), POSITIONS, frequencies=f).sum())(frequencies)
    np.testing.assert_array_equal(grad, np.zeros(4))


def test_a_batch_is_a_loop():
    x = random(0, 3, 4, 2, 8)
    positions = jnp.arange(12).reshape(3, 4)
    result = jax.vmap(jliger.apply_rope)(x, positions)
    np.testing.assert_allclose(result, jliger.apply_rope(x, positions), rtol=1e-6, atol=1e-6)


X = jnp.ones((2, 4, 3, 8))


@pytest.mark.parametrize(
    ("x", "positions", "options", "error", "message"),
    [
        (X, jnp.arange(4), {}, ValueError, r"positions got shape \(4,\)"),
        (X, POSITIONS != 0, {}, TypeError, "positions got dtype bool"),
        (X, jnp.stack([POSITIONS] * 2), {}, ValueError, "frequencies got None"),
        (X, POSITIONS, {"rotary_fraction": 0.4}, ValueError, "rotary_fraction got 0.4, which makes 3.2 of 8"),
        (X, POSITIONS, {"frequencies": np.ones(3, np.float32)}, ValueError, r"frequencies got shape \(3,\)"),
        (X, POSITIONS, {"theta": 0}, ValueError, "theta got 0"),
        (X, POSITIONS, {"implementation": "triton"}, ValueError, "implementation got 'triton'"),
        (X.astype(int), POSITIONS, {}, TypeError, "x got dtype int32"),
    ],
)
def test_errors_name_the_argument(x, positions, options, error, message):
    with pytest.raises(error, match=message):
        jliger.apply_rope(x, positions, **options)


def test_a_fraction_that_floats_do_not_hold():
    x = jnp.ones((1, 3, 2, 100))
    positions = jnp.arange(3)[None]
    result = jliger.apply_rope(x, positions, rotary_fraction=0.14)
    np.testing.assert_array_equal(result[..., 14:], x[..., 14:])
    assert (result[:, 1:, :, :14] != 1).any()
