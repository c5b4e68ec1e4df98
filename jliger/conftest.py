"""Every test that takes `implementation` runs once for each backend that there is here."""

import jax
import pytest

from jliger.oracle_for_tests import IMPLEMENTATIONS, ON_GPU

# What a user may ask of JAX: every operation has to work without implicit promotion. Tests run so, too.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if not ON_GPU:
    # Compiling takes most of these tests' time on a CPU.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param
