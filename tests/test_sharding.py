"""Sharding, on eight CPU devices: that takes a process of its own, started with them.

The cases are in tests/sharding. On a machine with 2, 4 or 8 GPUs they run on those, with Triton:
`JLIGER_SHARDING_TESTS=1 python -m pytest tests/sharding`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jliger.core.backend import has_triton

FOLDER = Path(__file__).parent / "sharding"

# A loss and its gradients, with Auto and with Explicit axes; then how often the persistent cache had and lacked them.
CACHED = """
import collections, jax, jax.numpy as jnp, jliger
from jax.sharding import AxisType, PartitionSpec as P

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
for axis_type in (AxisType.Auto, AxisType.Explicit):
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(axis_type,))) as mesh:
        hidden = jax.device_put(jnp.ones((8, 4, 16)), P("data"))
        kernel = jax.device_put(jnp.ones((16, 64)), P("data"))
        labels = jax.device_put(jnp.zeros((8, 4), jnp.int32), P("data"))
        program = jax.jit(jax.value_and_grad(jliger.fused_linear_cross_entropy, (0, 1))).lower(hidden, kernel, labels)
        events = collections.Counter()
        jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/")[-1]]))
        program.compile()
        print(axis_type.name, events["cache_hits"], events["cache_misses"])
        jax.monitoring.clear_event_listeners()
"""


def run(*command, **environment):
    """A process that sees eight CPU devices; its output, shown if it fails."""
    # What LLVM optimizes is most of compiling, and nothing that is looked at here.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON_INTERPRET"))
    }
    environment = {**inherited, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=FOLDER.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"exit status {done.returncode} of {' '.join(command)}:\n{done.stdout}", pytrace=False)
    return done.stdout


def run_cases(*arguments, **environment):
    # Two at a time: each case compiles, with one thread for the most part.
    options = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-n", "2")
    return run("-m", "pytest", *options, *arguments, str(FOLDER), JLIGER_SHARDING_TESTS="1", **environment)


def test_cases_with_xla():
    assert " passed" in run_cases()


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_cases_with_triton_interpreted():
    # Each device's computation waits in a thread for what it calls back to, which takes threads too.
    assert " passed" in run_cases(TRITON_INTERPRET="1", NPROC="32")


def test_the_persistent_compilation_cache_hits(tmp_path):
    def counts():
        lines = run("-c", CACHED, JAX_COMPILATION_CACHE_DIR=str(tmp_path)).splitlines()
        found = [line.split() for line in lines if line.startswith(("Auto", "Explicit"))]
        return {name: (int(hits), int(misses)) for name, hits, misses in found}

    first, second = counts(), counts()
    assert first == {"Auto": (0, 1), "Explicit": (0, 1)}
    assert second == {"Auto": (1, 0), "Explicit": (1, 0)}
