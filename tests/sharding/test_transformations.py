"""Under whatever a training step does to its loss, on several devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import HIDDEN, IMPLEMENTATION, MODES, PLACES, REDUCTIONS, VOCAB, assert_same, crossed, now_and_then, pick

import jliger

SOME_PLACES = pick(["fsdp-h", "dp+tp"], on_gpus=["fsdp-h"], interpreted=["fsdp-h"])
FUSED = functools.partial(jliger.fused_linear_cross_entropy, implementation=IMPLEMENTATION, chunk_size=4)


def make(*leading, seed=0):
    """Hidden states of `leading` and a batch, a kernel, labels of which some don't count, and cotangents."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, VOCAB, (*leading, 4, 8))
    return {
        "hidden": random.normal(size=(*leading, 4, 8, HIDDEN)),
        "kernel": random.normal(size=(HIDDEN, VOCAB)) / 4,
        "labels": np.where(random.random(labels.shape) < 0.2, -100, labels).astype(np.int32),
        "cotangent": random.uniform(0.5, 1.5, labels.shape),
    }


def put(arrays, place, mesh):
    """In float32, sharded; what a transformation goes over leads and is whole."""

    def spec(name, array):
        if name == "kernel":
            return PLACES[place].kernel
        leading = array.ndim - 2 - (name == "hidden")
        return P(*(None,) * leading, *PLACES[place].tokens)

    return {
        name: jax.device_put(
            array.astype(np.float32) if array.dtype == np.float64 else array, NamedSharding(mesh, spec(name, array))
        )
        for name, array in arrays.items()
    }


def check(transformed, arrays, mode, place):
    """`transformed(operation, arrays)` is the same with jliger, sharded, as with plain JAX in float64."""
    mesh = PLACES[place].mesh(mode)
    with jax.set_mesh(mesh):
        found = jax.block_until_ready(jax.jit(functools.partial(transformed, FUSED))(put(arrays, place, mesh)))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array) for name, array in arrays.items()}
        expected = jax.jit(functools.partial(transformed, jliger.reference.fused_linear_cross_entropy))(wide)
    assert_same(found, expected)


def total(operation, arrays, reduction):
    loss = operation(arrays["hidden"], arrays["kernel"], arrays["labels"], reduction=reduction, z_loss=0.01)
    return jnp.sum(loss * arrays["cotangent"]) if reduction == "none" else loss


def value_and_grads(function, arrays):
    inputs = {name: arrays[name] for name in ("hidden", "kernel")}
    return jax.value_and_grad(lambda inputs: function({**arrays, **inputs}))(inputs)


every = pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    pick(
        # Each pair of two things of the three.
        now_and_then(
            [
                (mode, place, REDUCTIONS[(number + turn) % 2])
                for number, mode in enumerate(MODES)
                for turn, place in enumerate(SOME_PLACES)
            ],
            lambda number, case: case[1] == "dp+tp",
        ),
        on_gpus=[("auto", "dp+tp", "none"), ("explicit", "fsdp-h", "mean")],
        interpreted=[],
    ),
)


@every
def test_gradient_of_a_scan(mode, place, reduction):
    def transformed(operation, arrays):
        def loss(arrays):
            parts = {name: array for name, array in arrays.items() if name != "kernel"}

            def step(carry, part):
                return carry + total(operation, {**part, "kernel": arrays["kernel"]}, reduction), None

            return jax.lax.scan(step, jnp.zeros((), arrays["hidden"].dtype), parts)[0]

        return value_and_grads(loss, arrays)

    check(transformed, make(2), mode, place)


@every
def test_gradients_accumulated_in_a_scan(mode, place, reduction):
    # Each microbatch is divided by all tokens; the sum of gradients is that of the whole batch.
    def transformed(operation, arrays):
        count = jnp.sum(arrays["labels"] != -100)
        parts = {name: array for name, array in arrays.items() if name != "kernel"}

        def loss(kernel, part):
            if reduction == "none":
                return total(operation, {**part, "kernel": kernel}, "none") / count.astype(part["hidden"].dtype)
            return operation(part["hidden"], kernel, part["labels"], normalizer=count)

        def step(carry, part):
            value, grad = jax.value_and_grad(loss)(arrays["kernel"], part)
            return (carry[0] + value, carry[1] + grad), None

        start = (jnp.zeros((), arrays["hidden"].dtype), jnp.zeros_like(arrays["kernel"]))
        return jax.lax.scan(step, start, parts)[0]

    check(transformed, make(3), mode, place)


@every
def test_remat(mode, place, reduction):
    def transformed(operation, arrays):
        @jax.checkpoint
        def loss(arrays):
            return total(operation, {**arrays, "hidden": jnp.tanh(arrays["hidden"])}, reduction)

        return value_and_grads(loss, arrays)

    check(transformed, make(), mode, place)


@every
def test_vmap_over_hidden_states(mode, place, reduction):
    def transformed(operation, arrays):
        axes = {name: None if name == "kernel" else 0 for name in arrays}

        def loss(arrays):
            each = jax.vmap(functools.partial(total, operation, reduction=reduction), in_axes=(axes,))(arrays)
            return jnp.sum(each * jnp.arange(1, 3, dtype=each.dtype))

        return value_and_grads(loss, arrays)

    check(transformed, make(2), mode, place)


@pytest.mark.parametrize(("mode", "reduction"), crossed(MODES, pick(REDUCTIONS, on_gpus=[], interpreted=[])))
def test_gradients_of_each_in_a_vmap(mode, reduction):
    def transformed(operation, arrays):
        axes = {name: None if name == "kernel" else 0 for name in arrays}
        one = functools.partial(value_and_grads, functools.partial(total, operation, reduction=reduction))
        return jax.vmap(one, in_axes=(axes,))(arrays)

    check(transformed, make(2), mode, "dp")


def of_an_example(operations, options, kind, kernel, hidden, labels, cotangent):
    """The loss of `[B, L]` tokens, by jliger's operations or by those of plain JAX."""
    if kind == "logprobs":
        found = operations.linear_logprobs(hidden, kernel, labels, **options)
        return jnp.sum((found.logprobs + 0.1 * found.entropy) * cotangent)
    if kind == "distillation":
        jsd = getattr(operations, "losses", operations).fused_linear_jsd
        return jsd(hidden, kernel, hidden[..., ::-1], 2 * kernel, labels=labels, hard_weight=0.5, **options)
    return operations.fused_linear_cross_entropy(hidden, kernel, labels, z_loss=0.01, **options)


@pytest.mark.parametrize(
    ("mode", "kind", "vmap"),
    pick(
        [
            ("auto", "mean", {"spmd_axis_name": "data"}),
            ("explicit", "mean", {}),
            ("auto", "logprobs", {}),
            ("explicit", "logprobs", {}),
            ("auto", "distillation", {}),
        ],
        on_gpus=[("auto", "mean", {}), ("explicit", "logprobs", {})],
        interpreted=[("explicit", "mean", {})],
    ),
)
def test_vmap_over_examples_that_devices_share(mode, kind, vmap):
    def value_and_grads_of(operations, options, vmap, arrays):
        def loss(arrays):
            one = functools.partial(of_an_example, operations, options, kind, arrays["kernel"])
            each = jax.vmap(one, **vmap)(arrays["hidden"], arrays["labels"], arrays["cotangent"])
            return jnp.sum(each * jnp.arange(1, 3, dtype=each.dtype))

        return value_and_grads(loss, arrays)

    arrays, mesh = make(2), PLACES["dp"].mesh(mode)
    with jax.set_mesh(mesh):
        narrow = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}
        sharded = {name: jax.device_put(a, P() if name == "kernel" else P("data")) for name, a in narrow.items()}
        options = {"implementation": IMPLEMENTATION, "chunk_size": 4}
        program = jax.jit(functools.partial(value_and_grads_of, jliger, options, vmap)).lower(sharded).compile()
        found = jax.block_until_ready(program(sharded))
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array) for name, array in arrays.items()}
        assert_same(found, jax.jit(functools.partial(value_and_grads_of, jliger.reference, {}, {}))(wide))
    # A device that has no other's examples can compute none of them. On GPUs XLA joins the two sums.
    found = collectives(program.as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    assert sum(each.size for each in found) == 1 + HIDDEN * VOCAB, found


class Model(nnx.Module):
    """A layer and a head, with a kernel that is sharded."""

    def __init__(self, kernel):
        self.scale = nnx.Param(jnp.ones(HIDDEN))
        self.kernel = nnx.Param(kernel)

    def __call__(self, hidden):
        return hidden * jnp.broadcast_to(self.scale[...], hidden.shape)


@pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    now_and_then(
        itertools.product(MODES, SOME_PLACES, pick(REDUCTIONS, on_gpus=["mean"], interpreted=["none"])),
        lambda number, _: number in (0, 7),
    ),
)
def test_nnx_jit(mode, place, reduction):
    arrays = make()
    mesh = PLACES[place].mesh(mode)
    with jax.set_mesh(mesh):
        sharded = put(arrays, place, mesh)
        model = Model(sharded.pop("kernel"))

        @nnx.jit
        def step(model, sharded):
            def loss(model):
                hidden = model(sharded["hidden"])
                return total(FUSED, {**sharded, "hidden": hidden, "kernel": model.kernel[...]}, reduction)

            return nnx.value_and_grad(loss)(model)

        value, grads = step(model, sharded)
        found = {"loss": value, "kernel": grads["kernel"][...], "scale": grads["scale"][...]}
        jax.block_until_ready(found)

    def loss(kernel, scale):
        hidden = arrays["hidden"] * jnp.broadcast_to(scale, arrays["hidden"].shape)
        return total(
            jliger.reference.fused_linear_cross_entropy, {**arrays, "hidden": hidden, "kernel": kernel}, reduction
        )

    with jax.enable_x64(True):
        wide, grads = jax.value_and_grad(loss, (0, 1))(jnp.asarray(arrays["kernel"]), jnp.ones(HIDDEN))
    assert_same(found, {"loss": wide, "kernel": grads[0], "scale": grads[1]})


@pytest.mark.parametrize(
    ("kind", "reduction"), crossed(["explicit", "manual"], pick(REDUCTIONS, on_gpus=[], interpreted=[]))
)
def test_export_for_several_devices(kind, reduction):
    # With Auto axes jax itself has no export: what XLA asks for as it compiles is a Python function.
    place = "dp"
    arrays = make()
    mesh = PLACES[place].mesh("explicit" if kind == "explicit" else "auto")
    sharded = put(arrays, place, mesh)
    specs = {name: array.sharding.spec for name, array in sharded.items()}

    def loss(arrays):
        if kind == "explicit":
            return total(FUSED, arrays, reduction)
        local = jax.shard_map(
            lambda arrays: jax.lax.psum(total(FUSED, arrays, reduction), "data"), in_specs=(specs,), out_specs=P()
        )
        return local(arrays)

    function = jax.jit(functools.partial(value_and_grads, loss))
    with jax.set_mesh(mesh):
        exported = jax.export.export(function)(sharded)
        assert exported.nr_devices == jax.device_count()
        assert_same(jax.jit(exported.call)(sharded), function(sharded))


def test_second_derivatives_in_forward_mode():
    """Of arrays on one device in a process that has several, and over Auto axes."""
    hidden, kernel = jnp.cos(jnp.arange(32.0)).reshape(8, 4), jnp.sin(jnp.arange(24.0)).reshape(4, 6)
    labels, tangent = jnp.arange(8) % 6, jnp.ones((8, 4))

    def loss(hidden):
        return jliger.fused_linear_cross_entropy(hidden, kernel, labels, implementation="xla", precision="highest")

    def expected(hidden):
        return -jnp.mean(jax.nn.log_softmax(jnp.dot(hidden, kernel, precision="highest"))[jnp.arange(8), labels])

    def second(loss):
        return jax.jit(lambda hidden, tangent: jax.jvp(jax.grad(loss), (hidden,), (tangent,))[1])

    wanted = second(expected)(hidden, tangent)
    np.testing.assert_allclose(second(loss)(hidden, tangent), wanted, rtol=1e-4, atol=1e-6)
    mesh = PLACES["dp"].mesh("auto")
    with jax.set_mesh(mesh):
        arrays = jax.device_put((hidden, tangent), NamedSharding(mesh, P("data")))
        np.testing.assert_allclose(second(loss)(*arrays), wanted, rtol=1e-4, atol=1e-6)
