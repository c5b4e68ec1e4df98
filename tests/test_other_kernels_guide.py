"""What docs/other_kernels.md shows, runs, and gives the frequencies of the models that it names."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jliger
from jliger.testing.operations import random

GUIDE = (Path(__file__).parent.parent / "docs" / "other_kernels.md").read_text()


@pytest.fixture(scope="module")
def names():
    hidden, heads = 16, 2
    shapes = {"attention_norm": (hidden,), "mlp_norm": (hidden,), "o": (heads, 8, hidden)}
    shapes |= dict.fromkeys("qkv", (hidden, heads, 8))
    shapes |= {"gate": (hidden, 24), "up": (hidden, 24), "down": (24, hidden)}
    params = {name: random(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    known = {
        "jax": jax, "jnp": jnp, "np": np, "jliger": jliger, "rngs": nnx.Rngs(0), "hidden_size": hidden,
        "hidden": random(20, 2, 5, hidden), "model": lambda hidden: hidden, "labels": np.zeros((2, 5), np.int32),
        "queries": random(21, 2, 5, heads, 8),
        "positions": jnp.broadcast_to(jnp.arange(5), (2, 5)), "params": params,
        **{name: params[name] for name in ("gate", "up", "down")},
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 7
    before = jax.sharding.get_mesh()
    # A mesh stays set: its block is the last one.
    for block in sorted(blocks, key=lambda block: "set_mesh" in block):
        exec(block, known)
    jax.set_mesh(before)
    return known


def test_the_layer(names):
    hidden = names["hidden"]
    out, residual = jax.jit(names["layer"])(names["params"], hidden, hidden, names["positions"])
    assert out.shape == residual.shape == hidden.shape


def test_frequencies_of_llama_3(names):
    # As transformers computes them, for a head of 128 features: fast, slow and one between.
    found = names["llama3_frequencies"](64)
    plain = 500000.0 ** (-np.arange(64) / 64)
    wavelengths = 2 * np.pi / plain
    smooth = (8192 / wavelengths - 1) / 3
    between = (1 - smooth) * plain / 8 + smooth * plain
    expected = np.where(wavelengths < 2048, plain, np.where(wavelengths > 8192, plain / 8, between))
    np.testing.assert_allclose(found, expected)
    assert (smooth > 0).any()


def test_frequencies_of_yarn(names):
    found = names["yarn_frequencies"](64)
    plain = 10000.0 ** (-np.arange(64) / 64)
    assert (found[0], found[-1]) == (plain[0], plain[-1] / 16)
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(found[turns > 33], plain[turns > 33])
    np.testing.assert_allclose(found[turns < 0.9], plain[turns < 0.9] / 16)


def test_sections_cover_each_pair_once(names):
    table = names["sections"](np.arange(1.0, 65))
    np.testing.assert_array_equal(table.sum(0), np.arange(1.0, 65))
    np.testing.assert_array_equal((table != 0).sum(1), [16, 24, 24])
