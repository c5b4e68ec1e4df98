"""The code of docs/preferences.md and docs/reinforcement_learning.md runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = "".join((DOCS / f"{page}.md").read_text() for page in ("preferences", "reinforcement_learning"))


def test_the_code_of_the_guide_runs():
    random = np.random.default_rng(0)
    hidden, ref_hidden = random.normal(size=(2, 4, 6, 8)).astype(np.float32)
    labels = np.where(random.random((4, 6)) < 0.3, -100, random.integers(0, 11, (4, 6)))
    labels[1] = -100
    names = {
        "hidden": jnp.asarray(hidden),
        "ref_hidden": jnp.asarray(ref_hidden),
        "kernel": jnp.asarray(random.normal(size=(8, 11)).astype(np.float32)),
        "labels": jnp.asarray(labels),
        "logprobs": jnp.asarray(random.uniform(-3, -1, (4, 6)).astype(np.float32)),
        "where": jnp.asarray(labels != -100),
        "advantages": jnp.asarray(random.normal(size=4).astype(np.float32)),
    }
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(block, names)
    for found in ("loss", "grads"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(names[found])), found
    assert names["metrics"].count == 1

    losses, logprobs, where = names["losses"], names["logprobs"], names["where"]
    whole, _ = losses.grpo(logprobs, names["advantages"], where=where)
    np.testing.assert_allclose(sum(names["parts"]), whole, rtol=1e-5)

    advantages = names["group_advantages"](jnp.asarray([1.0, 0.0, 0.5, 0.5]), 2)
    np.testing.assert_allclose(advantages, [1, -1, 0, 0], atol=1e-3)
    loss, metrics = names["grpo_loss"](
        names["hidden"], names["kernel"], names["labels"], advantages, logprobs, logprobs - 0.1
    )
    assert np.isfinite(loss)
    assert metrics.kl > 0
    loss, (metrics, mismatch) = names["corrected_grpo_loss"](logprobs, advantages, where, logprobs, logprobs - 0.1)
    np.testing.assert_allclose(mismatch.mean_weight, np.exp(0.1), rtol=1e-5)
    assert metrics.count == where.sum()
    pairs = (array.reshape(2, 2, 6) for array in (logprobs, logprobs - 0.1, where))
    loss, metrics = names["ld_dpo_loss"](*pairs)
    assert metrics.count == 1
    sums = logprobs.sum(axis=1)
    loss, _ = names["kto_loss"](sums, sums - 1, jnp.asarray([True, False, True, False]), sums, sums - 2)
    assert np.isfinite(loss)
