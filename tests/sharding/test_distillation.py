"""Distillation wherever tokens and columns of both models are: results of one device, and no logits that move."""

import functools

import jax
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import BATCH, HIDDEN, IMPLEMENTATION, MODES, PLACES, VOCAB, assert_same, crossed, now_and_then, pick

from jliger import losses
from jliger.testing.distillation_oracle import exact, loss_and_grads, make_problem

TEACHER_HIDDEN = 24
BETAS = [0.0, 0.5, 1.0]


@functools.cache
def problem_of(beta, kernel_layouts=("hv", "hv"), temperature=2.0):
    return make_problem(
        batch=BATCH, hidden_sizes=(HIDDEN, TEACHER_HIDDEN), vocab=VOCAB, beta=beta, temperature=temperature,
        kernel_layouts=kernel_layouts, biases=(True, True), labels=True, ignored=0.1, hard_weight=0.5, where="some",
        weights=True, logit_softcaps=(4.0, None), chunk_size=4, precision="highest",
    )  # fmt: skip


@functools.cache
def oracle(problem_key):
    return exact(problem_of(*problem_key))


def arrays_of(problem):
    """All arrays, by name; the teacher's too."""
    options = {name: value for name, value in problem.options.items() if isinstance(value, jax.Array)}
    return {
        **problem.inputs,
        **dict(zip(("teacher_hidden", "teacher_kernel"), problem.teacher, strict=True)),
        **options,
    }


def specs_of(problem, place):
    def spec(name):
        model, _, what = name.partition("_")
        if what == "kernel":
            return place.spec("kernel", problem.options[f"{model}_kernel_layout"])
        return place.spec("bias", "hv") if what == "bias" else place.tokens

    return {name: spec(name) for name in arrays_of(problem)}


def put(problem, place, mesh):
    specs = specs_of(problem, place)
    return {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in arrays_of(problem).items()}


def run(problem, arrays, **options):
    """Loss, metrics and the student's gradients, of arrays by name."""
    inputs = {name: arrays[name] for name in problem.inputs}
    teacher = arrays["teacher_hidden"], arrays["teacher_kernel"]
    rest = {name: arrays.get(name, value) for name, value in problem.options.items()}
    options = {**rest, "implementation": IMPLEMENTATION, **options}
    return loss_and_grads(losses.fused_linear_jsd, inputs, teacher, problem.cotangent, options)


# Modes in turn; which of them it is, is seen to by the tests of the loss.
EVERY_CASE = [
    (MODES[number % len(MODES)], place, (BETAS[number % 3], (("hv", "hv"), ("hv", "vh"), ("vh", "hv"))[number % 3]))
    for number, place in enumerate(PLACES)
]


@pytest.mark.parametrize(
    ("mode", "place", "key"),
    pick(
        EVERY_CASE,
        on_gpus=[case for case in EVERY_CASE if case[1] in ("fsdp-v", "dp+tp")],
        interpreted=now_and_then(
            [case for case in EVERY_CASE if case[1] in ("fsdp-v", "dp+tp", "fsdp-h+tp")],
            lambda _, case: case[1] == "dp+tp",
        ),
    ),
)
def test_equal_to_those_of_one_device(mode, place, key):
    problem, place = problem_of(*key), PLACES[place]
    mesh = place.mesh(mode)
    with jax.set_mesh(mesh):
        arrays = put(problem, place, mesh)
        found = jax.block_until_ready(jax.jit(functools.partial(run, problem))(arrays))
    assert_same(found, oracle(key))
    for name in problem.inputs:
        assert found[name].sharding.is_equivalent_to(arrays[name].sharding, arrays[name].ndim), name


@pytest.mark.parametrize("mode", pick(MODES, on_gpus=[], interpreted=[]))
def test_without_gradients_and_without_labels(mode):
    problem, place = problem_of(0.5).replace(labels=None, hard_weight=0.0, where=None), PLACES["dp+tp"]
    mesh = place.mesh(mode)

    def loss(arrays):
        options = {name: arrays.get(name, value) for name, value in problem.options.items()}
        names = ("student_hidden", "student_kernel", "teacher_hidden", "teacher_kernel")
        bias = arrays["student_bias"]
        return losses.fused_linear_jsd(*(arrays[name] for name in names), student_bias=bias, **options)

    with jax.set_mesh(mesh):
        found, metrics = jax.jit(loss)(put(problem, place, mesh))
    expected = exact(problem)
    np.testing.assert_allclose(found, expected["loss"], rtol=1e-5)
    np.testing.assert_array_equal(metrics.predictions, expected["predictions"])
    np.testing.assert_array_equal(metrics.teacher_predictions, expected["teacher_predictions"])


@pytest.mark.parametrize(
    ("check_vma", "place"),
    crossed([True, False], pick(["dp+tp", "dp", "tp"], on_gpus=["dp+tp"], interpreted=["dp+tp"])),
)
def test_inside_a_shard_map(place, check_vma):
    key = (0.5, ("hv", "vh"), 1.0)
    problem, place = problem_of(*key), PLACES[place]
    mesh, specs = place.mesh("auto"), specs_of(problem, place)
    vocab_axes = ("model",) if place.kernel else ()
    token_axes = ("data",) if place.tokens else ()
    inputs = tuple(problem.inputs)

    def loss(arrays):
        names = ("student_hidden", "student_kernel", "teacher_hidden", "teacher_kernel")
        options = {name: arrays.get(name, value) for name, value in problem.options.items()} | {"return_metrics": False}
        total = losses.fused_linear_jsd(
            *(arrays[name] for name in names), student_bias=arrays["student_bias"], reduction="sum",
            vocab_axis_name=vocab_axes or None, implementation=IMPLEMENTATION, **options,
        )  # fmt: skip
        return jax.lax.psum(total, token_axes) if token_axes else total

    around = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma)

    @jax.jit
    def both(arrays):
        return jax.value_and_grad(lambda learnt: around({**arrays, **learnt}))({name: arrays[name] for name in inputs})

    found, grads = jax.block_until_ready(both(put(problem, place, mesh)))
    expected = exact(problem.replace(reduction="sum"))
    factor = np.asarray(problem.cotangent, np.float64)
    assert_same(
        {"loss": found, **{name: grad * factor for name, grad in grads.items()}},
        {name: expected[name] for name in ("loss", *inputs)},
    )


@pytest.mark.parametrize(("mode", "place"), crossed(MODES, pick(["dp", "fsdp-h", "dp+tp"], on_gpus=[], interpreted=[])))
def test_neither_models_logits_move(mode, place):
    problem, place = problem_of(0.5), PLACES[place]
    mesh = place.mesh(mode)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(run, problem)).lower(put(problem, place, mesh))
    found = collectives(program.compile().as_text())
    # Kernels are gathered, their gradients and those of the student's hidden states summed; the rest is numbers.
    kernels = {(h // parts, v) for h in (HIDDEN, TEACHER_HIDDEN) for v in (VOCAB, VOCAB // 2) for parts in (1, 2)}
    for one in found:
        if len(one.shape) > 1:
            assert one.shape in kernels or one.shape[-1] in (BATCH[1], HIDDEN), one
        else:
            assert one.size <= max(BATCH[0] * BATCH[1], VOCAB), one
    # In loops there are at most a chunk's numbers, for those that share its columns.
    in_loop = [one for one in found if one.in_loop]
    assert all(one.size <= 4 for one in in_loop)
    assert bool(in_loop) == (place is PLACES["dp+tp"])
