"""`jax.export` with a symbolic number of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jliger

KERNEL = jnp.sin(jnp.arange(40.0)).reshape(4, 10)


def cross_entropy(hidden, labels, implementation, kernel=KERNEL):
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels, chunk_size=4, implementation=implementation)


def logprobs(hidden, labels, implementation, **options):
    result = jliger.linear_logprobs(hidden, KERNEL, labels, implementation=implementation, **options)
    return (result.logprobs + result.entropy).sum()


def kept(hidden, labels, implementation):
    return logprobs(hidden, labels, implementation, keep_logits=True)


def kept_in_part(hidden, labels, implementation):
    return logprobs(hidden, labels, implementation, keep_logits=8 * 10 * 4, chunk_size=4)


def kl(hidden, labels, implementation):
    options = {"labels": labels, "hard_weight": 0.5, "implementation": implementation}
    return jliger.losses.fused_linear_kl(hidden, KERNEL, hidden, jnp.cos(KERNEL), chunk_size=4, **options)


def shapes(*batch, features=4):
    return jax.ShapeDtypeStruct((*batch, features), jnp.float32), jax.ShapeDtypeStruct(batch, jnp.int32)


IN_PART = pytest.param(kept_in_part, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("loss", [cross_entropy, logprobs, kept, IN_PART, kl], ids=lambda loss: loss.__name__)
@jax.default_matmul_precision("highest")
def test_a_symbolic_number_of_tokens(loss):
    def value_and_grad(hidden, labels):
        return jax.value_and_grad(loss)(hidden, labels, "xla")

    dims = export.symbolic_shape("batch, length" if loss is cross_entropy else "tokens")
    exported = export.export(jax.jit(value_and_grad))(*shapes(*dims))
    # Fewer tokens than a chunk, and several chunks. Each number is a compilation, so the losses share them out.
    for size in {cross_entropy: (1, 9), kept: (1,)}.get(loss, (9,)):
        batch = (2, size) if loss is cross_entropy else (size,)
        hidden = jnp.cos(jnp.arange(4.0 * np.prod(batch))).reshape(*batch, 4)
        labels = (jnp.arange(np.prod(batch), dtype=jnp.int32) % 10).reshape(batch).at[..., 3:5].set(-100)
        result, expected = exported.call(hidden, labels), value_and_grad(hidden, labels)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), result, expected)


def test_what_may_not_be_symbolic():
    tokens, vocab = export.symbolic_shape("tokens, vocab")
    kernel = jax.ShapeDtypeStruct((4, vocab), jnp.float32)
    function = jax.jit(lambda hidden, labels, kernel: cross_entropy(hidden, labels, "xla", kernel))
    with pytest.raises(ValueError, match=r"kernel got the symbolic shape \(4, vocab\); export with numbers"):
        export.export(function)(*shapes(tokens), kernel)
    pytest.importorskip("jax_triton")
    refused = pytest.raises(ValueError, match="keep_logits got True with hidden of the symbolic shape")
    with jliger.compute_capability(90), refused:
        export.export(jax.jit(lambda hidden, labels: kept(hidden, labels, "triton")))(*shapes(tokens))
