"""Every test that takes `implementation` runs once for each backend that there is here."""

import jax
import pytest

from jliger.testing.oracle import IMPLEMENTATIONS, ON_GPU

if not ON_GPU:
    # Compiling takes most of these tests' time on a CPU.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param
