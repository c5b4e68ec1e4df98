"""Every kernel, in every form it takes, compiles for every supported GPU, on a machine that has none of them."""

import itertools
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest

import jliger
from jliger import losses
from jliger.ops.logits import Block, Coefficients, LogitMap, StatsWanted, get_rows
from jliger.ops.logits.distillation import (
    DistillationBlock,
    DistillationCoefficients,
    DistillationMap,
    Products,
    get_distillation_rows,
)
from jliger.ops.logits.float8 import get_float8
from jliger.ops.logits.top_k import get_top_logits
from jliger.ops.logits.top_k_kl import StudentCoefficients, StudentMap, get_student_rows
from jliger.ops.norms.types import NormConfig, NormInputs, NormSaved
from jliger.testing.launches import HAS_PLUGIN, launches, lowered, narrow_row_offsets, pointers, written_parameters
from jliger.testing.oracle import every_pair, pairs_as_parameters

pytestmark = pytest.mark.skipif(not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")

CAPABILITIES = [80, 90, 100]  # A100, H100, B200
OTHER_CAPABILITIES = [89, 120]  # RTX 40 and L40S; RTX 50 and RTX PRO

# Constexprs and what else a kernel is compiled for, the GPU among them, so that every pair meets in one.
BRANCHES = {
    "capability": CAPABILITIES,
    "bias": [False, True],
    "class_weights": [False, True],
    "temperature": [False, True],
    "softcap": [None, 30.0],
    "scale": [1.0, -0.5],
    "by_lse": [False, True],
    "smoothing": [False, True],
    "by_logit": [False, True],
    "weighted_sum": [False, True],
    "mean_logit": [False, True],
    "dtype": ["float32", "bfloat16", "float16"],
    "width": [301, 512, 262144],
    "run_time_width": [False],
}


def all_kernels(branch):
    """A function that calls all three kernels in one form, and its arguments' shapes."""
    tokens, width = 4, branch["width"]
    stride = width + -width % 8
    rows = get_rows("triton", branch["capability"])

    def shape(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct(dims, dtype)

    def vector(name):
        return shape(stride) if branch[name] else None

    per_token = shape(tokens)
    temperature = per_token if branch["temperature"] else None
    run_time_width = shape(dtype="int32") if branch["run_time_width"] else None
    block = Block(vector("bias"), vector("class_weights"), shape(tokens, dtype="int32"), temperature, run_time_width)
    coefficients = Coefficients(
        per_token, per_token, *(per_token if branch[name] else None for name in ("by_lse", "smoothing", "by_logit"))
    )
    logit_map = LogitMap(branch["scale"], branch["softcap"], width)
    wanted, dtype = StatsWanted(branch["weighted_sum"], branch["mean_logit"]), jnp.dtype(branch["dtype"])

    def call(product, block, coefficients):
        stats = rows.row_stats(product, block, logit_map, wanted)
        grads = rows.row_grads(product, block, logit_map, stats.max, stats.log_sum, coefficients, dtype=dtype)
        both = rows.row_stats_and_grads(product, block, logit_map, wanted, coefficients, dtype=dtype)
        return stats, grads, both

    return call, (shape(tokens, stride, dtype=branch["dtype"]), block, coefficients)


PAIR_BRANCHES = {
    "capability": CAPABILITIES,
    "beta": [0.0, 0.5, 1.0],
    "temperature": [1.0, 2.0],
    "labels": [False, True],
    "biases": [(False, False), (True, False), (False, True)],
    "softcaps": [(None, None), (30.0, None), (None, 30.0)],
    "dtypes": [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
    "width": [301, 512, 262144],
    "run_time_width": [False],
}


def and_exhaustive(branches):
    """Every branch, and every pair of branches; with widths of run time, and for other GPUs, marked exhaustive."""
    more = every_pair({**branches, "capability": [90, *OTHER_CAPABILITIES], "run_time_width": [False, True]})
    return [*pairs_as_parameters(branches), *(pytest.param(branch, marks=pytest.mark.exhaustive) for branch in more)]


def all_pair_kernels(branch):
    """A function that calls all four kernels of pairs in one form, and its arguments' shapes."""
    tokens, width = 4, branch["width"]
    stride = width + -width % 8
    rows = get_distillation_rows("triton", branch["capability"])

    def shape(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct(dims, dtype)

    labels, run_time_width = shape(tokens, dtype="int32"), shape(dtype="int32") if branch["run_time_width"] else None
    block = DistillationBlock(
        *(Block(shape(stride) if bias else None, None, labels, width=run_time_width) for bias in branch["biases"])
    )
    of_labels = (shape(tokens) if branch["labels"] else None,) * 2
    distillation_map = DistillationMap(
        *(LogitMap(0.5, softcap, width) for softcap in branch["softcaps"]),
        branch["beta"],
        branch["temperature"],
        branch["labels"],
    )
    dtype = jnp.dtype(branch["dtypes"][0])

    def call(products, block, coefficients):
        stats = rows.distillation_stats(products, block, distillation_map)
        divergence = rows.distillation_divergence(products, block, distillation_map, stats)
        grads = rows.distillation_grads(
            products, block, distillation_map, stats, divergence.q_sum, coefficients, dtype=dtype
        )
        at_once = rows.distillation_stats_and_grads(products, block, distillation_map, coefficients, dtype=dtype)
        return stats, divergence, grads, at_once

    products = Products(*(shape(tokens, stride, dtype=dtype) for dtype in branch["dtypes"]))
    return call, (products, block, DistillationCoefficients(shape(tokens), *of_labels))


def assemble(ptx, capability, folder):
    """What the GPU's driver would do with a kernel when it is loaded."""
    from triton import knobs

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    architecture = ptx.split(".target ")[1].split()[0].rstrip(",")
    assert architecture.startswith(f"sm_{capability}")
    done = subprocess.run(
        [
            knobs.nvidia.ptxas_blackwell.path,
            "-O0",
            f"-arch={architecture}",
            str(source),
            "-o",
            str(folder / "kernel.cubin"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def assert_writes_its_results_alone(launch):
    """It stores through the pointers of its results, each of them, and through no other."""
    assert "alias" not in launch.text
    assert pointers(launch.ptx) == launch.operands + launch.results
    assert written_parameters(launch.ptx) == set(range(launch.operands, launch.operands + launch.results))
    assert "atom." not in launch.ptx
    assert not re.search(r"\bred\.", launch.ptx)


@pytest.mark.parametrize("branch", and_exhaustive(BRANCHES), ids=itertools.count())
def test_every_branch_of_every_kernel(branch, tmp_path):
    call, shapes = all_kernels(branch)
    found = launches(lowered(call, *shapes, capability=branch["capability"]))
    assert [launch.name for launch in found] == ["row_stats_kernel", "row_grads_kernel", "row_stats_and_grads_kernel"]
    for launch in found:
        assemble(launch.ptx, branch["capability"], tmp_path)
        assert_writes_its_results_alone(launch)
        assert not narrow_row_offsets(launch.ptx)


@pytest.mark.parametrize("branch", and_exhaustive(PAIR_BRANCHES), ids=itertools.count())
def test_every_branch_of_every_kernel_of_pairs(branch, tmp_path):
    call, shapes = all_pair_kernels(branch)
    found = launches(lowered(call, *shapes, capability=branch["capability"]))
    kinds = ("stats", "divergence", "grads", "stats_and_grads")
    assert [launch.name for launch in found] == [f"distillation_{kind}_kernel" for kind in kinds]
    for launch in found:
        assemble(launch.ptx, branch["capability"], tmp_path)
        assert_writes_its_results_alone(launch)
        assert not narrow_row_offsets(launch.ptx)


@pytest.mark.parametrize(
    "capability", [90, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in (89, 100, 120))]
)
def test_kernels_of_8_bit_operands(capability, tmp_path):
    tokens, width, stride = 128, 301, 384
    float8 = get_float8("triton", capability)

    def call(product, block, per_row, coefficients):
        grads = float8.row_grads(product, block, LogitMap(0.5, 30.0, width), *per_row, coefficients)
        return grads, float8.both_layouts(product, per_row[0][0])

    def shape(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct(dims, dtype)

    block = Block(shape(stride), shape(stride), shape(tokens, dtype="int32"), shape(tokens))
    shapes = shape(tokens, stride, dtype="bfloat16"), block, (shape(tokens),) * 2, Coefficients(*(shape(tokens),) * 5)
    found = launches(lowered(call, *shapes, capability=capability))
    assert [launch.name for launch in found] == ["row_grads_float8_kernel", "both_layouts_kernel"]
    for launch in found:
        assemble(launch.ptx, capability, tmp_path)
        assert_writes_its_results_alone(launch)
        # Of gradients and their transpose, each thread writes 16 bytes at once.
        assert "st.global.v4.b32" in launch.ptx


# Fast sums of logits alone: in those of gradients, probabilities would be lost beside the label's part.
FAST, EXACT, IN_16_BITS = (True, True), (True, False), (False, False)


@pytest.mark.parametrize(
    ("capability", "function", "products", "expected"),
    [
        (90, jliger.fused_linear_cross_entropy, "float8", [FAST, EXACT, EXACT]),
        (90, jliger.linear_logprobs, "float8", [FAST, FAST, EXACT, EXACT]),
        *(
            pytest.param(capability, function, "float8_forward", [FAST] * logits + [IN_16_BITS] * 2, marks=marks)
            for capability, marks in ((90, ()), *((other, pytest.mark.exhaustive) for other in (89, 100, 120)))
            for logits, function in ((1, jliger.fused_linear_cross_entropy), (2, jliger.linear_logprobs))
        ),
    ],
)
def test_8_bit_products_name_the_algorithm_of_cublas(capability, function, products, expected):
    """Without the name, XLA compiles products of its own to compare with, for minutes."""
    arguments = (
        jax.ShapeDtypeStruct(dims, dtype)
        for dims, dtype in (((64, 32), "bfloat16"), ((32, 256), "float32"), ((64,), "int32"))
    )

    def gradients(hidden, kernel, labels):
        def total(hidden, kernel):
            return jax.tree.leaves(function(hidden, kernel, labels, products=products))[0].sum()

        return jax.grad(total, (0, 1))(hidden, kernel)

    with jliger.compute_capability(capability):
        module = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in module.splitlines() if "dot_general" in line]
    in_8_bits = ["f8E" in line for line in lines]
    assert (
        list(zip(in_8_bits, ["allow_imprecise_accumulation = true" in line for line in lines], strict=True)) == expected
    )
    for line in itertools.compress(lines, in_8_bits):
        assert "accumulation_type = f32" in line
        assert re.search(r"contracting_dims = \[1\] x \[1\]", line)


TOP_K_BRANCHES = {
    "capability": CAPABILITIES,
    "k": [7, 64, 256],
    "columns": [1, 100],
    "bias": [False, True],
    "inverse_temperature": [False, True],
    "softcap": [None, 30.0],
    "temperature": [1.0, 2.0],
    "labels": [False, True],
    "masked": [False, True],
    "dtype": ["float32", "bfloat16", "float16"],
    "width": [301, 262144],
    "run_time_width": [False, True],
}


def all_top_k_kernels(branch):
    """A function that calls all kernels of the top k in one form, and its arguments' shapes."""
    tokens, width = 4, branch["width"]
    stride = width + -width % 8
    top_logits = get_top_logits("triton", branch["capability"])
    rows = get_student_rows("triton", branch["capability"])

    def shape(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct(dims, dtype)

    per_token, of_columns = shape(tokens), shape(tokens, branch["columns"])
    run_time_width = shape(dtype="int32") if branch["run_time_width"] else None
    inverse_temperature = per_token if branch["inverse_temperature"] else None
    bias = shape(stride) if branch["bias"] else None
    block = Block(bias, None, shape(tokens, dtype="int32"), inverse_temperature, run_time_width)
    logit_map = LogitMap(-0.5, branch["softcap"], width, branch["masked"])
    student_map = StudentMap(logit_map, branch["temperature"], branch["labels"])
    hard = per_token if student_map.with_hard_sum else None
    coefficients = StudentCoefficients(per_token, hard, per_token if branch["labels"] else None)
    dtype = jnp.dtype(branch["dtype"])

    def call(product, block, coefficients, ids, of_columns):
        top = top_logits(product, block, logit_map, branch["k"])
        stats = rows.student_stats(product, block, student_map)
        grads = rows.student_grads(product, block, student_map, stats, coefficients, ids, of_columns, dtype=dtype)
        both = rows.student_stats_and_grads(product, block, student_map, coefficients, ids, of_columns, dtype=dtype)
        return top, stats, grads, both

    ids = shape(tokens, branch["columns"], dtype="int32")
    return call, (shape(tokens, stride, dtype=branch["dtype"]), block, coefficients, ids, of_columns)


@pytest.mark.parametrize(
    "branch",
    [
        pytest.param(branch, marks=[pytest.mark.exhaustive] if number else [])
        for number, branch in enumerate(every_pair(TOP_K_BRANCHES))
    ],
    ids=itertools.count(),
)
def test_every_branch_of_every_kernel_of_the_top_k(branch, tmp_path):
    call, shapes = all_top_k_kernels(branch)
    found = launches(lowered(call, *shapes, capability=branch["capability"]))
    of_student = ("student_stats_kernel", "student_grads_kernel", "student_stats_and_grads_kernel")
    of_selection = ("group_maxima_kernel", "select_groups_kernel", "select_columns_kernel")
    assert [launch.name for launch in found] == [*of_selection, *of_student]
    for launch in found:
        assemble(launch.ptx, branch["capability"], tmp_path)
        assert_writes_its_results_alone(launch)
        assert not narrow_row_offsets(launch.ptx)


NORM_BRANCHES = {
    "capability": CAPABILITIES,
    "centered": [False, True],
    "residual": [False, True],
    "offset": [False, True],
    "scale_offset": [0.0, 1.0],
    "round_first": [False, True],
    "dtypes": [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")],
    "width": [301, 1024, 8192],
}


def both_norm_kernels(branch):
    """A function that calls both kernels of norms in one form, and its arguments' shapes."""
    from jliger.ops.norms import triton

    rows, width, dtypes = 4, branch["width"], branch["dtypes"]
    config = NormConfig(
        1e-6,
        branch["scale_offset"],
        branch["centered"],
        branch["round_first"],
        branch["offset"],
        jnp.dtype(dtypes[1]),
        "triton",
        branch["capability"],
    )
    row, parameter = (jax.ShapeDtypeStruct(*of) for of in (((rows, width), dtypes[0]), ((width,), dtypes[1])))
    output = jax.ShapeDtypeStruct(row.shape, dtypes[1])
    residual, offset = row if branch["residual"] else None, parameter if branch["offset"] else None

    def call(inputs, grad):
        result = triton.norm(config, inputs)
        saved = NormSaved(inputs.x, inputs.scale, result.mean, result.inverse, grad, result.total)
        return result, triton.norm_grads(config, saved)

    return call, (NormInputs(row, residual, parameter, offset), output)


@pytest.mark.parametrize("branch", pairs_as_parameters(NORM_BRANCHES), ids=itertools.count())
def test_every_branch_of_every_kernel_of_norms(branch, tmp_path):
    call, shapes = both_norm_kernels(branch)
    found = launches(lowered(call, *shapes, capability=branch["capability"]))
    assert [launch.name for launch in found] == ["norm_kernel", "norm_grads_kernel"]
    for launch in found:
        assemble(launch.ptx, branch["capability"], tmp_path)
        assert_writes_its_results_alone(launch)
        assert not narrow_row_offsets(launch.ptx)
        if branch["width"] == 8192:
            assert re.search(r"ld\.global\S*\.v4\.b32", launch.ptx)


def test_a_distillation_step_is_exported():
    tokens, vocab = 16400, 50257

    def step(student_hidden, student_kernel, teacher_hidden, teacher_kernel, labels):
        def loss(*student):
            return losses.fused_linear_jsd(
                *student, teacher_hidden, teacher_kernel, labels=labels, hard_weight=0.5, temperature=2.0
            )

        return jax.grad(loss, (0, 1))(student_hidden, student_kernel), loss(student_hidden, student_kernel)

    shapes = [
        jax.ShapeDtypeStruct(dims, dtype)
        for dims, dtype in [
            ((tokens, 128), "bfloat16"),
            ((128, vocab), "float32"),
            ((tokens, 256), "bfloat16"),
            ((256, vocab), "bfloat16"),
            ((tokens,), "int32"),
        ]
    ]
    module = lowered(step, *shapes, capability=90)
    assert {launch.name for launch in launches(module)} == {
        "distillation_stats_and_grads_kernel",
        "distillation_stats_kernel",
        "distillation_divergence_kernel",
    }
    assert f"{tokens}x{vocab}" not in module, "logits of all tokens"


# What differs from GPU to GPU is in the kernels, each form of which is compiled for each above.
@pytest.mark.parametrize(
    ("capability", "dtypes", "reduction"),
    [
        (90, ("bfloat16", "float32"), "mean"),
        (100, ("float16", "float16"), "none"),
    ],
)
def test_a_training_step_is_exported(capability, dtypes, reduction):
    # Of a size at which the recompute form goes through blocks, the last one overlapping.
    tokens, hidden_size, vocab = 16400, 128, 50257

    def step(hidden, kernel, bias, labels):
        def loss(hidden, kernel, bias):
            return jliger.fused_linear_cross_entropy(
                hidden, kernel, labels, bias=bias, reduction=reduction, label_smoothing=0.1, z_loss=1e-4
            ).mean()

        grads = jax.grad(loss, (0, 1, 2))(hidden, kernel, bias)
        return kernel - 0.1 * grads[1], grads, loss(hidden, kernel, bias)

    shapes = [
        jax.ShapeDtypeStruct(dims, dtype)
        for dims, dtype in [
            ((tokens, hidden_size), dtypes[0]),
            ((hidden_size, vocab), dtypes[1]),
            ((vocab,), "float32"),
            ((tokens,), "int32"),
        ]
    ]
    module = lowered(step, *shapes, capability=capability)
    names = {launch.name for launch in launches(module)}
    with_gradient = {"row_stats_and_grads_kernel"} if reduction == "mean" else {"row_grads_kernel"}
    assert names == {"row_stats_kernel"} | with_gradient
    assert f"{tokens}x{vocab}" not in module, "logits of all tokens"


# The README's shapes. The last block of columns is narrower than the others, and all columns are in no whole tiles.
@pytest.mark.parametrize(
    ("vocab", "temperature", "vocab_size"), [(128256, 1.0, None), (151936, 0.7, None), (50304, 1.0, 50264)]
)
def test_tiles_are_loaded_and_stored_as_vectors(vocab, temperature, vocab_size):
    def loss(hidden, kernel, bias, labels, reduction):
        options = dict(bias=bias, reduction=reduction, temperature=temperature, vocab_size=vocab_size)
        options["implementation"] = "triton"
        return jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options).sum()

    def every_kernel(hidden, kernel, bias, labels):
        return [jax.grad(loss, (0, 1))(hidden, kernel, bias, labels, reduction) for reduction in ("mean", "none")]

    shapes = [((8192, 64), "bfloat16"), ((64, vocab), "bfloat16"), ((vocab,), "float32"), ((8192,), "int32")]
    module = lowered(every_kernel, *(jax.ShapeDtypeStruct(*shape) for shape in shapes), capability=90)
    found = {launch.ptx: launch.name for launch in launches(module)}
    # Gradients by themselves are computed for blocks of columns, of two widths.
    assert sorted(found.values()) == ["row_grads_kernel"] * 2 + ["row_stats_and_grads_kernel", "row_stats_kernel"]
    for ptx, name in found.items():
        # Where a row starts takes 64 bits.
        program = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)[1]
        assert not re.search(rf"mul\.lo\.s32\s+%r\d+, {program},", ptx)
        # Logits and bias, 8 columns a thread; by themselves come the label's, and the vector of the prediction.
        tiles = 2 if name == "row_stats_and_grads_kernel" else 1
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 3 * tiles
        alone = len(re.findall(r"ld\.global\S*\.b16", ptx))
        assert alone == {"row_stats_kernel": 2, "row_grads_kernel": 1, "row_stats_and_grads_kernel": 3}[name]
        if "grads" in name:
            assert re.search(r"st\.global\S*\.v4\.b32", ptx)
            assert len(re.findall(r"st\.global\S*\.b16", ptx)) == 1


def test_another_backend_is_not_exported_for():
    # implementation="xla" holds for any device, and calls no kernel.
    def loss(hidden, kernel):
        return jliger.fused_linear_cross_entropy(hidden, kernel, jnp.zeros(4, jnp.int32), implementation="xla")

    shapes = jax.ShapeDtypeStruct((4, 8), "float32"), jax.ShapeDtypeStruct((8, 16), "float32")
    assert not launches(lowered(jax.grad(loss, (0, 1)), *shapes, capability=90))


def test_tiles_of_a_width_that_is_known_at_run_time():
    # A device's share of a padded vocabulary: whole tiles are loaded as vectors, as many as there are.
    rows, width = get_rows("triton", 90), 16384

    def shape(*dims, dtype="float32"):
        return jax.ShapeDtypeStruct(dims, dtype)

    block = Block(None, None, shape(4, dtype="int32"), width=shape(dtype="int32"))

    def call(product, block, coefficients):
        logit_map = LogitMap(1.0, None, width)
        stats = rows.row_stats(product, block, logit_map, StatsWanted())
        args = (stats.max, stats.log_sum, coefficients)
        return rows.row_grads(product, block, logit_map, *args, dtype=product.dtype)

    arguments = shape(4, width, dtype="bfloat16"), block, Coefficients(shape(4), shape(4))
    for launch in launches(lowered(call, *arguments, capability=90)):
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", launch.ptx)) >= 4  # the unrolled loop's
        # By themselves are loaded the columns of the last tile, and the label's.
        assert len(re.findall(r"ld\.global\S*\.b16", launch.ptx)) <= 10
        assert_writes_its_results_alone(launch)


def test_a_vocab_size_of_all_columns_changes_no_kernel():
    def kernels(vocab_size):
        def loss(hidden, kernel, labels):
            options = {"vocab_size": vocab_size, "reduction": "none", "implementation": "triton"}
            return jliger.fused_linear_cross_entropy(hidden, kernel, labels, **options).sum()

        shapes = ((16, 8), "float32"), ((8, 301), "float32"), ((16,), "int32")
        module = lowered(jax.grad(loss, (0, 1)), *(jax.ShapeDtypeStruct(*shape) for shape in shapes), capability=90)
        return [launch.ptx for launch in launches(module)]

    assert kernels(None) == kernels(301) != kernels(300)
