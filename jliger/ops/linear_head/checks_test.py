"""Every error names the argument, what it got, and what to do, when the call is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jliger
from jliger import losses
from jliger.core import backend
from jliger.ops.linear_head import checks as head_checks
from jliger.testing.oracle import INTERPRETED, ON_GPU

HIDDEN, KERNEL, LABELS = jnp.zeros((2, 3, 4)), jnp.zeros((4, 7)), jnp.zeros((2, 3), jnp.int32)


def call(**changes):
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS, **changes}
    hidden, kernel, labels = (arguments.pop(name) for name in ("hidden", "kernel", "labels"))
    return jliger.fused_linear_cross_entropy(hidden, kernel, labels, **arguments)


# What is passed; the error; what its message says, in this order.
MISTAKES = [
    ({"kernel_layout": "hw"}, ValueError, ["kernel_layout", "'hw'", "'hv'", "'vh'"]),
    ({"reduction": "average"}, ValueError, ["reduction", "'average'", "'mean'", "'sum'", "'none'"]),
    ({"implementation": "cuda"}, ValueError, ["implementation", "'cuda'", "'triton'", "'xla'"]),
    ({"logit_scale": float("inf")}, ValueError, ["logit_scale", "inf", "finite"]),
    ({"logit_scale": "2"}, TypeError, ["logit_scale", "str", "Python number"]),
    ({"logit_scale": jnp.float32(2)}, TypeError, ["logit_scale", "Array", "Python number"]),
    ({"logit_softcap": 0.0}, ValueError, ["logit_softcap", "0.0", "above 0", "None"]),
    ({"logit_softcap": -30}, ValueError, ["logit_softcap", "-30", "above 0"]),
    ({"logit_softcap": float("nan")}, ValueError, ["logit_softcap", "nan", "finite"]),
    ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5", "[0, 1]"]),
    ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "[0, 1]"]),
    ({"z_loss": -1e-4}, ValueError, ["z_loss", "-0.0001", "at least 0"]),
    ({"z_loss": None}, TypeError, ["z_loss", "NoneType", "Python number"]),
    ({"ignore_index": -100.0}, TypeError, ["ignore_index", "-100.0", "integer"]),
    ({"ignore_index": True}, TypeError, ["ignore_index", "True", "integer"]),
    ({"chunk_size": 0}, ValueError, ["chunk_size", "0", "at least 1"]),
    ({"chunk_size": 2.0}, TypeError, ["chunk_size", "2.0", "integer"]),
    ({"vocab_size": 0}, ValueError, ["vocab_size", "0", "at least 1", "None"]),
    ({"vocab_size": 8}, ValueError, ["vocab_size", "8", "at most 7"]),
    ({"vocab_size": True}, TypeError, ["vocab_size", "True", "integer"]),
    ({"vocab_size": 7.0}, TypeError, ["vocab_size", "7.0", "integer"]),
    ({"normalizer": 3.0, "reduction": "sum"}, ValueError, ["normalizer", "'sum'", "'mean'"]),
    ({"normalizer": 3.0, "reduction": "none"}, ValueError, ["normalizer", "'none'", "'mean'"]),
    ({"normalizer": jnp.ones(2)}, ValueError, ["normalizer", "(2,)", "scalar"]),
    ({"hidden": jnp.zeros((2, 3, 4), int)}, TypeError, ["hidden", "int32", "float32"]),
    ({"hidden": jnp.zeros((2, 3, 4), jnp.complex64)}, TypeError, ["hidden", "complex64", "float32"]),
    ({"hidden": jnp.zeros(())}, ValueError, ["hidden", "scalar", "[*B, H]"]),
    ({"kernel": jnp.zeros((4, 7), int)}, TypeError, ["kernel", "int32", "float32"]),
    ({"kernel": jnp.zeros(4)}, ValueError, ["kernel", "(4,)", "[H, V]", "'hv'"]),
    ({"kernel": jnp.zeros((5, 7))}, ValueError, ["kernel", "(5, 7)", "[H, V]", "(2, 3, 4)", "H must agree"]),
    ({"kernel": jnp.zeros((7, 4))}, ValueError, ["kernel", "(7, 4)", "[H, V]", "'vh'"]),
    ({"hidden": HIDDEN @ KERNEL}, ValueError, ["kernel", "(4, 7)", "hidden is logits", "hidden states"]),
    ({"hidden": None}, TypeError, ["hidden", "None", "an array"]),
    ({"hidden": [HIDDEN[0], HIDDEN[1]]}, TypeError, ["hidden", "list", "jnp.stack"]),
    ({"kernel": nnx.Linear(4, 7, rngs=nnx.Rngs(0))}, TypeError, ["kernel", "Linear", "pass the kernel", "jliger.nnx"]),
    ({"kernel": linen.Dense(7)}, TypeError, ["kernel", "Dense", "pass the kernel", "jliger.linen"]),
    ({"kernel": linen.Partitioned(KERNEL, (None, None))}, TypeError, ["kernel", "Partitioned", "meta.unbox"]),
    ({"kernel": {"kernel": KERNEL}}, TypeError, ["kernel", "dict", "one of its arrays", "jliger.linen"]),
    ({"kernel": jax.ShapeDtypeStruct((4, 7), "float32")}, TypeError, ["kernel", "ShapeDtypeStruct", "an array"]),
    ({"labels": np.array([[1, 2], [3]], object)}, TypeError, ["labels", "ndarray", "numbers"]),
    ({"where": [[True] * 3] * 2}, TypeError, ["where", "list", "jnp.asarray"]),
    ({"bias": linen.Partitioned(KERNEL[0], (None,))}, TypeError, ["bias", "Partitioned", "unbox"]),
    ({"weights": [[1.0] * 3] * 2}, TypeError, ["weights", "list", "jnp.asarray"]),
    ({"normalizer": [3.0]}, TypeError, ["normalizer", "list"]),
    ({"adapter": KERNEL}, TypeError, ["adapter", "ArrayImpl", "jliger.LinearAdapter"]),
    ({"adapter": (KERNEL, None)}, TypeError, ["adapter.b", "None", "an array"]),
    ({"precision": ["high", "high"]}, TypeError, ["precision", "['high', 'high']", "'highest'", "tuple"]),
    ({"precision": "hi"}, ValueError, ["precision", "'hi'", "'highest'"]),
    ({"logits_dtype": "bf16"}, TypeError, ["logits_dtype", "'bf16'", "'bfloat16'"]),
    ({"vocab_axis_name": 0}, ValueError, ["vocab_axis_name", "0", "shard_map"]),
    ({"kernel_layout": "vh"}, ValueError, ["kernel", "(4, 7)", "[V, H]", "'hv'"]),
    ({"kernel": jnp.zeros((4, 0))}, ValueError, ["kernel", "(4, 0)", "at least one column"]),
    ({"kernel": jnp.zeros((4, 7), jnp.bfloat16)}, TypeError, ["kernel", "bfloat16", "float32", "hidden's dtype"]),
    ({"labels": jnp.zeros((2, 3))}, TypeError, ["labels", "float32", "integers"]),
    ({"labels": jnp.zeros((2, 3), bool)}, TypeError, ["labels", "bool", "integers"]),
    ({"labels": jnp.zeros((6,), int)}, ValueError, ["labels", "(6,)", "hidden's leading dimensions", "(2, 3)"]),
    ({"bias": jnp.zeros(4)}, ValueError, ["bias", "(4,)", "(7,)"]),
    ({"bias": jnp.zeros((1, 7))}, ValueError, ["bias", "(1, 7)", "(7,)"]),
    ({"bias": jnp.zeros(7, int)}, TypeError, ["bias", "int32", "float32"]),
    ({"where": jnp.ones((2, 3))}, TypeError, ["where", "float32", "bools", "weights"]),
    ({"where": jnp.ones((3,), bool)}, ValueError, ["where", "(3,)", "(2, 3)"]),
    ({"weights": jnp.ones((2, 3), bool)}, TypeError, ["weights", "bool", "where"]),
    ({"weights": jnp.ones((2, 1))}, ValueError, ["weights", "(2, 1)", "(2, 3)"]),
    ({"class_weights": jnp.ones(4)}, ValueError, ["class_weights", "(4,)", "(7,)"]),
    ({"class_weights": jnp.ones(7, int)}, TypeError, ["class_weights", "int32", "float32"]),
    ({"logits_dtype": jnp.int8}, TypeError, ["logits_dtype", "int8", "floating-point"]),
    ({"vocab_axis_name": "model"}, ValueError, ["vocab_axis_name", "'model'", "shard_map"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "says"), MISTAKES, ids=lambda value: None)
def test_each_mistake_is_named(changes, error, says):
    with pytest.raises(error) as raised:
        call(**changes)
    message, position = str(raised.value), 0
    for part in says:
        assert part in message[position:], f"{part!r} is missing in {message!r}"
        position = message.index(part, position) + len(part)
    assert message.endswith((".", "?")), message


def test_what_is_right_raises_nothing():
    jax.eval_shape(lambda: call())
    jax.eval_shape(lambda: call(logit_scale=np.float32(2), label_smoothing=1, z_loss=0, chunk_size=np.int64(3)))
    jax.eval_shape(lambda: call(weights=jnp.ones((2, 3), int), normalizer=3, precision=("high", "highest")))
    jax.eval_shape(lambda: call(kernel=nnx.Param(KERNEL), labels=np.zeros((2, 3), np.int8)))


def test_options_cannot_be_traced():
    for name in ("logit_scale", "logit_softcap", "label_smoothing", "z_loss"):
        with pytest.raises(TypeError, match=f"{name} got .*Python number"):
            jax.jit(lambda value, name=name: call(**{name: value}))(0.5)
    with pytest.raises(TypeError, match=r"vocab_size got .*Python integer"):
        jax.jit(lambda value: call(vocab_size=value))(7)


def test_a_traced_scale_has_another_way():
    with pytest.raises(TypeError, match=r"logit_scale got a traced value.*multiply hidden and bias"):
        jax.eval_shape(lambda scale: call(logit_scale=scale), 2.0)


def test_other_operations_name_them_too():
    layer, box = nnx.Linear(4, 7, rngs=nnx.Rngs(0)), linen.Partitioned(KERNEL, (None, None))
    for problem, says in (
        (lambda: jliger.linear_logprobs(HIDDEN, layer, LABELS), "^kernel got a Linear"),
        (lambda: jliger.linear_logprobs(None, KERNEL, LABELS), "^hidden got None"),
        (lambda: losses.fused_linear_kl(HIDDEN, KERNEL, HIDDEN, layer), "^teacher_kernel got a Linear"),
        (lambda: losses.fused_linear_jsd(HIDDEN, box, HIDDEN, KERNEL), "^student_kernel got a Partitioned"),
        (lambda: losses.fused_linear_kl(HIDDEN, KERNEL, None, KERNEL), "^teacher_hidden got None"),
        (lambda: losses.fused_linear_kl(HIDDEN, KERNEL, HIDDEN, KERNEL, precision=["high"]), "^precision got"),
        (lambda: losses.fused_linear_kl(HIDDEN, KERNEL, HIDDEN, KERNEL, logits_dtype="bf16"), "^logits_dtype got"),
    ):
        with pytest.raises(TypeError, match=says):
            problem()


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="there Triton runs")
def test_triton_without_a_gpu():
    for problem in (
        lambda: call(implementation="triton"),
        lambda: jliger.linear_logprobs(HIDDEN, KERNEL, LABELS, implementation="triton"),
        lambda: losses.fused_linear_kl(HIDDEN, KERNEL, HIDDEN, KERNEL, implementation="triton"),
    ):
        with pytest.raises(ValueError, match=r"implementation got 'triton'.*no GPU.*cpu.*'xla'.*compute_capability"):
            problem()
        with jliger.compute_capability(90):
            jax.eval_shape(problem)


def test_what_triton_does_not_take():
    with jax.enable_x64(True):
        hidden, kernel = jnp.zeros((2, 4), jnp.float64), jnp.zeros((4, 7), jnp.float64)
    labels = jnp.zeros(2, jnp.int32)
    with pytest.raises(TypeError, match=r"hidden got dtype float64.*implementation='xla'"):
        head_checks.check_operands(hidden, kernel, labels, None, kernel_layout="hv", implementation="triton")
    with pytest.raises(TypeError, match=r"logits_dtype got float64.*float32, bfloat16 and float16"):
        head_checks.as_logits_dtype(np.dtype("float64"), hidden, "triton")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"implementation got 'triton'.*not installed.*'xla'"):
        call(implementation="triton")


def test_a_bfloat16_kernel_with_float16_hidden():
    with pytest.raises(TypeError, match="kernel got dtype bfloat16 with hidden of float16"):
        call(hidden=HIDDEN.astype(jnp.float16), kernel=KERNEL.astype(jnp.bfloat16))
