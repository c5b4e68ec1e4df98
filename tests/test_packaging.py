"""What installs and imports where."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jliger

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jliger_works_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = sys.modules["jax_triton"] = None  # an import of either fails

import jax, jax.numpy as jnp, jliger
hidden, kernel, labels = jnp.ones((3, 4)), jnp.ones((4, 5)), jnp.zeros(3, jnp.int32)
print(jax.grad(jliger.fused_linear_cross_entropy)(hidden, kernel, labels).shape)
try:
    jliger.fused_linear_cross_entropy(hidden, kernel, labels, implementation="triton")
except ValueError as error:
    print("not installed" in str(error))
"""
    assert run_python(code).splitlines() == ["(3, 4)", "True"]


def test_triton_is_installed_for_gpus_and_tests_alone():
    def requirements(entries):
        return [entry for entry in entries if re.match(r"(jax-)?triton\b", entry)]

    assert requirements(PROJECT["dependencies"]) == []
    extras = {name: requirements(entries) for name, entries in PROJECT["optional-dependencies"].items()}
    with_triton = {name: entries for name, entries in extras.items() if entries}
    assert sorted(with_triton) == ["cuda12", "cuda13", "test"]
    assert len(with_triton["test"]) == 2
    assert all(entries == with_triton["test"] for entries in with_triton.values())


def test_importing_jliger_imports_no_triton_and_starts_no_device():
    code = """
import sys, jliger
from jax._src import xla_bridge
print([name for name in ("triton", "jax_triton", "flax", "optax") if name in sys.modules])
print(xla_bridge.backends_are_initialized())
"""
    assert run_python(code).splitlines() == ["[]", "False"]


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", jliger.__version__)
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        assert jliger.__version__ in changelog.read_text()


def test_what_is_public_has_documentation():
    for name in dir(jliger):
        member = getattr(jliger, name)
        if not name.startswith("_") and getattr(member, "__module__", "").startswith("jliger"):
            assert member.__doc__, name


def test_tests_are_not_in_the_wheel():
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for pattern in ("*_test.py", "testing/*.py", "conftest.py"):
        assert pattern in excluded["exclude"], f"{pattern} would be shipped"


def test_the_conda_environment_asks_for_the_same_versions():
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = [entry for entry in environment["dependencies"] if isinstance(entry, str) and entry.startswith("python")]
    assert python == [f"python{PROJECT['requires-python']}"]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    asked_for = [entry for entry in pip if not entry.startswith("-")]
    test_extra = [entry for entry in PROJECT["optional-dependencies"]["test"] if not entry.startswith("jliger[")]
    expected = PROJECT["dependencies"] + test_extra
    missing = sorted(set(expected) - set(asked_for))
    assert not missing, f"environment.yml lacks {missing}"
    names = {re.match(r"[\w.-]+", entry)[0]: entry for entry in expected}
    for entry in asked_for:
        name = re.match(r"[\w.-]+(?=\[|[<>=!~;\s]|$)", entry)[0]
        assert entry in expected or name not in names or "[" in entry, f"{entry} is not pyproject's {names[name]}"
