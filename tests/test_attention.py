"""The examples' attention where it is cuDNN's, with a stand-in for cuDNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTH = 5  # odd, as where a row has a token more than `--length`
OF_JAX = jax.nn.dot_product_attention


@pytest.fixture
def llama(import_example, monkeypatch):
    """The module, with an attention that refuses what cuDNN does not differentiate."""

    def cudnn(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        if query.shape[1] % 2 or query.shape[-1] % 8:
            raise NotImplementedError(f"Unsupported sequence length or head dim: {query.shape}.")
        return OF_JAX(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return import_example("llama")


def operands(size: int, dtype: str) -> tuple[jax.Array, ...]:
    """Queries of four heads, and keys and values of two."""
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.normal(size=(2, LENGTH, heads, size)), dtype) for heads in (4, 2, 2))


def test_odd_lengths_give_the_same_values_and_gradients(llama, import_example):
    decoder = import_example("decoder")
    config = decoder.DecoderConfig(8, 32, 8, 1, 4, 2, 8, query_scale=0.3)
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 2, 2, 2, 2]])
    mask = decoder.visible(segments, LENGTH, None)
    given, cotangent = operands(8, "float32"), operands(8, "float32")[0]

    @jax.jit
    def both(*given):
        ways = (
            lambda *given: llama.cudnn_attention(*given, mask, 0.3),
            lambda *given: decoder.attention(config, *given, mask),
        )
        return [(out, pull(cotangent)) for out, pull in (jax.vjp(way, *given) for way in ways)]

    padded, plain = map(jax.tree.leaves, both(*given))
    for ours, theirs in zip(padded, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [8, 12])
def test_no_length_is_refused_on_a_gpu(llama, import_example, monkeypatch, size):
    """Rows of odd length come from Medusa's heads, GRPO and images, and from any odd `--length`."""
    decoder = import_example("decoder")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = decoder.DecoderConfig(8, 4 * size, 8, 1, 4, 2, size)
    ways = [llama.attention]
    ways += [
        lambda *given, mask=mask: decoder.attention(config, *given, mask)
        for mask in (None, jnp.ones((1, 1, LENGTH, LENGTH), bool))
    ]
    for way in ways:
        gradients = jax.grad(lambda *given, way=way: way(*given).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        given = operands(size, "bfloat16")
        assert jax.tree.map(jnp.shape, jax.eval_shape(gradients, *given)) == tuple(x.shape for x in given)


def test_the_token_that_is_added_sees_itself(llama, monkeypatch):
    """Else it would have no token to attend to, and a softmax of nothing is NaN."""
    masks = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, *, mask, **_: masks.append(mask) or q)
    out = llama.cudnn_attention(*operands(8, "bfloat16"), jnp.ones((2, 1, LENGTH, LENGTH), bool))
    assert out.shape[1] == LENGTH
    assert np.asarray(masks[0]).shape == (2, 1, LENGTH + 1, LENGTH + 1)
    assert np.asarray(masks[0])[..., -1, -1].all()
