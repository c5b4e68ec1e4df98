"""Tests microbatches against the whole batch, for several losses, dtypes and distributions of tokens."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jliger
from jliger.testing.oracle import EXAMPLES
from jliger.testing.promotion import promoting, with_promotion

ROWS, LENGTH, SIZE, VOCAB = 24, 5, 6, 17


@pytest.fixture(autouse=True)
def float32_products():
    """Full precision for products: TF32 has relative errors of 1e-3, which depend on the order of summation."""
    with jax.default_matmul_precision("highest"):
        yield


def make_params(dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"embedding": (VOCAB, SIZE), "body": (SIZE, SIZE), "head": (SIZE, VOCAB)}
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def make_batch(lengths, seed=0):
    """Tokens and labels `[rows, length]`; the first few labels of each row count."""
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, VOCAB, (2, len(lengths), LENGTH))
    counted = np.arange(LENGTH) < np.asarray(lengths)[:, None]
    return {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(np.where(counted, labels, -100))}


# The numbers of counted tokens per row: all, uneven, and none in most rows.
LENGTHS = {
    "equal": [LENGTH] * ROWS,
    "unequal": [1 + (7 * row) % LENGTH for row in range(ROWS)],
    "sparse": [LENGTH if row in (3, 4, 19) else 0 for row in range(ROWS)],
}


def hidden_states(params, batch):
    return jnp.tanh(params["embedding"][batch["tokens"]] @ params["body"])


def fused_sums(params, batch):
    loss, metrics = jliger.fused_linear_cross_entropy(
        hidden_states(params, batch), params["head"], batch["labels"], reduction="sum", return_metrics=True,
        implementation="xla" if params["head"].dtype == jnp.float64 else None,
    )  # fmt: skip
    return loss, metrics.weight


def optax_sums(params, batch):
    logits = hidden_states(params, batch) @ params["head"]
    counted = batch["labels"] >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["labels"], 0))
    return jnp.sum(losses, where=counted), jnp.sum(counted)


def squared_sums(params, batch):
    """A loss of rows, with weights that are not integers."""
    weights = 0.5 + jnp.mean(batch["labels"] >= 0, axis=1, dtype=params["head"].dtype)
    errors = jnp.sum(jnp.square(hidden_states(params, batch) @ params["head"]), axis=(1, 2))
    return jnp.sum(weights * errors), jnp.sum(weights)


LOSSES = {"fused": fused_sums, "optax": optax_sums, "squared": squared_sums}


def whole(sums, params, batch):
    """The mean loss of the whole batch and its gradients, by `jax.value_and_grad`."""
    return _whole(sums)(params, batch)


@functools.cache
def _whole(sums):
    @with_promotion
    def mean(params, batch):
        loss, weight = sums(params, batch)
        return loss / jnp.maximum(weight, 1e-30)

    return jax.jit(jax.value_and_grad(mean))


def mean_of_means(sums, params, batch, num):
    """The mean of the means of microbatches, and its gradients."""
    parts = [jax.tree.map(lambda array, i=i: array[i::num], batch) for i in range(num)]
    found = [whole(sums, params, part) for part in parts]
    return jax.tree.map(lambda *leaves: sum(leaves) / num, *found)


def distance(found, truth):
    """The largest relative difference of any array, by norm."""
    norms = jax.tree.map(
        lambda a, b: (
            np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            / np.linalg.norm(np.asarray(b, np.float64))
        ),
        found,
        truth,
    )
    return max(jax.tree.leaves(norms))


def accumulated(sums, num, params, batch):
    """The accumulated loss and gradients, in the form that `whole` returns."""
    found, grads = _accumulated(sums, num)(params, batch)
    return found.loss, grads


@functools.cache
def _accumulated(sums, num):
    return jax.jit(jliger.accumulate_gradients(sums, num))


# ---- equal to the whole batch, up to rounding ------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64_is_the_whole_batch_to_float64(loss, lengths):
    with jax.enable_x64(True):
        params, batch = make_params("float64"), make_batch(LENGTHS[lengths])
        truth = whole(LOSSES[loss], params, batch)
        for num in (1, 3, 24) if loss == "optax" else (8,):
            found = accumulated(LOSSES[loss], num, params, batch)
            assert distance(found, truth) < 1e-14, num
            assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(found))


def test_a_padded_vocabulary():
    """With `vocab_size`, the whole batch's gradients of the columns that exist, and 0 for the others."""
    smaller = VOCAB - 4

    def padded_sums(params, batch):
        options = {"vocab_size": smaller, "reduction": "sum", "return_metrics": True, "implementation": "xla"}
        hidden = hidden_states(params, batch)
        loss, metrics = jliger.fused_linear_cross_entropy(hidden, params["head"], batch["labels"], **options)
        return loss, metrics.weight

    with jax.enable_x64(True):
        params, batch = make_params("float64"), make_batch(LENGTHS["unequal"])
        batch["labels"] = jnp.minimum(batch["labels"], smaller - 1)
        loss, grads = accumulated(padded_sums, 4, params, batch)
        kept = {**grads, "head": grads["head"][:, :smaller]}
        truth = whole(optax_sums, {**params, "head": params["head"][:, :smaller]}, batch)
        assert distance((loss, kept), truth) < 1e-14
        assert not np.any(grads["head"][:, smaller:])


def test_means_of_means_are_not():
    with jax.enable_x64(True):
        params, batch = make_params("float64"), make_batch(LENGTHS["unequal"])
        truth = whole(fused_sums, params, batch)
        assert distance(mean_of_means(fused_sums, params, batch, 8), truth) > 0.05
        # With equal numbers of tokens in each microbatch they would be equal.
        batch = make_batch(LENGTHS["equal"])
        assert distance(mean_of_means(fused_sums, params, batch, 8), whole(fused_sums, params, batch)) < 1e-14


@pytest.mark.parametrize(
    ("loss", "dtype", "lengths"),
    [
        # For optax's loss, each dtype and each distribution of lengths once.
        pytest.param(loss, dtype, lengths, marks=[pytest.mark.exhaustive] if loss == "optax" and i != j else [])
        for loss in ("fused", "optax")
        for i, dtype in enumerate(["float32", "bfloat16", "float16"])
        for j, lengths in enumerate(LENGTHS)
    ],
)
def test_as_near_the_truth_as_the_whole_batch_is(loss, dtype, lengths):
    params, batch = make_params(dtype), make_batch(LENGTHS[lengths])
    with jax.default_matmul_precision("highest"):
        whole_batch = whole(LOSSES[loss], params, batch)
        found = {num: accumulated(LOSSES[loss], num, params, batch) for num in (2, 8)}
    with jax.enable_x64(True):
        truth = whole(optax_sums, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), batch)
    allowed = 2 * distance(whole_batch, truth) + float(jnp.finfo(dtype).eps)
    for num, one in found.items():
        assert distance(one, truth) <= allowed, num


@hypothesis.settings(max_examples=10 * EXAMPLES, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, LENGTH), min_size=12, max_size=12), st.sampled_from([1, 3, 12]), st.integers(0, 2**31 - 1)
)
def test_any_lengths(lengths, num, seed):
    batch = make_batch(lengths, seed)
    params = make_params(seed=seed % 7)
    with jax.default_matmul_precision("highest"):
        found = accumulated(optax_sums, num, params, batch)
        if sum(lengths) == 0:
            assert all(not leaf.any() for leaf in jax.tree.leaves(found))
            return
        assert distance(found, whole(optax_sums, params, batch)) < 1e-5


def test_nothing_counts():
    params, batch = make_params(), make_batch([0] * ROWS)
    for leaf in jax.tree.leaves(jliger.accumulate_gradients(fused_sums, 4)(params, batch)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_what_has_no_weight_still_has_a_loss():
    # The sum of the whole batch includes every microbatch, even those of weight 0.
    def sums(x, batch):
        return jnp.sum(x * batch["values"]), jnp.sum(batch["weights"])

    batch = {"values": jnp.array([1.0, 2.0, 3.0, 4.0]), "weights": jnp.array([0.0, 5.0, 0.0, 5.0])}
    found, grad = jliger.accumulate_gradients(sums, 2)(2.0, batch)
    np.testing.assert_allclose((found.loss, found.weight, grad), (2.0, 10.0, 1.0))


def test_a_loss_that_is_nan_is_nan():
    params, batch = make_params(), make_batch(LENGTHS["equal"])
    batch["labels"] = batch["labels"].at[7, 2].set(VOCAB)
    found, grads = jliger.accumulate_gradients(fused_sums, 4)(params, batch)
    assert np.isnan(found.loss)
    assert np.isnan(grads["head"]).all()


# ---- dtypes and memory -----------------------------------------------------------------------------------------


def test_sums_are_float32_and_gradients_their_arguments():
    # In bfloat16 a sum of ones stops at 256.
    param = jnp.ones((), jnp.bfloat16)
    ones = jnp.ones((1024, 1), jnp.bfloat16)
    found, grad = jax.jit(jliger.accumulate_gradients(lambda p, rows: (jnp.sum(p * rows), rows.size), 1024))(
        param, ones
    )
    assert (grad.dtype, found.loss.dtype, found.weight.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal((grad, found.loss, found.weight), (1, 1, 1024))


def test_sums_beyond_float16():
    # The gradient of each microbatch's sum is 2¹⁸; float16 overflows at 2¹⁶.
    param = jnp.ones((), jnp.float16)
    rows = jnp.full((8192,), 64, jnp.float16)

    def loss(p, rows):
        return jnp.sum((p * rows).astype(jnp.float32)), rows.size

    _, grad = jliger.accumulate_gradients(loss, 2)(param, rows)
    np.testing.assert_array_equal(grad, 64)


def test_memory_does_not_grow_with_the_number_of_microbatches():
    def temporary(num):
        params = {"embedding": (VOCAB, 256), "body": (256, 256), "head": (256, VOCAB)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}
        tokens = jax.ShapeDtypeStruct((4 * num, 64), jnp.int32)
        step = jax.jit(jliger.accumulate_gradients(optax_sums, num))
        return step.lower(params, {"tokens": tokens, "labels": tokens}).compile().memory_analysis().temp_size_in_bytes

    # XLA rounds some buffers up to a multiple of 64 bytes.
    assert abs(temporary(32) - temporary(2)) < 4096


def test_the_loop_is_one_and_the_loss_is_traced_twice():
    traces = []

    def sums(params, batch):
        traces.append(1)
        return optax_sums(params, batch)

    jaxpr = jax.make_jaxpr(jliger.accumulate_gradients(sums, 8))(make_params(), make_batch(LENGTHS["equal"]))
    assert [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [8]
    assert len(traces) == 2


def test_donated_buffers_are_taken_over():
    optimizer = promoting(optax.adam(1e-2))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, opt_state = state
        _, grads = jliger.accumulate_gradients(fused_sums, 4)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, batch = make_params(), make_batch(LENGTHS["unequal"])
    expected, _ = step((make_params(), optimizer.init(params)), batch)
    state = (params, optimizer.init(params))
    found, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---- auxiliary outputs -----------------------------------------------------------------------------------------


def test_metrics_of_the_fused_loss():
    def sums(params, batch):
        loss, metrics = jliger.fused_linear_cross_entropy(
            hidden_states(params, batch),
            params["head"],
            batch["labels"],
            reduction="sum",
            z_loss=0.1,
            return_metrics=True,
        )
        return loss, metrics.weight, metrics

    kinds = jliger.CrossEntropyMetrics(
        weight="sum", cross_entropy="sum", z_loss="sum", accuracy="mean", predictions="concatenate"
    )
    params, batch = make_params(), make_batch(LENGTHS["unequal"])
    one, _ = jliger.accumulate_gradients(sums, 1, aux_reduction=kinds)(params, batch)
    _, _, truth = sums(params, batch)
    found, _ = jliger.accumulate_gradients(sums, 6, aux_reduction=kinds)(params, batch)
    for metrics in (one.aux, found.aux):
        assert isinstance(metrics, jliger.CrossEntropyMetrics)
        np.testing.assert_array_equal(metrics.predictions, truth.predictions)
        np.testing.assert_allclose(metrics[:4], truth[:4], rtol=1e-6)


def test_each_way_to_reduce_aux():
    def sums(x, rows):
        aux = {
            "rows": rows,
            "bools": rows > 3,
            "nothing": None,
            "means": {"mean": jnp.mean(rows), "of nothing": jnp.where(rows.sum() < 10, jnp.nan, 1.0)},
        }
        return jnp.sum(x * rows.astype(x.dtype)), jnp.where(rows.sum() < 10, 0, rows.size), aux

    rows = jnp.arange(8, dtype=jnp.int8)
    kinds = {"rows": "concatenate", "bools": "sum", "nothing": "sum", "means": "mean"}
    # Only the last of four microbatches, with rows 3 and 7, has a sum of at least 10.
    for num, mean, weight, bools in ((2, 3.5, 8, [0, 0, 2, 2]), (4, 5, 2, [0, 4])):
        found, _ = jliger.accumulate_gradients(sums, num, aux_reduction=kinds)(1.0, rows)
        assert found.weight == weight
        assert found.aux["nothing"] is None
        assert found.aux["rows"].dtype == jnp.int8
        np.testing.assert_array_equal(found.aux["rows"], rows)
        np.testing.assert_array_equal(found.aux["bools"], bools)
        np.testing.assert_allclose(found.aux["means"]["mean"], mean)
        np.testing.assert_allclose(found.aux["means"]["of nothing"], 1)


def test_sums_of_aux_are_wide():
    def sums(x, rows):
        return jnp.sum(x * rows), 1, {"half": jnp.bfloat16(1), "byte": jnp.uint8(200), "flag": jnp.bool(True)}

    found, _ = jliger.accumulate_gradients(sums, 512)(1.0, jnp.ones(512))
    assert {name: (leaf.dtype.name, int(leaf)) for name, leaf in found.aux.items()} == {
        "half": ("float32", 512),
        "byte": ("uint32", 102400),
        "flag": ("int32", 512),
    }


# ---- arguments -------------------------------------------------------------------------------------------------


def test_each_microbatch_has_keys_of_its_own():
    def sums(x, rows, keys, legacy):
        drawn = {"key": jax.random.bits(keys["dropout"], (1,)), "legacy": jax.random.bits(legacy, (1,))}
        return jnp.sum(x * rows), rows.size, drawn

    step = jliger.accumulate_gradients(sums, 8, key_argnums=(2, 3), aux_reduction="concatenate")
    keys = {"dropout": jax.random.key(3)}, jax.random.PRNGKey(4)
    first, again = (step(1.0, jnp.ones(16), *keys)[0].aux for _ in range(2))
    assert len({int(bits) for drawn in first.values() for bits in drawn}) == 16
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_several_arguments_of_each_kind():
    def sums(scale, tokens, params, labels, *, power, name):
        assert name == "a name"
        loss, weight = optax_sums(params, {"tokens": tokens, "labels": labels})
        return loss * scale ** jnp.float32(power), weight

    params, batch = make_params(), make_batch(LENGTHS["unequal"])
    args = jnp.float32(1.5), batch["tokens"], params, batch["labels"]

    @with_promotion
    def mean(scale, tokens, params, labels):
        loss, weight = sums(scale, tokens, params, labels, power=2, name="a name")
        return loss / weight

    truth = jax.value_and_grad(mean, argnums=(2, 0))(*args)
    step = jliger.accumulate_gradients(sums, 4, argnums=(2, 0), batch_argnums=(1, 3))
    found, grads = step(*args, power=jnp.int32(2), name="a name")
    assert distance((found.loss, grads), truth) < 1e-5
    (only,) = jliger.accumulate_gradients(sums, 4, argnums=(2,), batch_argnums=(1, 3))(*args, power=2, name="a name")[1]
    assert distance(only, truth[1][0]) < 1e-5


def test_numpy_arrays_and_python_numbers():
    rows = np.arange(6, dtype=np.float32)
    found, grad = jliger.accumulate_gradients(lambda x, rows, a: (jnp.sum(x * rows) * a, 2), 3)(
        2.0, rows, np.float32(3)
    )
    np.testing.assert_allclose((found.loss, grad), (15, 7.5))


def test_under_vmap():
    # Each member has its own model; all share one batch.
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_params(seed=0), make_params(seed=1))
    batch = make_batch(LENGTHS["unequal"])
    found, grads = jax.vmap(jliger.accumulate_gradients(optax_sums, 4), in_axes=(0, None))(params, batch)
    for i in range(2):
        truth = whole(optax_sums, make_params(seed=i), batch)
        assert distance((found.loss[i], jax.tree.map(lambda leaf, i=i: leaf[i], grads)), truth) < 1e-5


# ---- Flax ------------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.embed = nnx.Embed(VOCAB, SIZE, rngs=rngs)
        self.norm = nnx.BatchNorm(SIZE, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.body = nnx.Linear(SIZE, SIZE, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(1.5))

    def __call__(self, tokens):
        return self.body(self.dropout(self.norm(self.embed(tokens)))) * self.scale[...]


def module_sums(model, batch):
    # A tied head: one variable in two places.
    loss, metrics = jliger.fused_linear_cross_entropy(
        model(batch["tokens"]),
        model.embed.embedding[...],
        batch["labels"],
        kernel_layout="vh",
        reduction="sum",
        return_metrics=True,
    )
    return loss, metrics.weight


def module_mean(model, batch):
    loss, weight = module_sums(model, batch)
    return loss / weight


def test_a_module_as_by_nnx_value_and_grad():
    model, batch = Model(nnx.Rngs(0)), make_batch(LENGTHS["unequal"])
    model.eval()
    truth, grads_of_whole = nnx.value_and_grad(module_mean)(model, batch)
    kept = nnx.Any(nnx.Param, nnx.BatchStat)
    before = jax.tree.map(jnp.copy, nnx.state(model, kept))
    for call in (jliger.accumulate_gradients(module_sums, 4), nnx.jit(jliger.accumulate_gradients(module_sums, 4))):
        found, grads = call(model, batch)
        assert isinstance(grads, nnx.State)
        assert distance((found.loss, nnx.to_pure_dict(grads)), (truth, nnx.to_pure_dict(grads_of_whole))) < 1e-5
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model, kept), before)


def test_a_modules_state_goes_from_one_microbatch_to_the_next():
    batch = make_batch(LENGTHS["unequal"])
    model, by_hand = Model(nnx.Rngs(0), rate=0.5), Model(nnx.Rngs(0), rate=0.5)
    nnx.jit(jliger.accumulate_gradients(module_sums, 3))(model, batch)
    for i in range(3):
        module_sums(by_hand, jax.tree.map(lambda array, i=i: array[i::3], batch))
    state, expected = nnx.state(model), nnx.state(by_hand)
    assert state["dropout"]["rngs"]["count"][...] == 3
    np.testing.assert_allclose(state["norm"]["mean"][...], expected["norm"]["mean"][...], rtol=1e-5)
    np.testing.assert_allclose(state["norm"]["var"][...], expected["norm"]["var"][...], rtol=1e-5)


def test_dropout_differs_between_microbatches():
    class Masks(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(()))

    def sums(model, rows):
        dropped = model.dropout(rows)
        return jnp.sum(dropped) * model.scale[...], rows.shape[0], dropped

    model = Masks(nnx.Rngs(0))
    found, _ = jliger.accumulate_gradients(sums, 4, aux_reduction="concatenate")(model, jnp.ones((4, 64)))
    assert len({tuple(np.asarray(row)) for row in found.aux}) == 4


def test_state_that_is_only_read_is_not_carried():
    model, batch = Model(nnx.Rngs(0), rate=0.5), make_batch(LENGTHS["equal"])
    graph, state = nnx.split(model)

    def step(state, batch):
        return jliger.accumulate_gradients(module_sums, 4)(nnx.merge(graph, state), batch)[1]

    (loop,) = [eqn for eqn in jax.make_jaxpr(step)(state, batch).eqns if eqn.primitive.name == "scan"]
    # Loss, weight, five gradients, the norm's two statistics and the dropout's count; not its key, and not the scale.
    assert len(loop.outvars) == 2 + 5 + 2 + 1


def test_a_filter_of_variables():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(SIZE, SIZE, rngs=rngs)
            self.lora = nnx.LoRA(SIZE, 2, SIZE, rngs=rngs, b_initializer=nnx.initializers.normal(1.0))

    def sums(model, x):
        return jnp.sum(jnp.square(model.base(x) + model.lora(x))), x.shape[0]

    model, x = Adapted(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (8, SIZE))
    wanted = nnx.DiffState(0, nnx.LoRAParam)
    truth = nnx.grad(lambda model, x: sums(model, x)[0] / 8, argnums=wanted)(model, x)
    _, grads = jliger.accumulate_gradients(sums, 4, argnums=wanted)(model, x)
    assert list(grads) == ["lora"]
    assert distance(nnx.to_pure_dict(grads), nnx.to_pure_dict(truth)) < 1e-5


def test_linen():
    class Decoder(linen.Module):
        @linen.compact
        def __call__(self, tokens, train):
            x = linen.Embed(VOCAB, SIZE)(tokens)
            return linen.Dense(SIZE)(linen.Dropout(0.5, deterministic=not train)(x))

    decoder, batch = Decoder(), make_batch(LENGTHS["unequal"])
    params = {
        "decoder": decoder.init(jax.random.key(0), batch["tokens"], False)["params"],
        "head": make_params()["head"],
    }

    def sums(params, batch, key, train):
        hidden = decoder.apply({"params": params["decoder"]}, batch["tokens"], train, rngs={"dropout": key})
        loss, metrics = jliger.fused_linear_cross_entropy(
            hidden, params["head"], batch["labels"], reduction="sum", return_metrics=True
        )
        return loss, metrics.weight

    key = jax.random.key(1)
    truth = whole(lambda params, batch: sums(params, batch, key, False), params, batch)
    step = jliger.accumulate_gradients(sums, 4, key_argnums=2)
    found, grads = step(params, batch, key, False)
    assert distance((found.loss, grads), truth) < 1e-5
    found, _ = step(params, batch, key, True)
    assert abs(found.loss - truth[0]) > 1e-3


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_microbatches": 0}, ValueError, "num_microbatches got 0; pass 1 or more"),
        ({"num_microbatches": 2.0}, TypeError, "num_microbatches got 2.0; pass a Python integer"),
        ({"argnums": "a"}, TypeError, "argnums got 'a'; pass positions"),
        ({"argnums": -1}, TypeError, "argnums got -1; pass positions"),
        ({"argnums": ()}, ValueError, "argnums got no argument"),
        ({"batch_argnums": ()}, ValueError, "batch_argnums got no argument"),
        ({"argnums": 1}, ValueError, "batch_argnums got 1, which argnums has too"),
        ({"key_argnums": 1}, ValueError, "key_argnums got 1, which batch_argnums has too"),
        ({"aux_reduction": {"a": "max"}}, ValueError, r"aux_reduction got 'max' at \['a'\]; pass one of 'sum', 'mean'"),
        ({"specs": jax.P()}, ValueError, "specs got a value without batch_axes"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        jliger.accumulate_gradients(optax_sums, **{"num_microbatches": 2, **options})


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (1.0, TypeError, "loss_fn returned float; return"),
        ((1.0,), TypeError, "loss_fn returned 1 results; return"),
        ((1.0, "tokens"), TypeError, "returned str as its weight"),
        ((jnp.ones(3), 3), ValueError, r"sum of losses of shape \(3,\)"),
        ((1.0, jnp.ones(3)), ValueError, r"weight of shape \(3,\)"),
        ((1, 3), TypeError, "sum of losses of dtype int32"),
    ],
)
def test_losses_that_are_no_sum_and_weight(result, error, message):
    with pytest.raises(error, match=message):
        jliger.accumulate_gradients(lambda x, rows: result, 2)(1.0, jnp.ones(4))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((1.0, np.ones(10)), {}, ValueError, "4, which doesn't divide the batch's 10 rows; .* or add 2 rows"),
        ((1.0, (np.ones(8), np.ones(4))), {}, ValueError, "different numbers of rows: 8 at .*, 4 at"),
        ((1.0, {"a": np.float32(1)}), {}, ValueError, "batch got a scalar at .*'a'"),
        ((1.0, {}), {}, ValueError, "batch got no array"),
        ((1.0,), {}, ValueError, "argument 1 got nothing"),
        (({"a": np.ones(2, int)}, np.ones(8)), {}, TypeError, r"argument 0 got int.* at \['a'\]"),
        ((1.0, np.ones(8)), {"argnums": nnx.DiffState(0, nnx.Param)}, TypeError, "filter for argument 0, which is no"),
        ((1.0, np.ones(8)), {"aux_reduction": {"a": "sum"}}, ValueError, "aux_reduction got a tree that is no prefix"),
        ((1.0, np.ones(8)), {"aux_reduction": "concatenate"}, ValueError, "'concatenate' for a scalar"),
        ((1.0, np.ones(8)), {"batch_axes": "data"}, ValueError, "batch_axes got 'data', which is no axis of the mesh"),
    ],
)
def test_calls_that_make_no_sense(args, options, error, message):
    def sums(x, rows):
        return jnp.sum(jnp.asarray(jax.tree.leaves(x)[0]) * 1.0), 1, (jnp.float32(1),)

    with pytest.raises(error, match=message):
        jliger.accumulate_gradients(sums, 4, **options)(*args)


def test_variables_that_a_loss_adds():
    class Growing(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))

    def sums(model, rows):
        model.seen = nnx.Variable(rows)
        return jnp.sum(model.scale * rows), rows.size

    with pytest.raises(ValueError, match="loss_fn added variables to a module"):
        jliger.accumulate_gradients(sums, 2)(Growing(), jnp.ones(4))
