"""The oracle of the tests: `jliger.reference` in float64, and the rule of two. Not part of the wheel."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger

ON_GPU = jax.default_backend() == "gpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Multiplies the number of examples that Hypothesis tries.
EXAMPLES = int(os.environ.get("JLIGER_EXAMPLES", "1"))

if ON_GPU:
    IMPLEMENTATIONS = ["xla", "triton"]
elif INTERPRETED:
    IMPLEMENTATIONS = ["triton"]
else:
    IMPLEMENTATIONS = ["xla"]

# The supported pairs of dtypes of hidden states and kernel.
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("float16", "float16"),
]

# Leading dimensions, features and columns of most problems.
SHAPES = (3, 5), 6, 11

_OF_THE_FUSED_ONE = ("implementation", "chunk_size")
_OF_LOW_PRECISION = ("logits_dtype", "precision")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of the operation, and a cotangent of its loss.

    Attributes:
      inputs: the differentiable arguments, by name.
      labels: `[*B]`.
      options: every other argument.
      cotangent: of the loss's shape.
    """

    inputs: dict[str, Any]
    labels: Any
    options: dict[str, Any]
    cotangent: Any

    def replace(self, **changes: Any) -> "Problem":
        """The same problem with other options; `cotangent`, `labels` and `inputs` may be among them."""
        fields = {name: changes.pop(name) for name in ("inputs", "labels", "cotangent") if name in changes}
        return dataclasses.replace(self, options={**self.options, **changes}, **fields)


def make_problem(
    seed: int = 0,
    *,
    batch: tuple[int, ...] = SHAPES[0],
    hidden_size: int = SHAPES[1],
    vocab: int = SHAPES[2],
    dtype: str = "float32",
    kernel_dtype: str = "float32",
    scale: float = 1.0,
    bias: str | None = None,
    where: str | None = None,
    weights: bool = False,
    ignored: float = 0.0,
    class_weights: bool = False,
    normalizer: bool = False,
    temperature: float | str = 1.0,
    kernel_layout: str = "hv",
    **options: Any,
) -> Problem:
    """A random problem: hidden states and logits with standard deviation `scale`, labels, and the optional arguments.

    `where` is "all", "some" or "none": which tokens count. `ignored` is the fraction of labels set to `ignore_index`.
    `temperature="of tokens"` makes one for each token.
    """
    if INTERPRETED and "bfloat16" in (dtype, kernel_dtype):
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(hidden_size, vocab)) / np.sqrt(hidden_size)
    inputs = {
        "hidden": jnp.asarray(random.normal(size=(*batch, hidden_size)) * scale, dtype),
        "kernel": jnp.asarray(kernel if kernel_layout == "hv" else kernel.T, kernel_dtype),
    }
    if bias is not None:
        inputs["bias"] = jnp.asarray(random.normal(size=vocab), bias)
    labels = random.integers(0, options.get("vocab_size") or vocab, batch)
    if ignored:
        labels = np.where(random.random(batch) < ignored, options.get("ignore_index", -100), labels)
    if where is not None:
        options["where"] = jnp.asarray({"all": 1.0, "some": 0.5, "none": 0.0}[where] > random.random(batch))
    if weights:
        options["weights"] = jnp.asarray(random.uniform(0.1, 2, batch), jnp.float32)
    if class_weights:
        options["class_weights"] = jnp.asarray(random.uniform(0.1, 2, vocab), jnp.float32)
    if normalizer:
        options["normalizer"] = jnp.float32(random.uniform(3, 9))
    if temperature != 1:
        options["temperature"] = temperature
    if temperature == "of tokens":
        options["temperature"] = jnp.asarray(random.uniform(0.3, 3, batch), jnp.float32)
    cotangent = random.normal(size=batch if options.get("reduction") == "none" else ()) + 0.1
    return Problem(
        inputs,
        jnp.asarray(labels, jnp.int32),
        {"kernel_layout": kernel_layout, **options},
        jnp.asarray(cotangent, jnp.float32),
    )


def loss_and_grads(function: Any, inputs: Any, labels: Any, cotangent: Any, options: Any) -> dict[str, Any]:
    """The loss, the metrics if returned, and the gradient of every input, by name."""

    def loss(inputs: Any) -> Any:
        out = function(inputs["hidden"], inputs["kernel"], labels, bias=inputs.get("bias"), **options)
        return out if options.get("return_metrics") else (out, None)

    value, pull_back, metrics = jax.vjp(loss, inputs, has_aux=True)
    result = {"loss": value, **pull_back(cotangent.astype(value.dtype))[0]}
    if metrics is None:
        return result
    return result | {name: field for name, field in metrics._asdict().items() if field is not None}


@functools.cache
def _jitted(finder: Any, function: Any, static: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(lambda *arrays: finder(function, *arrays[:-1], {**dict(static), **arrays[-1]}))


def found_by(finder: Any, function: Any, *arrays: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`finder(function, *arrays, options)` under jit; what was compiled for the same options is used again.

    A reference runs op by op on a GPU, where XLA would fuse it and round less than its dtypes say.
    """
    if ON_GPU and function.__module__ == jliger.reference.__name__:
        return finder(function, *arrays, options)
    static = {name: value for name, value in options.items() if not isinstance(value, jax.Array)}
    rest = {name: value for name, value in options.items() if name not in static}
    return _jitted(finder, function, tuple(static.items()))(*arrays, rest)


def fused(problem: Problem, implementation: str | None = None) -> dict[str, Any]:
    """The results of jliger."""
    options = {"implementation": implementation, **problem.options}
    arrays = (problem.inputs, problem.labels, problem.cotangent)
    return found_by(loss_and_grads, jliger.fused_linear_cross_entropy, *arrays, options=options)


def unfused(problem: Problem) -> dict[str, Any]:
    """The results of plain JAX in the same dtypes."""
    options = {name: value for name, value in problem.options.items() if name not in _OF_THE_FUSED_ONE}
    arrays = (problem.inputs, problem.labels, problem.cotangent)
    reference = jliger.reference.fused_linear_cross_entropy
    return found_by(loss_and_grads, reference, *arrays, options=options)


def exact(problem: Problem) -> dict[str, Any]:
    """The results of plain JAX in float64."""
    dropped = (*_OF_THE_FUSED_ONE, *_OF_LOW_PRECISION)
    options = {name: value for name, value in problem.options.items() if name not in dropped}
    with jax.enable_x64(True):
        inputs, cotangent, options = jax.tree.map(_as_float64, (problem.inputs, problem.cotangent, options))
        arrays = (inputs, problem.labels, cotangent)
        reference = jliger.reference.fused_linear_cross_entropy
        result = found_by(loss_and_grads, reference, *arrays, options=options)
        return {name: np.asarray(value) for name, value in result.items()}


def _as_float64(value: Any) -> Any:
    is_floating = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(np.asarray(value), jnp.float64) if is_floating else value


def exact_and_rounding(problem: Problem) -> tuple[dict[str, Any], dict[str, float]]:
    """What `exact` finds, and the root mean square of what rounding logit gradients does to each input's gradient.

    Products are taken in hidden's dtype, so logit gradients are rounded to it. The reference rounds them too, with two
    exceptions: it adds the bias, and sums its gradient, in float32; and float32 logits have float32 gradients.
    """
    num_tokens = problem.labels.size
    vocab_dim = 1 if problem.options["kernel_layout"] == "hv" else 0
    hidden, kernel = (np.asarray(problem.inputs[name], np.float64) for name in ("hidden", "kernel"))
    # Adds a feature for each token, with weights of 0. The gradients of these weights are those of the logits.
    own = np.eye(num_tokens).reshape(*problem.labels.shape, num_tokens)
    weights = np.zeros((num_tokens, kernel.shape[1]) if vocab_dim == 1 else (kernel.shape[0], num_tokens))
    with jax.enable_x64(True):
        inputs = {
            **problem.inputs,
            "hidden": jnp.asarray(np.concatenate([hidden, own], axis=-1)),
            "kernel": jnp.asarray(np.concatenate([kernel, weights], axis=1 - vocab_dim)),
        }
        result = exact(problem.replace(inputs=inputs))
    grads, size = result["kernel"], hidden.shape[-1]
    result["hidden"] = result["hidden"][..., :size]
    result["kernel"] = grads[:size] if vocab_dim == 1 else grads[:, :size]
    squares = np.square(grads[size:] if vocab_dim == 1 else grads[:, size:].T)  # [N, V]
    half_unit = float(jnp.finfo(problem.inputs["hidden"].dtype).eps) / 2
    sums = {"bias": squares.sum(axis=0)} if "bias" in problem.inputs else {}
    if problem.options.get("logits_dtype") == "float32":
        kernel = kernel if vocab_dim == 1 else kernel.T
        sums |= {
            "hidden": squares @ np.square(kernel).T,
            "kernel": np.square(hidden).reshape(num_tokens, -1).T @ squares,
        }
    return result, {name: half_unit * float(np.sqrt(np.mean(value))) for name, value in sums.items()}


def assert_rule_of_two(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    oracle: dict[str, Any],
    what: str = "",
    more: dict[str, float] | None = None,
) -> None:
    """Asserts `error(ours) ≤ 2 · error(theirs) + tolerance` for every result, and NaN exactly where the oracle has NaN.

    Errors are root mean squares. The tolerance is a few float32 roundings of the largest value, because one order of
    summation may be exact by chance. `more` is added to it, by name.
    """
    assert ours.keys() == oracle.keys()
    for name, truth in oracle.items():
        here = f"{name} {what}"
        mine, other = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        assert mine.shape == truth.shape, here
        if name == "predictions":
            continue  # equal up to ties, which `assert_predictions` handles
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(truth), here)
        finite = ~np.isnan(truth)
        if not finite.any():
            continue
        little = 4 * np.finfo(np.float32).eps * np.abs(truth[finite]).max()
        allowed = 2 * _root_mean_square((other - truth)[finite]) + little + (more or {}).get(name, 0.0)
        error = _root_mean_square((mine - truth)[finite])
        assert error <= allowed, f"{here}: error {error:.3e}, allowed {allowed:.3e}"


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def assert_predictions(problem: Problem, predictions: Any) -> None:
    """Asserts that each prediction has the largest logit, up to rounding, and that only uncounted tokens have −1."""
    hidden, kernel = (np.asarray(problem.inputs[name], np.float64) for name in ("hidden", "kernel"))
    logits = hidden @ (kernel if problem.options["kernel_layout"] == "hv" else kernel.T)
    size = np.abs(logits).max()
    if "bias" in problem.inputs:
        logits = logits + np.asarray(problem.inputs["bias"], np.float64)
    logits = logits * np.sign(problem.options.get("logit_scale", 1.0))
    if problem.options.get("logit_softcap"):
        # Logits far above the cap all round to it, so any of them may be predicted. Capping never increases
        # differences.
        cap = problem.options["logit_softcap"] / abs(problem.options.get("logit_scale", 1.0))
        logits = cap * np.tanh(logits / cap)
    logits = logits[..., : problem.options.get("vocab_size")]
    counted = np.array(problem.labels != problem.options.get("ignore_index", -100))
    if "where" in problem.options:
        counted &= np.asarray(problem.options["where"])
    predictions = np.asarray(predictions)
    assert predictions.dtype == np.int32
    np.testing.assert_array_equal(predictions >= 0, counted)
    chosen = np.take_along_axis(logits, np.maximum(predictions, 0)[..., None], -1)[..., 0]
    rounding = 4 * float(jnp.finfo(problem.inputs["hidden"].dtype).eps) * size
    assert np.all((logits.max(-1) - chosen)[counted] <= rounding)


def check(problem: Problem, implementation: str, what: str = "") -> dict[str, Any]:
    """Holds jliger to the rule of two on a problem; returns its results."""
    ours, theirs = fused(problem, implementation), unfused(problem)
    oracle, rounding = exact_and_rounding(problem)
    assert_rule_of_two(ours, theirs, oracle, what, rounding)
    for name, value in problem.inputs.items():
        assert ours[name].dtype == value.dtype, name
    assert ours["loss"].dtype == jnp.float32
    if "predictions" in ours:
        assert_predictions(problem, ours["predictions"])
    return ours


def every_pair(options: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Combinations of options in which every pair of values of two options occurs; a greedy choice of few."""
    missing = {
        frozenset([(a, value_a), (b, value_b)])
        for (a, values_a), (b, values_b) in itertools.combinations(options.items(), 2)
        for value_a, value_b in itertools.product(values_a, values_b)
    }

    def gained(row: dict[str, Any]) -> set[Any]:
        return missing & {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}

    rows = []
    while missing:
        row = dict(min(missing, key=lambda pair: sorted(map(repr, pair))))
        for name in [name for name in options if name not in row]:
            row = max(({**row, name: value} for value in options[name]), key=lambda row: len(gained(row)))
        rows.append(row)
        missing -= gained(row)
    return rows


def pairs_as_parameters(options: dict[str, list[Any]]) -> list[Any]:
    """`every_pair` for `pytest.mark.parametrize`, with rows in which no value is new marked exhaustive."""
    seen: set[str] = set()
    result = []
    for row in every_pair(options):
        values = {repr(item) for item in row.items()}
        result.append(pytest.param(row, marks=[pytest.mark.exhaustive] if values <= seen else []))
        seen |= values
    return result


def equations(program: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, including those of the jaxprs inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
