"""Collects these tests only in a process that has eight devices, and lets them read collectives."""

import sys
from pathlib import Path

import jax
import pytest

collect_ignore_glob = [] if jax.device_count() == 8 else ["*"]

sys.path.insert(0, str(Path(__file__).parent.parent / "sharding"))


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 products would be off by 1e-3, in one order of summation or another."""
    with jax.default_matmul_precision("highest"):
        yield
