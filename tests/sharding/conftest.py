"""Lets these tests import what they share, and holds float32 products to float32 on GPUs too."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# TF32 products would be off by 1e-3, in one order of summation or another.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items):
    if jax.device_count() not in (2, 4, 8):
        reason = f"made for 2, 4 or 8 devices, not {jax.device_count()}"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))
