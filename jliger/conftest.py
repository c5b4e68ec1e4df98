"""The `implementation` fixture, which runs a test once for each backend available on this machine."""

import jax
import pytest

from jliger.testing.oracle import IMPLEMENTATIONS, ON_GPU

# Importing these, as pytest does to look for doctests, needs trainers that the tests' environment doesn't have.
collect_ignore = [f"integrations/{trainer}.py" for trainer in ("kauldron", "keras", "maxtext", "tunix")]

if not ON_GPU:
    # On a CPU, these tests spend most of their time on compilation.
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param
