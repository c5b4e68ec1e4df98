"""XLA's persistent cache has a sharded program again when it is compiled anew."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import IMPLEMENTATION

import jliger

BOTH = [AxisType.Auto, AxisType.Explicit]
OPTIONS = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}


def compile_each(axis_types):
    """Compiles a loss with its gradients."""
    for axis_type in axis_types:
        with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))):
            hidden = jax.device_put(jnp.ones((8, 4, 16)), P("data"))
            kernel = jax.device_put(jnp.ones((16, 64)), P("data"))
            labels = jax.device_put(jnp.zeros((8, 4), jnp.int32), P("data"))
            jax.jit(jax.value_and_grad(jliger.fused_linear_cross_entropy, (0, 1))).lower(
                hidden, kernel, labels
            ).compile()


def entries(folder):
    """The programs that the cache holds; beside each may lie the time of its last use."""
    return {path.name for path in folder.iterdir() if not path.name.endswith("atime")}


@pytest.mark.skipif(IMPLEMENTATION != "xla", reason="is about the program around the kernels")
def test_a_program_that_is_traced_again_has_the_same_key(tmp_path):
    options = {**OPTIONS, "jax_compilation_cache_dir": str(tmp_path)}
    before = {name: jax.config.values[name] for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        found = []
        for axis_types in ([AxisType.Auto], BOTH, BOTH):
            compilation_cache.reset_cache()
            jax.clear_caches()
            compile_each(axis_types)
            found.append(entries(tmp_path))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert set() < found[0] < found[1] == found[2]


@pytest.mark.exhaustive
def test_another_process_has_the_same_keys(tmp_path):
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"]
    settings = {name.upper(): str(value) for name, value in OPTIONS.items()}
    environment = {**os.environ, **settings, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    found = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(entries(tmp_path))
    assert set() < found[0] == found[1]


if __name__ == "__main__":
    compile_each(BOTH)
