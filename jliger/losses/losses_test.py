"""Tests properties of all losses: masks, counts, dtypes, extreme values, and JAX transformations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger import losses
from jliger.testing.loss_cases import CASES

EPS = np.finfo(np.float32).eps


@pytest.fixture(autouse=True)
def no_implicit_promotion():
    """Losses must work under JAX's strictest settings."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# A divergence changes the rewards and nothing else: its properties are tested with those of DPO.
RARELY = ("dpo-forward_kl",)


def each_of(cases):
    marked = [pytest.param(case, marks=[pytest.mark.exhaustive] if case.name in RARELY else []) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=lambda case: case.name)


every_case = each_of(CASES)
# For behaviour that the losses share through common functions: one loss of each kind; the others run exhaustively.
OFTEN = ("dpo-sigmoid", "dpo-bco_pair", "orpo", "kto", "grpo-dapo-token", "grpo-grpo-sequence", "ppo_clip")
some_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.name in OFTEN else [pytest.mark.exhaustive]) for case in CASES],
    ids=lambda case: case.name,
)


def float32(arrays):
    return {name: array if array.dtype == bool else array.astype(np.float32) for name, array in arrays.items()}


def some(case, arrays, seed=1):
    """A mask with some True; if there are sequences, all tokens of the second one are uncounted."""
    where = np.random.default_rng(seed).random(arrays[case.trained[0]].shape) < 0.6
    where[0], where[1] = True, False
    return where


def scrambled(arrays, where):
    """Arrays with NaN and infinities at uncounted elements."""
    found = dict(arrays)
    for name, array in arrays.items():
        if array.dtype != bool:
            nothing = ~where if array.ndim == where.ndim else ~where.any(axis=-1)
            found[name] = array.copy()
            found[name][nothing] = np.resize([np.nan, np.inf, -np.inf], nothing.sum())
    return found


def assert_close(found, wanted, eps=64 * EPS):
    """Asserts equality up to a few roundings of the largest value."""
    for ours, truth in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        truth = np.asarray(truth, np.float64)
        np.testing.assert_allclose(ours, truth, rtol=0, atol=eps * max(1.0, np.abs(truth).max(initial=0)))


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@every_case
def test_float32_is_float64_rounded(case):
    arrays = case.arrays()
    where = some(case, arrays)
    ours = case.loss_and_grads(float32(arrays), where=where)
    with jax.enable_x64(True):
        truth = case.loss_and_grads(arrays, where=where)
    assert ours[0].dtype == np.float32
    assert truth[0].dtype == np.float64
    assert_close(ours, truth)


@every_case
def test_gradients_are_finite_differences(case):
    if not case.differentiable:
        pytest.skip("has kinks, or stops a gradient")
    # Of the shapes of the test above, whose compiled function this one calls.
    arrays = case.arrays(seed=2)
    where = some(case, arrays)
    random = np.random.default_rng(3)
    direction = {name: random.normal(size=arrays[name].shape) for name in case.trained}

    def at(step):
        moved = {name: arrays[name] + step * direction[name] for name in case.trained}
        with jax.enable_x64(True):
            return case.loss_and_grads({**arrays, **moved}, where=where)

    slope = sum(np.vdot(at(0.0)[2][name], direction[name]) for name in case.trained)
    difference = (np.asarray(at(1e-5)[0]) - np.asarray(at(-1e-5)[0])) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)


@every_case
def test_what_is_fixed_has_no_gradient_and_what_is_trained_has(case):
    arrays = float32(case.arrays())
    _, _, grads = case.loss_and_grads(arrays, where=some(case, arrays))
    for name in case.trained:
        assert np.any(grads[name]), name
    for name in set(case.fixed) - {"desirable"}:
        np.testing.assert_array_equal(grads[name], 0, name)


@every_case
def test_what_does_not_count_does_not_matter(case):
    arrays = float32(case.arrays())
    where = some(case, arrays)
    clean = case.loss_and_grads(arrays, where=where)
    dirty = case.loss_and_grads(scrambled(arrays, where), where=where)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    for name in case.trained:
        np.testing.assert_array_equal(clean[2][name][~where], 0, name)


@some_cases
def test_a_sequence_that_does_not_count_is_as_if_it_were_not_there(case):
    arrays = float32(case.arrays())
    keep = np.array([True, False, True, True, False])
    where = np.broadcast_to(keep.reshape(5, *[1] * case.of_tokens), arrays[case.trained[0]].shape)
    loss, metrics, grads = case.loss_and_grads(arrays, where=where)
    alone = case.loss_and_grads({name: array[keep] for name, array in arrays.items()})
    assert_close((loss, metrics, {name: grad[keep] for name, grad in grads.items()}), alone, eps=8 * EPS)


@every_case
def test_nothing_counts(case):
    for batch, length in ((5, 6), (0, 6), (5, 0))[: 3 if case.of_tokens else 2]:
        arrays = float32(case.arrays(batch=batch, length=length))
        where = np.zeros(arrays[case.trained[0]].shape, bool)
        for result in jax.tree.leaves(case.loss_and_grads(scrambled(arrays, where), where=where)):
            np.testing.assert_array_equal(result, np.zeros(result.shape))


@every_case
def test_extreme_log_ratios_are_finite(case):
    names = [name for name in (*case.trained, *case.fixed) if name.endswith("logprobs")]
    arrays = float32(case.arrays())
    where = np.ones(arrays[names[0]].shape, bool)
    batch = len(where)
    # All pairs of values, as many at a time as the compiled function takes.
    corners = np.stack(np.meshgrid(*[[-1e4, -50, -1e-9, 0]] * len(names)), axis=-1).reshape(-1, len(names))
    corners = np.resize(corners, (-(-len(corners) // batch) * batch, len(names))).astype(np.float32)
    for part in np.split(corners, len(corners) // batch):
        for name, corner in zip(names, part.T, strict=True):
            halves = np.stack([corner, corner / 2], axis=-1)
            arrays[name] = np.tile(halves, where.shape[1] // 2) if case.of_tokens else corner
        result = case.loss_and_grads(arrays, where=where)
        assert_finite(result)
        # An optimizer squares the gradients.
        assert_finite([np.square(grad) for grad in result[2].values()])


# Log-probabilities of −∞ are those of masked tokens.
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_infinities_are_the_limit_of_large_numbers(case):
    names = [name for name in (*case.trained, *case.fixed) if name.endswith("logprobs")]
    arrays = float32(case.arrays())
    where = np.ones(arrays[names[0]].shape, bool)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, size) for size in (1, 2, 3, 4))
    for subset in subsets:

        def with_first(value, subset=subset):
            result = {name: array.copy() for name, array in arrays.items()}
            for name in subset:
                result[name].flat[0] = value
            return map(np.asarray, jax.tree.leaves(case.loss_and_grads(result, where=where)))

        for near, far, infinite in zip(*map(with_first, (-1e4, -1e7, -np.inf)), strict=True):
            grows = np.abs(far) > 10 * np.maximum(np.abs(near), 1)
            assert not np.isnan(infinite[~grows]).any(), subset
            # With several infinities the limit depends on the direction.
            if len(subset) == 1:
                np.testing.assert_allclose(infinite[~grows], far[~grows], rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(infinite[grows], np.sign(far[grows]) * np.inf)


@every_case
def test_nan_that_counts_is_not_hidden(case):
    arrays = float32(case.arrays())
    for name in case.trained:
        poisoned = dict(arrays) | {name: arrays[name].copy()}
        poisoned[name].flat[0] = np.nan
        assert np.isnan(case.loss_and_grads(poisoned, where=some(case, arrays))[0]), name


@some_cases
def test_parts_with_the_count_of_the_whole_add_up(case):
    arrays = float32(case.arrays())
    where = some(case, arrays)
    loss, _, grads = case.loss_and_grads(arrays, where=where)
    # One example at a time; one of them has no counted element.
    parts = [
        case.loss_and_grads(
            {name: array[[place]] for name, array in arrays.items()}, where=where[[place]], normalizer=case.count(where)
        )
        for place in range(5)
    ]
    assert_close(sum(part[0] for part in parts), loss, eps=16 * EPS)
    for name, grad in grads.items():
        assert_close(np.concatenate([part[2][name] for part in parts]), grad, eps=16 * EPS)


@some_cases
def test_low_precision_is_computed_in_float32(case):
    low = {
        name: array if array.dtype == bool else jnp.asarray(array, jnp.bfloat16)
        for name, array in case.arrays().items()
    }
    same = float32({name: np.asarray(array) for name, array in low.items()})
    where = some(case, same)
    loss, metrics, grads = case.loss_and_grads(low, where=where)
    wanted = case.loss_and_grads(same, where=where)
    assert loss.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, (loss, metrics), wanted[:2])
    for name, grad in grads.items():
        assert grad.dtype == jnp.bfloat16, name
        np.testing.assert_array_equal(grad, wanted[2][name].astype(jnp.bfloat16), name)


@some_cases
def test_without_jit(case):
    arrays = float32(case.arrays())
    where = some(case, arrays)
    loss, metrics, _ = case.loss_and_grads(arrays, where=where)
    assert_close(case.function(**arrays, where=where), (loss, metrics), eps=16 * EPS)


@some_cases
def test_under_vmap(case):
    batches = [float32(case.arrays(seed)) for seed in (4, 5)]
    wheres = [some(case, batches[0], seed) for seed in (6, 7)]
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    found = jax.vmap(lambda arrays, where: case.loss_and_grads(arrays, where=where))(stacked, np.stack(wheres))
    for place, (arrays, where) in enumerate(zip(batches, wheres, strict=True)):
        here = jax.tree.map(lambda leaf, place=place: leaf[place], found)
        assert_close(here, case.loss_and_grads(arrays, where=where), eps=16 * EPS)


@some_cases
def test_metrics_carry_no_gradient(case):
    arrays = float32(case.arrays())
    flags = {name: array for name, array in arrays.items() if array.dtype == bool}

    def metric_sum(numbers):
        return sum(leaf.sum().astype(np.float32) for leaf in jax.tree.leaves(case.function(**numbers, **flags)[1]))

    for grad in jax.tree.leaves(jax.grad(metric_sum)({name: arrays[name] for name in arrays if name not in flags})):
        np.testing.assert_array_equal(grad, 0)


@each_of([case for case in CASES if not case.of_tokens])
def test_reductions(case):
    arrays = float32(case.arrays())
    where = some(case, arrays)
    each = np.asarray(case.function(**arrays, where=where, reduction="none")[0], np.float64)
    assert each.shape == where.shape
    np.testing.assert_array_equal(each[~where], 0)
    assert_close(case.function(**arrays, where=where, reduction="sum")[0], each.sum(), eps=8 * EPS)
    assert_close(case.function(**arrays, where=where)[0], each.sum() / where.sum(), eps=8 * EPS)
    with pytest.raises(ValueError, match="normalizer divides a mean"):
        case.function(**arrays, reduction="sum", normalizer=3)


@each_of([case for case in CASES if not case.of_tokens])
def test_any_cotangent(case):
    # The loss of a pair depends on this pair alone, so each pair's cotangent scales its gradient.
    arrays = float32(case.arrays())
    flags = {name: array for name, array in arrays.items() if array.dtype == bool}
    trained = {name: arrays[name] for name in case.trained}
    fixed = {name: arrays[name] for name in case.fixed}
    cotangent = np.random.default_rng(3).normal(size=5).astype(np.float32)

    def each(trained):
        return case.function(**fixed, **trained, reduction="none")[0]

    assert not set(flags) - set(fixed)
    _, pull_back = jax.vjp(each, trained)
    (ours,), (of_sum,) = pull_back(cotangent), pull_back(np.ones(5, np.float32))
    for name, grad in of_sum.items():
        assert_close(ours[name], cotangent.astype(np.float64) * grad, eps=8 * EPS)


@every_case
def test_shapes_that_do_not_fit_are_refused(case):
    arrays = float32(case.arrays())
    for name, array in arrays.items():
        for wrong in (array[..., None], array[:-1], np.concatenate([array, array])):
            with pytest.raises(ValueError, match=r"shape"):
                case.function(**{**arrays, name: wrong})
        if array.dtype != bool and name != "kl":
            with pytest.raises(TypeError, match=rf"{name} got dtype int32; pass floating-point numbers"):
                case.function(**{**arrays, name: np.zeros(array.shape, np.int32)})
    first = arrays[case.trained[0]]
    with pytest.raises(TypeError, match=r"where got dtype int32; pass bools \(`where != 0`\)"):
        case.function(**arrays, where=np.ones(first.shape, np.int32))
    with pytest.raises(ValueError, match=r"where got shape"):
        case.function(**arrays, where=np.ones((2, *first.shape), bool))
    with pytest.raises(ValueError, match=r"normalizer got shape \(2,\); pass a scalar"):
        case.function(**arrays, normalizer=np.ones(2))


# ---- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [np.float64, jnp.float64], ids=["numpy", "jax"])
def test_options_of_float64_leave_the_loss_in_float32(make):
    pair, tokens = jnp.full(2, -1, jnp.float32), jnp.full((2, 3), -1, jnp.float32)
    with jax.enable_x64(True):
        some, python = make(0.1), np.float64(0.1)
        found = [
            losses.dpo(pair, pair, pair, pair, beta=some, label_smoothing=python),
            losses.dpo(pair, pair, pair, pair, beta=some, loss_type="discopop", discopop_tau=python),
            losses.dpo(pair, pair, pair, pair, loss_type="bco_pair", reward_shift=some, normalizer=some),
            losses.orpo(pair, pair, beta=some, nll_weight=some),
            losses.cpo(pair, pair, beta=some, nll_weight=some, label_smoothing=python),
            losses.simpo(pair, pair, beta=some, gamma=some, nll_weight=some, label_smoothing=python),
            losses.kto(
                pair, pair, jnp.array([True, False]), kl=some, beta=some, desirable_weight=some, undesirable_weight=some
            ),
            losses.grpo(
                tokens, pair, ref_logprobs=tokens, entropy=tokens, epsilon_low=some, epsilon_high=some,
                delta=20 * python, beta=some, entropy_coef=some, loss_type="dr_grpo",
                max_completion_length=np.int64(3), normalizer=some,
            ),
            losses.grpo(tokens, pair, loss_type="sapo", sapo_tau_pos=some, sapo_tau_neg=some, weights=tokens),
            losses.sampler_correction(tokens, tokens, level="sequence", low=some, high=some),
            losses.sequence_logprobs(tokens, excess_weight=python),
            losses.dpo(pair, pair, pair, pair, divergence="alpha", divergence_alpha=python),
            losses.ppo_clip(
                tokens, tokens, tokens, entropy=tokens, epsilon_low=some, epsilon_high=some, entropy_coef=some
            ),
        ]  # fmt: skip
        for leaf in jax.tree.leaves(found):
            assert leaf.dtype in (np.float32, np.int32)


@each_of([case for case in CASES if not case.of_tokens])
def test_log_probabilities_of_tokens_are_refused_as_those_of_sequences(case):
    arrays = {name: np.stack([array, array]) for name, array in float32(case.arrays()).items()}
    with pytest.raises(ValueError, match=rf"{case.trained[0]} got shape \(2, 5\); .* losses.sequence_logprobs"):
        case.function(**arrays)


@every_case
def test_tuples_of_log_probabilities_are_refused(case):
    arrays = float32(case.arrays())
    name = case.trained[0]
    found = losses.SequenceLogprobs(arrays[name], arrays[name])
    with pytest.raises(TypeError, match=rf"{name} got a SequenceLogprobs; pass its field `.logprobs`"):
        case.function(**{**arrays, name: found})
