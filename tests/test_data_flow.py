"""Gradients are results, never side effects: no kernel writes what it was given, whatever XLA does around it.

A JAX port of Liger once wrote the gradients of logits over the logits, of which XLA knew nothing: as soon as there was
a bias, another buffer was read. So: every launch of a lowered program is read, for which of its pointers it stores
through; and on a GPU, programs run under schedules that would tell.
"""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger.testing.launches import HAS_PLUGIN, launches, lowered, pointers, written_parameters
from jliger.testing.oracle import ON_GPU, make_problem

needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="runs on a GPU")

OPTIONS = {
    "bare": {},
    "bias": {"bias": "float32"},
    "softcap": {"logit_softcap": 30.0},
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"label_smoothing": 0.1, "class_weights": True},
    "z-loss": {"z_loss": 1e-4},
    "everything": {
        "bias": "float32", "logit_softcap": 30.0, "label_smoothing": 0.1, "class_weights": True, "z_loss": 1e-4,
        "logit_scale": 0.5, "weights": True, "where": "some", "return_metrics": True,
    },
}  # fmt: skip


def loss_of(problem):
    """The loss as a function of inputs and labels."""

    def loss(inputs, labels):
        found = jliger.fused_linear_cross_entropy(
            inputs["hidden"], inputs["kernel"], labels, bias=inputs.get("bias"), **problem.options
        )
        return jnp.sum((found[0] if problem.options.get("return_metrics") else found) * problem.cotangent)

    return loss


def gradient_of(problem):
    """Loss and gradients as a function of inputs and labels."""
    return jax.value_and_grad(loss_of(problem))


@functools.cache
def program(reduction, name, vocab):
    problem = make_problem(
        batch=(16,), hidden_size=24, vocab=vocab, dtype="bfloat16", reduction=reduction, **OPTIONS[name]
    )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (problem.inputs, problem.labels))
    return launches(lowered(gradient_of(problem), *shapes, capability=90))


KERNELS = {
    "mean": {"row_stats_and_grads_kernel"},
    "none": {"row_stats_kernel", "row_grads_kernel"},
}


def cases():
    """Each option alone, in both forms of the operation, for a vocabulary that tiles fit in and a ragged one.

    `test_compiled_kernels.py` looks at the stores of every kernel in every form, one at a time.
    """
    often = {("mean", "everything", 301), ("none", "everything", 512), ("mean", "bias", 301)}
    for case in itertools.product(KERNELS, OPTIONS, [512, 301]):
        yield pytest.param(*case, marks=[] if case in often else [pytest.mark.exhaustive])


@needs_plugin
@pytest.mark.parametrize(("reduction", "name", "vocab"), [*cases()])
def test_a_kernel_writes_its_own_outputs_and_nothing_else(reduction, name, vocab):
    found = program(reduction, name, vocab)
    assert {launch.name for launch in found} == KERNELS[reduction]
    for launch in found:
        assert "output_operand_alias" not in launch.text
        assert "operand_output_alias" not in launch.text
        assert pointers(launch.ptx) == launch.operands + launch.results
        outputs = set(range(launch.operands, launch.operands + launch.results))
        assert written_parameters(launch.ptx) == outputs
        assert "atom." not in launch.ptx
        assert "red.global" not in launch.ptx


@needs_plugin
def test_what_reads_the_stores_would_see_a_kernel_that_writes_an_operand():
    # A kernel that writes through its first pointer, made of one that does not.
    launch = program("mean", "bias", 301)[0]
    stores = [line for line in launch.ptx.splitlines() if "st.global" in line]
    address = stores[-1][stores[-1].index("[") + 1 : stores[-1].index("]")].split()[0]
    loads = [line for line in launch.ptx.splitlines() if "ld.global" in line]
    read = loads[0][loads[0].index("[") + 1 : loads[0].index("]")].split()[0]
    broken = launch.ptx.replace(stores[-1], stores[-1].replace(address, read))
    assert broken != launch.ptx
    assert written_parameters(broken) - set(range(launch.operands, launch.operands + launch.results))


# ---- under schedules of all kinds ----------------------------------------------------------------------------


def programs():
    """Programs in which a buffer that is written behind XLA's back would be seen, by name: gradients of each."""
    for reduction, bias, dtype in itertools.product(("mean", "none"), (None, "float32"), ("float32", "bfloat16")):
        problem = make_problem(
            batch=(96,), hidden_size=64, vocab=1000, dtype=dtype, bias=bias, reduction=reduction, chunk_size=32,
            z_loss=1e-3, ignored=0.2, precision="highest",
        )  # fmt: skip
        loss, gradient = loss_of(problem), gradient_of(problem)
        inputs, labels = problem.inputs, problem.labels

        def scanned(inputs, labels, gradient=gradient):
            def step(carry, shift):
                return jax.tree.map(jnp.add, carry, gradient(inputs, (labels + shift) % 1000)), None

            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, inputs, labels))
            return jax.lax.scan(step, zeros, jnp.arange(3))[0]

        def rematted(inputs, labels, loss=loss):
            return jax.grad(jax.checkpoint(loss))(inputs, labels)

        def twice(inputs, labels, gradient=gradient):
            one = gradient(inputs, labels)
            other = gradient(jax.tree.map(lambda a: a * 0.5, inputs), labels)
            # What was read, once more, after both.
            return one, other, jax.tree.map(lambda a: a * 1.0, inputs)

        for name, function in {"jit": gradient, "scan": scanned, "remat": rematted, "twice": twice}.items():
            yield f"{name} {reduction} {bias} {dtype}", jax.jit(function), (inputs, labels)


def run_programs(path):
    """Runs every program three times, holds it to itself, and saves what it gave."""
    arrays = {}
    for name, function, args in programs():
        runs = [[np.asarray(leaf) for leaf in jax.tree.leaves(function(*args))] for _ in range(3)]
        for run in runs[1:]:
            for one, other in zip(runs[0], run, strict=True):
                assert one.tobytes() == other.tobytes(), f"{name}: another result in another run"
        arrays |= {f"{name} {index}": leaf.astype(np.float32) for index, leaf in enumerate(runs[0])}
    np.savez(path, **arrays)


SCHEDULES = {
    "as it comes": "",
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=false",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "command buffers": "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION",
}


@needs_gpu
def test_no_schedule_changes_a_gradient(tmp_path):
    saved = {}
    for index, (name, flags) in enumerate(SCHEDULES.items()):
        path = tmp_path / f"{index}.npz"
        environment = {
            **os.environ,
            # One choice of products for all, so that what differs is the schedule.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 {flags}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        done = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        saved[name] = np.load(path)
    expected = saved["as it comes"]
    for name, found in saved.items():
        for key in expected.files:
            # Another order of summation: a unit in the last place of the largest, or a few of float32.
            little = 2**-7 if "bfloat16" in key else 1e-5
            scale = np.abs(expected[key]).max()
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=little * scale, err_msg=f"{key}, {name}")


if __name__ == "__main__":
    run_programs(sys.argv[1])
