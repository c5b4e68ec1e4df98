"""What docs/distillation.md shows, runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

GUIDE = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text()


def test_the_code_of_the_guide_runs():
    random = np.random.default_rng(0)
    sizes = {
        "student_hidden": (2, 6, 8),
        "student_kernel": (8, 11),
        "teacher_hidden": (2, 6, 12),
        "teacher_kernel": (12, 11),
    }
    names = {name: jnp.asarray(random.normal(size=size), jnp.float32) for name, size in sizes.items()}
    names["labels"] = jnp.asarray(random.integers(0, 11, (2, 6))).at[0, :2].set(-100)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["metrics"].weight == 10
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((names["loss"], names["grads"])))
