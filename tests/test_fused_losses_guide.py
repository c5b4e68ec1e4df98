"""What docs/fused_losses.md shows runs, and gives what the losses on full logits give."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jliger
from jliger import losses

GUIDE = (Path(__file__).parent.parent / "docs" / "fused_losses.md").read_text()


def test_the_code_of_the_guide():
    random = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((4, 6, 8), (8, 11)))
    labels = jnp.asarray(np.where(random.random((4, 6)) < 0.3, -100, random.integers(0, 11, (4, 6)))).at[1].set(-100)
    names = {"jax": jax, "jnp": jnp, "jliger": jliger}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(block, names)
    where = labels != -100
    counts = where.sum(axis=-1)

    def logprobs(temperature=1.0):
        return jliger.reference.linear_logprobs(hidden, kernel, labels, where=where, temperature=temperature)

    advantages, old = jnp.arange(4.0), -jnp.ones((4, 6))
    loss, metrics = names["grpo_loss"](hidden, kernel, labels, advantages, old, old)
    options = {"where": where, "old_logprobs": old, "ref_logprobs": old, "beta": 0.04, "entropy_coef": 0.001}
    result = logprobs(0.7)
    expected, _ = losses.grpo(result.logprobs, advantages, entropy=result.entropy, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics.count == counts.sum()

    _, metrics = names["orpo_loss"](hidden.reshape(2, 2, 6, 8), kernel, labels.reshape(2, 2, 6))
    assert metrics.count == 1  # of the other pair, one sequence is empty
    values = logprobs().logprobs
    loss = names["unlikelihood_loss"](hidden, kernel, labels, jnp.ones((4, 6)))
    np.testing.assert_allclose(loss, -jnp.log1p(-jnp.exp(values)).sum(where=where), rtol=1e-5)
    means = -values.sum(axis=-1) / jnp.maximum(counts, 1)
    np.testing.assert_allclose(names["mean_of_means"](hidden, kernel, labels), means.sum() / 3, rtol=1e-5)
