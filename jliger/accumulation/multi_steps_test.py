"""Tests updates from several calls against one update from all their batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jliger
from jliger.testing.promotion import promoting, with_promotion

SIZE = 5
# The numbers of rows in the calls of 4 updates.
CALLS = [[7, 1, 2], [3, 3, 3], [1, 9, 4], [2, 5, 1]]


def rows_of_calls(seed=0):
    """Rows `[n, SIZE + 1]` for each call of each update."""
    rng = np.random.default_rng(seed)
    return [[jnp.asarray(rng.normal(size=(count, SIZE + 1))) for count in counts] for counts in CALLS]


adam, adamw, sgd = (
    lambda *args, make=make, **options: promoting(make(*args, **options))
    for make in (optax.adam, optax.adamw, optax.sgd)
)


def random_like(tree, seed):
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype), tree)


@with_promotion
def loss(params, rows):
    return jnp.mean(jnp.square(jnp.tanh(rows[:, :-1] @ params["kernel"]) + params["bias"] - rows[:, -1]))


def initial():
    return {"kernel": jnp.linspace(-1.0, 1.0, SIZE), "bias": jnp.full((), 0.5)}


def by_whole_batches(optimizer, updates):
    params, update = initial(), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for calls in updates:
        changes, state = update(jax.grad(loss)(params, jnp.concatenate(calls)), state, params)
        params = optax.apply_updates(params, changes)
    return params


def by_calls(optimizer, updates, *, weighted=True):
    params, update = initial(), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for rows in (rows for calls in updates for rows in calls):
        weight = {"weight": len(rows)} if weighted else {}
        changes, state = update(jax.grad(loss)(params, rows), state, params, **weight)
        params = optax.apply_updates(params, changes)
    return params


def schedule():
    return optax.linear_schedule(0.3, 0.01, 3)


OPTIMIZERS = {
    "sgd": lambda: sgd(schedule()),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(0.1), adamw(schedule(), weight_decay=0.1)),
    "momentum": lambda: optax.apply_if_finite(sgd(schedule(), momentum=0.9), 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_whole_batches_updates(name):
    with jax.enable_x64(True):
        updates = rows_of_calls()
        expected = by_whole_batches(OPTIMIZERS[name](), updates)
        result = by_calls(jliger.weighted_multi_steps(OPTIMIZERS[name](), 3), updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), result, expected)


def test_unweighted_means_are_not():
    with jax.enable_x64(True):
        updates = rows_of_calls()
        expected = by_whole_batches(OPTIMIZERS["sgd"](), updates)
        result = by_calls(
            promoting(optax.MultiSteps(OPTIMIZERS["sgd"](), 3).gradient_transformation()), updates, weighted=False
        )
        assert np.linalg.norm(result["kernel"] - expected["kernel"]) > 0.01


def test_one_call_an_update_is_the_optimizer_itself():
    params = {"a": jnp.linspace(0.1, 0.7, 7), "b": jnp.ones((2, 3), jnp.bfloat16)}
    # Powers of two, whose products are exact whatever the compiler does.
    inner = sgd(0.25, momentum=0.5)
    optimizer = jliger.weighted_multi_steps(inner, 1)
    state, inner_state = optimizer.init(params), inner.init(params)
    of_call = jax.jit(optimizer.update)
    for seed in range(3):
        grads = random_like(params, seed)
        result, state = of_call(grads, state, params, weight=17)
        expected, inner_state = inner.update(grads, inner_state, params)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
        assert state.has_updated


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw(1e-2),
        sgd(0.1, momentum=0.9),
        promoting(optax.lion(1e-2)),
        promoting(optax.contrib.muon(1e-2)),
        promoting(optax.add_noise(0.1, 0.5, key=0)),
    ],
    ids=["adamw", "momentum", "lion", "muon", "noise"],
)
def test_float32_gradients_of_bfloat16_parameters(optimizer):
    params = {"a": jnp.ones((2, 3), jnp.bfloat16)}
    ours, theirs = jliger.weighted_multi_steps(optimizer, 2), optimizer.init(params)
    state, start = ours.init(params), theirs
    of_call, of_mean = jax.jit(ours.update), jax.jit(with_promotion(optimizer.update))
    # Two updates: the second starts from the state that the first leaves.
    for seed in (0, 2):
        first, second = (random_like(jax.tree.map(jnp.float32, params), seed + call) for call in range(2))
        _, state = of_call(first, state, params, weight=1.0)
        updates, state = of_call(second, state, params, weight=1.0)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, theirs = of_mean(mean, theirs, params)
        theirs = jax.tree.map(
            lambda leaf, before: leaf if leaf.dtype == before.dtype else leaf.astype(before.dtype), theirs, start
        )
        assert updates["a"].dtype == jnp.float32
        np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-5, atol=1e-7)
    kept = jax.tree.leaves(state.inner_state)
    assert [leaf.dtype for leaf in kept] == [leaf.dtype for leaf in jax.tree.leaves(start)]


def test_how_many_calls_may_change():
    optimizer = jliger.weighted_multi_steps(sgd(1.0), lambda updates: updates + 1)
    state, of_call = optimizer.init(0.0), jax.jit(optimizer.update)
    assert not state.has_updated
    seen = []
    for call in range(10):
        update, state = of_call(jnp.float32(call), state, 0.0, weight=1)
        seen.append((float(update), bool(state.has_updated)))
    last = {0: 0.0, 2: 1.5, 5: 4.0, 9: 7.5}
    assert seen == [(-last.get(call, 0.0), call in last) for call in range(10)]


def test_schedules_count_updates():
    learning_rates = []
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 10.0 ** -count.astype(float))
    optimizer = jliger.weighted_multi_steps(optimizer, 2)
    state, of_call = optimizer.init(1.0), jax.jit(optimizer.update)
    for _ in range(6):
        _, state = of_call(jnp.float32(1), state, 1.0, weight=1)
        learning_rates.append(float(state.inner_state.hyperparams["learning_rate"]))
    np.testing.assert_allclose(learning_rates, [1, 1, 1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_clipping_sees_the_mean():
    # The gradients of both calls have a large norm, their mean a small one.
    optimizer = jliger.weighted_multi_steps(optax.chain(optax.clip_by_global_norm(1.0), sgd(1.0)), 2)
    state = optimizer.init(jnp.zeros(2))
    for sign in (1, -1):
        update, state = optimizer.update(sign * jnp.array([3.0, 0.0]) + 0.25, state, weight=4)
    np.testing.assert_allclose(update, [-0.25, -0.25])


# ---- calls with non-finite gradients -----------------------------------------------------------------------------


def run(optimizer, gradients_and_weights):
    """The updates of one parameter, for each call."""
    state, result = optimizer.init(jnp.float32(0)), []
    of_call = jax.jit(optimizer.update)
    for gradient, weight in gradients_and_weights:
        update, state = of_call(jnp.float32(gradient), state, jnp.float32(0), weight=weight)
        result.append(float(update))
    return result


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_call_that_is_not_finite_spoils_its_update_and_none_after(bad):
    optimizer = jliger.weighted_multi_steps(optax.apply_if_finite(sgd(1.0), 5), 2)
    assert run(optimizer, [(1, 1), (bad, 1), (bad, 1), (1, 1), (1, 1), (4, 2)]) == [0, 0, 0, 0, 0, -3]


def test_a_call_that_is_not_finite_is_left_out_alone():
    optimizer = optax.apply_if_finite(jliger.weighted_multi_steps(sgd(1.0), 2), 5)
    assert run(optimizer, [(1, 1), (np.nan, 1), (4, 2), (5, 1), (np.nan, 9), (5, 1)]) == [0, 0, -3, 0, 0, -5]


def test_calls_without_weight_do_not_count():
    optimizer = jliger.weighted_multi_steps(sgd(1.0), 3)
    assert run(optimizer, [(np.nan, 0), (1, 3), (5, 1), (1, 0), (np.nan, 0), (7, 0)]) == [0, 0, -2, 0, 0, 0]


# ---- state -------------------------------------------------------------------------------------------------------


def test_means_are_float32():
    # In bfloat16 the means would stop changing.
    optimizer = jliger.weighted_multi_steps(sgd(1.0), 1024)
    update = jax.jit(optimizer.update)
    state = optimizer.init(jnp.zeros((), jnp.bfloat16))
    assert state.mean_gradients.dtype == jnp.float32
    for call in range(1024):
        change, state = update(jnp.bfloat16(call % 2 * 3), state, weight=1 + 2 * (call % 2))
    assert change.dtype == jnp.bfloat16
    np.testing.assert_array_equal(change, -2.25)


def test_a_checkpoint_in_the_middle_of_an_update(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer = jliger.weighted_multi_steps(adamw(0.1), 3)
    params = initial()
    gradients = [random_like(params, seed) for seed in range(6)]

    of_call = jax.jit(optimizer.update)

    def go_on(state, calls):
        updates = []
        for call in calls:
            update, state = of_call(gradients[call], state, params, weight=1 + call)
            updates.append(update)
        return updates, state

    _, state = go_on(optimizer.init(params), range(2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert type(restored) is type(state)
    assert (int(restored.mini_step), float(restored.weight)) == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, go_on(restored, range(2, 6)), go_on(state, range(2, 6)))


def test_donated_state_is_taken_over():
    optimizer = jliger.weighted_multi_steps(adam(0.1), 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params, weight=3)
        return optax.apply_updates(params, updates), state

    params = initial()
    state = optimizer.init(params)
    for _ in range(4):
        before = (params, state)
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert state.gradient_step == 2


def test_specs_of_parameters_find_their_way_into_the_state():
    optimizer = jliger.weighted_multi_steps(optax.chain(optax.clip_by_global_norm(1.0), adam(1e-3)), 2)
    params = initial()
    state = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        optimizer.init(params),
        {"kernel": "K", "bias": "B"},
        transform_non_params=lambda _: "-",
    )
    assert state.mean_gradients == state.inner_state[1][0].mu == {"kernel": "K", "bias": "B"}
    assert (state.mini_step, state.weight) == ("-", "-")


def test_the_optimizer_is_only_run_for_updates():
    optimizer = jliger.weighted_multi_steps(adam(1e-3), 2)
    params = jnp.ones(3)
    jaxpr = jax.make_jaxpr(lambda state: optimizer.update(params, state, params, weight=1))(optimizer.init(params))
    (choice,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    used = [{eqn.primitive.name for eqn in branch.eqns} for branch in choice.params["branches"]]
    assert ["sqrt" in names or "jit" in names for names in used] == [False, True]


# ---- with other transformations ----------------------------------------------------------------------------------


def test_extra_arguments_are_the_optimizers():
    plateau = promoting(optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    optimizer = jliger.weighted_multi_steps(optax.chain(sgd(1.0), plateau), 2)
    state, of_call = optimizer.init(0.0), jax.jit(optimizer.update)
    for value in (9.0, 1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0):
        update, state = of_call(jnp.float32(1), state, 0.0, weight=1, value=value)
    # The values at the calls that update are 1, 2, 3, 4: three of them do not improve on the first.
    assert float(update) == -0.125
    assert state.inner_state[1].best_value == 1


def test_microbatches_within_calls():
    def sums(params, rows):
        return loss(params, rows) * len(rows), len(rows)

    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        calls = [jnp.asarray(rng.normal(size=(count, SIZE + 1))) for count in (4, 12, 8)]
        expected = by_whole_batches(adam(0.1), [calls])
        optimizer, params = jliger.weighted_multi_steps(adam(0.1), 3), initial()
        state = optimizer.init(params)
        for rows in calls:
            result, gradients = jliger.accumulate_gradients(sums, 4)(params, rows)
            updates, state = optimizer.update(gradients, state, params, weight=result.weight)
            params = optax.apply_updates(params, updates)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), params, expected)


def test_nnx_optimizer():
    def sums(model, rows):
        return jnp.sum(jnp.square(model(rows[:, :-1])[:, 0] - rows[:, -1])), rows.shape[0]

    @nnx.jit
    def step(model, optimizer, rows):
        result, gradients = jliger.accumulate_gradients(sums, 1)(model, rows)
        optimizer.update(model, gradients, weight=result.weight)

    calls = rows_of_calls()[0]
    model, whole = (nnx.Linear(SIZE, 1, rngs=nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(model, jliger.weighted_multi_steps(adam(0.1), 3), wrt=nnx.Param)
    for rows in calls:
        step(model, optimizer, rows)
    step(
        whole,
        nnx.Optimizer(whole, jliger.weighted_multi_steps(adam(0.1), 1), wrt=nnx.Param),
        jnp.concatenate(calls),
    )
    np.testing.assert_allclose(model.kernel[...], whole.kernel[...], rtol=1e-5)
    assert optimizer.opt_state.has_updated


def test_train_state():
    # TrainState.apply_gradients cannot pass a weight.
    decoder = linen.Dense(1)
    calls = rows_of_calls()[0]

    def sums(params, rows):
        return jnp.sum(jnp.square(decoder.apply(params, rows[:, :-1])[:, 0] - rows[:, -1])), rows.shape[0]

    def step(state, rows):
        result, gradients = jliger.accumulate_gradients(sums, 1)(state.params, rows)
        updates, opt_state = state.tx.update(gradients, state.opt_state, state.params, weight=result.weight)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    params = decoder.init(jax.random.key(0), calls[0][:, :-1])
    optimizer = jliger.weighted_multi_steps(adam(0.1), 3)
    state = TrainState.create(apply_fn=decoder.apply, params=params, tx=optimizer)
    for rows in calls:
        state = jax.jit(step)(state, rows)
    whole = TrainState.create(apply_fn=decoder.apply, params=params, tx=jliger.weighted_multi_steps(adam(0.1), 1))
    whole = step(whole, jnp.concatenate(calls))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.params, whole.params)


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ValueError, "every_k_schedule got 0; pass 1 or more"),
        (2.5, TypeError, "every_k_schedule got 2.5; pass an integer"),
        (True, TypeError, "every_k_schedule got True"),
    ],
)
def test_numbers_of_calls_that_make_no_sense(count, error, message):
    with pytest.raises(error, match=message):
        jliger.weighted_multi_steps(sgd(1.0), count)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, TypeError, r"weight got nothing; pass update\(gradients, state, params, weight=tokens\)"),
        ({"weight": jnp.ones(3)}, ValueError, r"weight got shape \(3,\); pass a scalar"),
    ],
)
def test_weights_that_make_no_sense(weights, error, message):
    optimizer = jliger.weighted_multi_steps(sgd(1.0), 2)
    with pytest.raises(error, match=message):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), **weights)
