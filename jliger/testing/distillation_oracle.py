"""The oracle of distillation tests: the reference in float64, and the rule of two. Not part of the wheel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.losses import fused_linear_jsd
from jliger.testing.oracle import INTERPRETED, assert_rule_of_two, found_by

# Dtypes of the student's hidden states and kernel, and of the teacher's hidden states and kernel.
DTYPES = [
    ("float32", "float32", "float32", "float32"),
    ("float32", "float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32", "float32"),
    ("float16", "float32", "float16", "float16"),
    ("float16", "float16", "float16", "float32"),
]

# Leading dimensions, features of both models, and columns of most problems.
SHAPES = (3, 5), (6, 9), 11

# Arguments of the operation that the student learns.
LEARNT = ("student_hidden", "student_kernel", "student_bias", "student_adapter")
_NOT_EXACT = ("implementation", "chunk_size", "logits_dtype", "precision")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of the operation, and a cotangent of its loss.

    Attributes:
      inputs: the differentiable arguments, by name.
      teacher: the teacher's hidden states and kernel.
      options: every other argument.
      cotangent: a scalar.
    """

    inputs: dict[str, Any]
    teacher: tuple[Any, Any]
    options: dict[str, Any]
    cotangent: Any

    def replace(self, **changes: Any) -> "Problem":
        """The same problem with other options; `inputs`, `teacher` and `cotangent` may be among them."""
        fields = {name: changes.pop(name) for name in ("inputs", "teacher", "cotangent") if name in changes}
        return dataclasses.replace(self, options={**self.options, **changes}, **fields)


def make_problem(
    seed: int = 0,
    *,
    batch: tuple[int, ...] = SHAPES[0],
    hidden_sizes: tuple[int, int] = SHAPES[1],
    vocab: int = SHAPES[2],
    dtypes: tuple[str, str, str, str] = DTYPES[0],
    scale: float = 1.0,
    coarse: bool = False,
    biases: tuple[bool, bool] = (False, False),
    adapter: bool = False,
    where: str | None = None,
    weights: bool = False,
    labels: bool = False,
    ignored: float = 0.0,
    normalizer: bool = False,
    kernel_layouts: tuple[str, str] = ("hv", "hv"),
    logit_scales: tuple[float, float] = (1.0, 1.0),
    logit_softcaps: tuple[float | None, float | None] = (None, None),
    **options: Any,
) -> Problem:
    """Random models whose logits have a standard deviation of `scale`; pairs are the student's and the teacher's.

    With `coarse`, and a `scale` that is a power of two, values have few bits. Products are then exact in any order of
    summation, so that all methods round them in the same way. This is needed if one unit in the last place of a
    low-precision logit changes a probability by a factor of e⁴: results could not be compared otherwise.
    """
    if INTERPRETED and "bfloat16" in dtypes:
        pytest.skip("Triton's interpreter truncates where it should round to bfloat16")
    random = np.random.default_rng(seed)

    def model(size: int, dtype: str, kernel_dtype: str, layout: str) -> tuple[Any, Any]:
        kernel = random.normal(size=(size, vocab)) / np.sqrt(size)
        hidden = random.normal(size=(*batch, size))
        if coarse:
            hidden, kernel = np.round(hidden * 16) / 16, np.round(kernel * 64) / 64
        hidden = jnp.asarray(hidden * scale, dtype)
        return hidden, jnp.asarray(kernel if layout == "hv" else kernel.T, kernel_dtype)

    student = model(hidden_sizes[0], *dtypes[:2], kernel_layouts[0])
    teacher = model(hidden_sizes[1], *dtypes[2:], kernel_layouts[1])
    inputs = dict(zip(("student_hidden", "student_kernel"), student, strict=True))
    vectors = jnp.asarray(random.normal(size=(2, vocab)), jnp.float32)
    if biases[0]:
        inputs["student_bias"] = vectors[0]
    if biases[1]:
        options["teacher_bias"] = vectors[1]
    if adapter:
        sides = [random.normal(size=size) / 2 for size in ((hidden_sizes[0], 2), (2, vocab))]
        inputs["student_adapter"] = jliger.LinearAdapter(*(jnp.asarray(side, jnp.float32) for side in sides), 0.5)
    if labels:
        columns = random.integers(0, options.get("vocab_size") or vocab, batch)
        options["labels"] = jnp.asarray(np.where(random.random(batch) < ignored, -100, columns), jnp.int32)
    if where is not None:
        options["where"] = jnp.asarray({"all": 1.0, "some": 0.5, "none": 0.0}[where] > random.random(batch))
    if weights:
        options["weights"] = jnp.asarray(random.uniform(0.1, 2, batch), jnp.float32)
    if normalizer:
        options["normalizer"] = jnp.float32(random.uniform(3, 9))
    for name, pair in (
        ("kernel_layout", kernel_layouts),
        ("logit_scale", logit_scales),
        ("logit_softcap", logit_softcaps),
    ):
        options |= {f"student_{name}": pair[0], f"teacher_{name}": pair[1]}
    options = {"return_metrics": True, **options}
    cotangent = jnp.asarray(random.normal() + 0.1, jnp.float32)
    return Problem(inputs, teacher, options, cotangent)


def loss_and_grads(
    function: Any, inputs: dict[str, Any], teacher: Any, cotangent: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Loss, metrics, and the gradient of every input, by name."""

    def loss(inputs: Any) -> Any:
        rest = {name: value for name, value in inputs.items() if name not in LEARNT[:2]}
        return function(inputs["student_hidden"], inputs["student_kernel"], *teacher, **rest, **options)

    value, pull_back, metrics = jax.vjp(loss, inputs, has_aux=True)
    grads = pull_back(cotangent.astype(value.dtype))[0]
    if "student_adapter" in grads:
        adapter = grads.pop("student_adapter")
        grads |= {f"adapter.{name}": side for name, side in adapter._asdict().items()}
    result = {"loss": value, **grads, **metrics._asdict()}
    return {name: value for name, value in result.items() if value is not None}


def fused(problem: Problem, implementation: str | None = None) -> dict[str, Any]:
    """The results of jliger."""
    options = {"implementation": implementation, **problem.options}
    arrays = (problem.inputs, problem.teacher, problem.cotangent)
    return found_by(loss_and_grads, fused_linear_jsd, *arrays, options=options)


def unfused(problem: Problem) -> dict[str, Any]:
    """The results of plain JAX in the same dtypes."""
    arrays = (problem.inputs, problem.teacher, problem.cotangent)
    reference = jliger.reference.fused_linear_jsd
    return found_by(loss_and_grads, reference, *arrays, options=problem.options)


def exact(problem: Problem) -> dict[str, Any]:
    """The results of plain JAX in float64."""
    options = {name: value for name, value in problem.options.items() if name not in _NOT_EXACT}
    with jax.enable_x64(True):
        arguments = (problem.inputs, problem.teacher, problem.cotangent, options)
        *arrays, options = jax.tree.map(_as_float64, arguments)
        reference = jliger.reference.fused_linear_jsd
        result = found_by(loss_and_grads, reference, *arrays, options=options)
        return {name: np.asarray(value) for name, value in result.items()}


def _as_float64(value: Any) -> Any:
    is_floating = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(np.asarray(value), jnp.float64) if is_floating else value


def exact_and_rounding(problem: Problem) -> tuple[dict[str, Any], dict[str, float]]:
    """What `exact` finds, and what rounding logit gradients to hidden's dtype does to the bias's gradient.

    The reference has none of that rounding: it adds the bias, and sums its gradient, in float32. See
    `jliger.testing.oracle.exact_and_rounding`.
    """
    if "student_bias" not in problem.inputs:
        return exact(problem), {}
    result = exact(_with_own_bias(problem))
    logit_grads = result["student_bias"].reshape(-1, result["student_bias"].shape[-1])
    result["student_bias"] = logit_grads.sum(axis=0)
    half_unit = float(jnp.finfo(problem.inputs["student_hidden"].dtype).eps) / 2
    return result, {"student_bias": half_unit * float(np.sqrt(np.mean(np.square(logit_grads).sum(axis=0))))}


def _with_own_bias(problem: Problem) -> Problem:
    """The same problem with a separate bias for each token, whose gradients are those of the logits."""
    bias = problem.inputs["student_bias"]
    shape = problem.inputs["student_hidden"].shape[:-1]
    return problem.replace(inputs={**problem.inputs, "student_bias": jnp.broadcast_to(bias, (*shape, bias.size))})


def rounding_of_divergence(problem: Problem, oracle: dict[str, Any]) -> dict[str, float]:
    """The float32 rounding error of the divergence, whose terms `p · log p` cancel: the loss may be far smaller.

    The terms of each token are at most `log V`, and rounded to half a unit in the last place.
    """
    vocab = oracle["student_kernel"].shape[problem.options["student_kernel_layout"].index("v")]
    weight, options = float(oracle["weight"]), problem.options
    divisor = 1.0 if options.get("reduction") == "sum" else float(options.get("normalizer", weight or 1.0))
    num_counted = max(1, int(np.sum(oracle["predictions"] >= 0)))
    error = np.finfo(np.float32).eps / 2 * np.log(vocab) * weight / divisor / np.sqrt(num_counted)
    return {"loss": options.get("soft_weight", 1.0) * error, "divergence": error}


def rounding_by_cotangent(problem: Problem, oracle: dict[str, Any]) -> dict[str, float]:
    """The root mean square of the error when gradients that are computed with the loss are multiplied by its cotangent.

    They are rounded before, and again after. The reference rounds them once: where few tokens count, twice its error
    may be too little by chance.
    """

    def error(name: str) -> float:
        half_unit = float(jnp.finfo(problem.inputs[name].dtype).eps) / 2
        return half_unit / np.sqrt(3) * float(np.sqrt(np.mean(np.square(oracle[name]))))

    return {name: error(name) for name in LEARNT[:2]}


def check(problem: Problem, implementation: str, what: str = "") -> dict[str, Any]:
    """Holds jliger to the rule of two on a problem; returns its results."""
    ours, theirs = fused(problem, implementation), unfused(problem)
    oracle, rounding = exact_and_rounding(problem)
    for name in ("predictions", "teacher_predictions"):
        counted = oracle[name] >= 0
        np.testing.assert_array_equal(np.asarray(ours[name]) >= 0, counted, name)
        # In low precision, logits can be equal that differ in float64. Both methods take the first of equal logits.
        np.testing.assert_array_equal(ours[name], theirs[name], name)
        assert ours[name].dtype == jnp.int32
    real = [{k: v for k, v in result.items() if "predictions" not in k} for result in (ours, theirs, oracle)]
    more = rounding | rounding_of_divergence(problem, oracle) | rounding_by_cotangent(problem, oracle)
    if "adapter.scale" in oracle:
        # One number, in which many terms cancel: allow a few roundings of the terms.
        adapter = problem.inputs["student_adapter"]
        terms = np.asarray(adapter.a, np.float64) * oracle["adapter.a"] / adapter.scale
        more["adapter.scale"] = 4 * np.finfo(np.float32).eps * float(np.abs(terms).sum())
    assert_rule_of_two(*real, what, more)
    for name in LEARNT[:3]:
        if name in problem.inputs:
            assert ours[name].dtype == problem.inputs[name].dtype, name
    assert ours["loss"].dtype == jnp.float32
    return ours
