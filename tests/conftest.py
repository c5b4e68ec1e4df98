"""What tests of the examples share. Tests on a mesh are collected only by a process that has several devices."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# .ci/test starts such a process, with eight simulated devices.
collect_ignore_glob = [] if jax.device_count() > 1 else ["sharding/*", "accumulation/*"]
# Scripts there need what tests do not.
collect_ignore_glob += ["golden/*"]


@pytest.fixture(scope="module", autouse=True)
def implicit_promotion(request) -> Iterator[None]:
    """Allows implicit promotion in whole runs, even in a process that forbids it: optax, flax and models rely on it.

    The library does not, so its own tests, on a mesh too, run as the process says.
    """
    if request.path.parent != Path(__file__).parent:
        yield
        return
    allowed = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in allowed.items():
            patch.setenv(name, value)
        before = {name.lower(): jax.config.values[name.lower()] for name in allowed}
        for name, value in allowed.items():
            jax.config.update(name.lower(), value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="session")
def import_example() -> Callable[[str], ModuleType]:
    """Imports an example as a module; its helpers lie beside it."""

    def import_it(name: str) -> ModuleType:
        folder = str(Path(__file__).parent.parent / "examples")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    return import_it


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """Real text, little of it: the beginnings of some modules of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:24]:
        (folder / path.name).write_bytes(path.read_bytes()[:4000])
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00 no UTF-8")
    return folder


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory) -> Iterator[None]:
    """Keeps what XLA compiles, and optimizes it less: most of a run of seconds is compiling the same programs again."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
