"""A padded vocabulary in shards, of which the last have few real columns or none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded import (
    AXES,
    BATCH,
    EVERYTHING,
    HIDDEN,
    IMPLEMENTATION,
    MODES,
    VOCAB,
    Place,
    assert_same,
    crossed,
    oracle,
    pick,
    problem_of,
    put,
    results,
    settings_of,
    specs_of,
)

import jliger
from jliger import losses
from jliger.testing import distillation_oracle

# Of eight devices with 8 columns each, the sixth has one real column and the last two have none.
VOCAB_SIZE = 41
COLUMNS = Place(P(), P(None, AXES), AXES)


padded_problem = functools.partial(problem_of, chunk_size=4, vocab_size=VOCAB_SIZE)


def padding(grads, kernel_layout):
    """Gradients of columns that do not exist."""
    kernel, bias = np.asarray(grads["kernel"]), np.asarray(grads["bias"])
    return (kernel if kernel_layout == "vh" else kernel.T)[VOCAB_SIZE:], bias[VOCAB_SIZE:]


@pytest.mark.parametrize(
    ("mode", "reduction", "layout"),
    crossed(MODES, pick([("mean", "hv"), ("none", "vh")], on_gpus=[("mean", "hv")], interpreted=[("none", "hv")])),
)
def test_a_padded_vocabulary(mode, reduction, layout):
    problem = padded_problem(reduction, layout, **EVERYTHING)
    mesh = COLUMNS.mesh(mode)
    arrays = put(problem, COLUMNS, mesh)
    with jax.set_mesh(mesh):
        found = results(problem, arrays)
    assert_same(found, oracle(problem))
    assert not any(np.any(part) for part in padding(found, layout))


@pytest.mark.parametrize(
    ("check_vma", "reduction"),
    pick(
        [(True, "none"), pytest.param(False, "mean", marks=pytest.mark.exhaustive)],
        on_gpus=[(True, "none")],
        interpreted=[],
    ),
)
def test_inside_a_shard_map(check_vma, reduction):
    options = {name: value for name, value in EVERYTHING.items() if name != "return_metrics"}
    problem = padded_problem(reduction, **options)
    mesh, specs = COLUMNS.mesh("auto"), specs_of(problem, COLUMNS)

    def local(arrays):
        inputs, labels, cotangent, options = arrays
        options = {**settings_of(problem), **options, "vocab_axis_name": AXES, "implementation": IMPLEMENTATION}
        return (jliger.fused_linear_cross_entropy(**inputs, labels=labels, **options) * cotangent).sum()

    around = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma)

    @jax.jit
    def both(arrays):
        return jax.value_and_grad(lambda inputs: around(arrays._replace(inputs=inputs)))(arrays.inputs)

    total, grads = jax.block_until_ready(both(put(problem, COLUMNS, mesh)))
    expected = oracle(problem)
    assert_same(
        {"loss": total, **grads},
        {"loss": (expected["loss"] * problem.cotangent).sum(), **{name: expected[name] for name in grads}},
    )


@pytest.mark.parametrize("mode", pick(MODES[-1:], on_gpus=MODES[-1:], interpreted=[]))
def test_saved_logits_of_tokens_that_all_count(mode):
    problem = padded_problem("none", bias="float32")
    mesh = COLUMNS.mesh(mode)

    def logprob_sum(function, inputs, labels, **options):
        found = function(**inputs, labels=labels, **options)
        return found.logprobs.sum() + 0.5 * found.entropy.sum(), found

    def run(function, arrays, **options):
        both = jax.value_and_grad(functools.partial(logprob_sum, function), has_aux=True)
        options |= {"vocab_size": VOCAB_SIZE, "ignore_index": None}
        (_, found), grads = both(arrays.inputs, arrays.labels, **options)
        return {**found._asdict(), **grads}

    with jax.set_mesh(mesh):
        options = {"keep_logits": True, "implementation": IMPLEMENTATION}
        found = jax.jit(functools.partial(run, jliger.linear_logprobs, **options))(put(problem, COLUMNS, mesh))
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(np.asarray(array), jnp.float64) for name, array in problem.inputs.items()}
        expected = run(jliger.reference.linear_logprobs, problem.replace(inputs=inputs))
    assert_same(jax.block_until_ready(found), expected)
    assert not any(np.any(part) for part in padding(found, "hv"))


@pytest.mark.parametrize(
    ("mode", "beta"), crossed(MODES[-1:], pick([(0.0,), (0.5,)], on_gpus=[(0.0,)], interpreted=[(0.5,)]))
)
def test_distillation(mode, beta):
    problem = distillation_oracle.make_problem(
        batch=BATCH, hidden_sizes=(HIDDEN, 24), vocab=VOCAB, beta=beta, temperature=2.0, biases=(True, True),
        labels=True, ignored=0.1, hard_weight=0.5, chunk_size=4, precision="highest", vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    mesh = COLUMNS.mesh(mode)

    def put(name, array):
        spec = COLUMNS.spec(name.rpartition("_")[2], "hv")
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        inputs = {name: put(name, array) for name, array in problem.inputs.items()}
        teacher = put("hidden", problem.teacher[0]), put("kernel", problem.teacher[1])
        options = {**problem.options, "teacher_bias": put("bias", problem.options["teacher_bias"])}
        ours = jax.jit(
            lambda inputs, teacher, options: distillation_oracle.loss_and_grads(
                losses.fused_linear_jsd, inputs, teacher, problem.cotangent, {**options, **settings}
            )
        )
        settings = {name: value for name, value in options.items() if not isinstance(value, jax.Array)}
        settings["implementation"] = IMPLEMENTATION
        found = jax.block_until_ready(ours(inputs, teacher, {k: v for k, v in options.items() if k not in settings}))
    assert_same(found, distillation_oracle.exact(problem))
    assert not np.any(np.asarray(found["student_kernel"])[:, VOCAB_SIZE:])
