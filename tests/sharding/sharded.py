"""What these tests share: problems, where their arrays may be, and what a result has to be."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jliger
from jliger.testing.oracle import INTERPRETED, ON_GPU, Problem, exact, loss_and_grads, make_problem

AXES = ("data", "seq", "model")
IMPLEMENTATION = "triton" if ON_GPU or INTERPRETED else "xla"
# Interpreted kernels are callbacks to Python, which don't outlive the compilation of what XLA asks for with Auto axes.
MODES = ["explicit"] if INTERPRETED else ["auto", "explicit"]
REDUCTIONS = ["mean", "none"]  # the two forms of the operation
LAYOUTS = ["hv", "vh"]
BATCH, HIDDEN, VOCAB = (4, 8), 16, 64

# What float32 sums of some tens of terms differ by, in whichever order: about 1e-6 of the norm. Any part of a result
# that a device left out or had twice would be a part in 64 at least.
ROUNDING = 1e-5
ROUNDING_64 = 1e-12


class Place(NamedTuple):
    """Which axes shard the tokens `[B, L]` and the kernel `[H, V]`.

    Attributes:
      tokens: as a spec of `[B, L]`.
      kernel: as a spec of `[H, V]`.
      first: axes that are the first to get devices, where there are fewer than eight.
    """

    tokens: P
    kernel: P
    first: tuple[str, ...]

    def mesh(self, mode: str) -> Mesh:
        """A mesh of all devices: (2, 2, 2) of eight, and of fewer, two along as many axes as they suffice for."""
        order = (*self.first, *(axis for axis in AXES if axis not in self.first))
        sizes = {axis: 2 if jax.device_count() >= 2 ** (place + 1) else 1 for place, axis in enumerate(order)}
        axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[mode]
        return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(axis_type,) * 3)

    def spec(self, name: str, kernel_layout: str) -> P:
        """The spec of an argument of the operation."""
        rows, columns = (*self.kernel, None, None)[:2]
        if name == "kernel":
            return P(rows, columns) if kernel_layout == "hv" else P(columns, rows)
        if name in ("bias", "class_weights"):
            return P(columns)
        return P() if name == "normalizer" else self.tokens


def example_mesh() -> Mesh:
    """The mesh of the examples: two devices along as many of its axes as there are devices for."""
    sizes = {8: (2, 2, 2), 4: (1, 2, 2), 2: (1, 2, 1)}[jax.device_count()]
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


PLACES = {
    "dp": Place(P("data"), P(), ("data",)),
    "dp+sp": Place(P("data", "seq"), P(), ("seq", "data")),
    "fsdp-h": Place(P("data"), P("data"), ("data",)),
    "fsdp-v": Place(P("data"), P(None, "data"), ("data",)),
    "tp": Place(P(), P(None, "model"), ("model",)),
    "dp+tp": Place(P("data"), P(None, "model"), ("model", "data")),
    "fsdp-h+tp": Place(P("data"), P("data", "model"), ("model", "data")),
    "fsdp-v+tp": Place(P("data"), P(None, ("model", "data")), ("data", "model")),
    "dp+sp+fsdp+tp": Place(P("data", "seq"), P(("data", "seq"), "model"), ("model", "seq")),
    "sp+fsdp-hv": Place(P(("data", "seq")), P("seq", "data"), ("data", "seq")),
}

EVERYTHING = {
    "bias": "float32",
    "where": "some",
    "ignored": 0.1,
    "weights": True,
    "class_weights": True,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_softcap": 4.0,
    "temperature": "of tokens",
    "return_metrics": True,
}


def pick(everything: Any, *, on_gpus: Any, interpreted: Any) -> Any:
    """Which cases to run here: all of them only where compiling is cheap."""
    return on_gpus if ON_GPU else interpreted if INTERPRETED else everything


def now_and_then(cases: Iterable[Any], often: Callable[[int, Any], bool]) -> list[Any]:
    """All cases, marked exhaustive but for those of which `often(number, case)` holds."""
    return [
        pytest.param(*case, marks=[] if often(number, case) else [pytest.mark.exhaustive])
        for number, case in enumerate(case if isinstance(case, tuple) else (case,) for case in cases)
    ]


def crossed(firsts: Sequence[Any], cases: Sequence[Any]) -> list[Any]:
    """Each of `firsts` with each case; every second pair is exhaustive, so that each of both is left."""
    pairs = [
        (first, *(case if isinstance(case, tuple) else (case,)), number + turn)
        for number, first in enumerate(firsts)
        for turn, case in enumerate(cases)
    ]
    return [
        pytest.param(*pair[:-1], marks=[pytest.mark.exhaustive] if pair[-1] % 2 and len(cases) > 1 else [])
        for pair in pairs
    ]


@functools.cache
def problem_of(reduction: str = "mean", kernel_layout: str = "hv", **options: Any) -> Problem:
    """A problem whose sides all meshes here divide."""
    sizes = {"batch": BATCH, "hidden_size": HIDDEN, "vocab": VOCAB}
    return make_problem(reduction=reduction, kernel_layout=kernel_layout, **{**sizes, **options})


class Arrays(NamedTuple):
    """The arrays of a problem, by name."""

    inputs: dict[str, Any]
    labels: Any
    cotangent: Any
    options: dict[str, Any]


def arrays_of(problem: Problem) -> Arrays:
    options = {name: value for name, value in problem.options.items() if isinstance(value, jax.Array)}
    return Arrays(problem.inputs, problem.labels, problem.cotangent, options)


def settings_of(problem: Problem) -> dict[str, Any]:
    """What of a problem is no array."""
    return {name: value for name, value in problem.options.items() if not isinstance(value, jax.Array)}


def specs_of(problem: Problem, place: Place) -> Arrays:
    """The spec of each of a problem's arrays."""
    layout = problem.options["kernel_layout"]
    arrays = arrays_of(problem)
    return Arrays(
        inputs={name: place.spec(name, layout) for name in arrays.inputs},
        labels=place.tokens,
        cotangent=place.tokens if arrays.cotangent.ndim else P(),
        options={name: place.spec(name, layout) for name in arrays.options},
    )


def put(problem: Problem, place: Place, mesh: Mesh) -> Arrays:
    """A problem's arrays, sharded."""
    specs = specs_of(problem, place)
    return jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays_of(problem), specs)


def run(settings: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Loss, metrics and all gradients, as jliger finds them."""
    options = {"implementation": IMPLEMENTATION, **settings, **arrays.options}
    return loss_and_grads(jliger.fused_linear_cross_entropy, arrays.inputs, arrays.labels, arrays.cotangent, options)


def jitted(problem: Problem) -> Any:
    """`run` under jit, a function of arrays."""
    return jax.jit(functools.partial(run, settings_of(problem)))


def results(problem: Problem, arrays: Arrays) -> dict[str, Any]:
    """What `run` finds under jit.

    It is waited for: interpreted kernels call back to Python, which another computation meanwhile could block.
    """
    return jax.block_until_ready(jitted(problem)(arrays))


_ORACLES: dict[int, Any] = {}


def oracle(problem: Problem) -> dict[str, Any]:
    """What plain JAX finds in float64 on one device; kept."""
    if id(problem) not in _ORACLES:
        # The problem is kept with it, so that its number stays its own.
        _ORACLES[id(problem)] = problem, exact(problem)
    return _ORACLES[id(problem)][1]


def assert_same(found: Any, expected: Any, rounding: float = ROUNDING) -> None:
    """Equal up to rounding, by norm; integers exactly; NaN is never equal."""
    found_leaves, expected_leaves = (jax.tree.leaves_with_path(tree) for tree in (found, expected))
    assert [path for path, _ in found_leaves] == [path for path, _ in expected_leaves]
    for (path, one), (_, other) in zip(found_leaves, expected_leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape, path
        if np.issubdtype(other.dtype, np.integer):
            np.testing.assert_array_equal(one, other, str(path))
            continue
        error, size = np.linalg.norm(one.astype(np.float64) - other), np.linalg.norm(other)
        assert error <= rounding * size, f"{path}: off by {error / size:.1e} of its norm"


def assert_sharded_like(found: dict[str, Any], arrays: Arrays) -> None:
    """Gradients are where their arguments are."""
    for name, array in arrays.inputs.items():
        grad = found[name]
        assert grad.sharding.is_equivalent_to(array.sharding, array.ndim), f"{name}: {grad.sharding} {array.sharding}"
