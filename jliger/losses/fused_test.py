"""The losses that are fused with a head equal the flat losses on the same head: values, metrics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger
from jliger import losses
from jliger.ops.linear_head import logprob_loss
from jliger.testing.oracle import INTERPRETED, ON_GPU

H, V = 4, 7

pytestmark = pytest.mark.skipif(INTERPRETED or ON_GPU, reason="in float64, which the kernels do not take")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make(*shape):
    """Hidden states, a kernel, tokens and a mask in which the first sequence of the second unit is empty."""
    random = np.random.default_rng(3)
    where = random.random(shape) < 0.7
    if len(shape) > 1:
        where.reshape(-1, shape[-1])[1 if len(shape) == 2 else 2] = False
    tokens = np.where(random.random(shape) < 0.1, -100, random.integers(0, V, shape))
    return normal(*shape, H), normal(H, V, seed=1), tokens, where


def assert_equal(fused, flat, hidden, kernel):
    """Both are functions of hidden states and kernel that return a loss and metrics."""

    @jax.jit
    def both(*arrays):
        return [jax.value_and_grad(function, (0, 1), has_aux=True)(*arrays) for function in (fused, flat)]

    found, expected = both(hidden, kernel)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), found, expected)


def cases(*often, exhaustive):
    return [*often, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in exhaustive)]


@pytest.mark.parametrize(
    ("level", "given"),
    cases(
        ("token", {"loss_type": "grpo", "beta": 0.1, "epsilon_low": 0.1, "delta": 1.5}),
        ("token", {"loss_type": "cispo", "entropy_coef": 0.05, "normalizer": 3.0}),
        ("sequence", {"loss_type": "grpo", "entropy_metric": True}),
        ("token", {"loss_type": "sapo", "sapo_tau_pos": 0.5, "weights": np.abs(normal(4, 5, seed=9)), "beta": 0.1}),
        exhaustive=[
            ("token", {"loss_type": "dapo", "beta": np.float64(0.2), "temperature": 0.5}),
            ("token", {"loss_type": "dr_grpo", "max_completion_length": 9, "entropy_metric": True}),
            ("token", {"loss_type": "bnpo"}),
            ("sequence", {"loss_type": "dr_grpo", "max_completion_length": 9, "beta": 0.1}),
            ("sequence", {"loss_type": "dapo", "entropy_coef": 0.1, "normalizer": 3.0}),
            ("sequence", {"loss_type": "cispo"}),
            ("sequence", {"loss_type": "sapo", "weights": np.abs(normal(4, 5, seed=9))}),
        ],
    ),
)
def test_grpo(level, given):
    with jax.enable_x64(True):
        hidden, kernel, tokens, where = make(4, 5)
        # Arrays among the options: as those of a schedule, which is traced.
        given = {
            name: jnp.asarray(value) if name in ("beta", "epsilon_low") else value for name, value in given.items()
        }
        options = {"where": where} | {name: given.pop(name) for name in ("temperature",) if name in given}
        base = jliger.linear_logprobs(hidden, kernel, tokens, **options).logprobs
        advantages = normal(4) if level == "sequence" else normal(4, 5)
        shared = {"old_logprobs": base + normal(4, 5, seed=5) / 3, "importance_sampling_level": level}
        if "beta" in given:
            shared["ref_logprobs"] = base + normal(4, 5, seed=6) / 3
        with_entropy = given.pop("entropy_metric", False)

        def fused(hidden, kernel):
            return losses.fused_linear_grpo(
                hidden,
                kernel,
                tokens,
                advantages,
                entropy_metric=with_entropy,
                chunk_size=6,
                **shared,
                **given,
                **options,
            )

        def flat(hidden, kernel):
            result = jliger.linear_logprobs(hidden, kernel, tokens, **options)
            entropy = result.entropy if with_entropy or "entropy_coef" in given else None
            counted = where & (tokens != -100)
            return losses.grpo(result.logprobs, advantages, where=counted, entropy=entropy, **shared, **given)

        assert_equal(fused, flat, hidden, kernel)


@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.exhaustive)])
def test_grpo_of_one_sequence(level):
    with jax.enable_x64(True):
        hidden, kernel, tokens, where = make(6)
        options = {"where": where, "temperature": np.linspace(0.5, 2, 6)}

        def fused(hidden, kernel):
            return losses.fused_linear_grpo(
                hidden, kernel, tokens, np.float64(0.7), importance_sampling_level=level, **options
            )

        def flat(hidden, kernel):
            result = jliger.linear_logprobs(hidden, kernel, tokens, **options)
            counted = where & (tokens != -100)
            return losses.grpo(result.logprobs, np.float64(0.7), where=counted, importance_sampling_level=level)

        assert_equal(fused, flat, hidden, kernel)


def test_ppo_clip():
    with jax.enable_x64(True):
        hidden, kernel, tokens, where = make(4, 5)
        old = jliger.linear_logprobs(hidden, kernel, tokens).logprobs + normal(4, 5, seed=5) / 3
        advantages, weights = normal(4, 5, seed=6), np.abs(normal(4, 5, seed=9))
        given = {"entropy_coef": jnp.asarray(0.1), "epsilon_high": 0.3, "delta": 2.0, "normalizer": 7.0}
        given = {**given, "weights": jnp.asarray(weights)}

        def fused(hidden, kernel):
            return losses.fused_linear_ppo_clip(hidden, kernel, tokens, old, advantages, where=where, **given)

        def flat(hidden, kernel):
            result = jliger.linear_logprobs(hidden, kernel, tokens, where=where)
            counted = where & (tokens != -100)
            return losses.ppo_clip(result.logprobs, old, advantages, where=counted, entropy=result.entropy, **given)

        assert_equal(fused, flat, hidden, kernel)


@pytest.mark.parametrize(
    ("name", "sequence_reduction", "given"),
    cases(
        (
            "dpo",
            "sum",
            {"beta": jnp.float32(0.3), "divergence": "alpha", "divergence_alpha": 0.4, "excess_weight": 0.3},
        ),
        ("orpo", "mean", {}),
        exhaustive=[
            ("dpo", "mean", {"loss_type": "bco_pair", "reward_shift": jnp.float32(0.3), "reduction": "sum"}),
            ("cpo", "sum", {"nll_weight": 0.5, "normalizer": 5.0}),
            ("simpo", "mean", {"gamma": 0.2, "nll_weight": 0.3, "excess_weight": 0.5}),
            ("dpo", "sum", {"label_smoothing": 0.1, "divergence": "forward_kl"}),
            ("dpo", "mean", {"divergence": "js", "excess_weight": 0.0}),
            ("simpo", "sum", {"label_smoothing": 0.1, "reduction": "sum"}),
        ],
    ),
)
def test_pairs(name, sequence_reduction, given):
    with jax.enable_x64(True):
        hidden, kernel, tokens, where = make(3, 2, 4)
        references = (normal(3) - 5, normal(3, seed=1) - 5) if name == "dpo" else ()
        given = dict(given)
        shared = {"excess_weight": given.pop("excess_weight", None)}
        changed = {"sequence_reduction": sequence_reduction} if sequence_reduction != default_of(name) else {}

        def fused(hidden, kernel):
            function = getattr(losses, f"fused_linear_{name}")
            return function(
                hidden, kernel, tokens, *references, where=where, chunk_size=8, **changed, **shared, **given
            )

        def flat(hidden, kernel):
            logprobs = jliger.linear_logprobs(hidden, kernel, tokens, where=where).logprobs
            how = {"reduction": sequence_reduction, **shared}
            sequences = losses.sequence_logprobs(logprobs, where & (tokens != -100), **how)
            counted = (sequences.counts > 0).all(-1)
            function = getattr(losses, name)
            return function(sequences.logprobs[:, 0], sequences.logprobs[:, 1], *references, where=counted, **given)

        assert_equal(fused, flat, hidden, kernel)


def default_of(name):
    return "mean" if name in ("orpo", "simpo") else "sum"


@pytest.mark.parametrize(
    "kl", [jnp.float32(0.3), pytest.param(normal(3), marks=pytest.mark.exhaustive)], ids=["one", "each"]
)
def test_kto(kl):
    with jax.enable_x64(True):
        hidden, kernel, tokens, where = make(3, 4)
        arguments = normal(3) - 5, np.array([True, True, False])
        given = {"kl": kl, "undesirable_weight": 2.0}

        def fused(hidden, kernel):
            return losses.fused_linear_kto(hidden, kernel, tokens, *arguments, where=where, **given)

        def flat(hidden, kernel):
            logprobs = jliger.linear_logprobs(hidden, kernel, tokens, where=where).logprobs
            sequences = losses.sequence_logprobs(logprobs, where & (tokens != -100))
            return losses.kto(sequences.logprobs, *arguments, where=sequences.counts > 0, **given)

        assert_equal(fused, flat, hidden, kernel)


def test_calls_with_the_same_options_compile_once():
    hidden, kernel, tokens, _ = jax.tree.map(jnp.asarray, make(2, 3))
    sizes = []
    for beta in (0.1, 0.2, 0.3):
        losses.fused_linear_grpo(
            hidden, kernel, tokens, jnp.ones(2), beta=jnp.float32(beta), ref_logprobs=jnp.zeros((2, 3))
        )
        sizes.append(logprob_loss._summed_losses._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("name", "arguments", "given", "error", "match"),
    [
        ("grpo", (jnp.ones(3),), {}, ValueError, r"advantages got shape \(3,\)"),
        ("grpo", (jnp.ones(2),), {"beta": 0.1}, ValueError, "ref_logprobs is missing"),
        ("grpo", (jnp.ones(2),), {"old_logprobs": jnp.ones(2)}, ValueError, "old_logprobs got shape"),
        ("grpo", (jnp.ones(2),), {"where": jnp.ones((2, 3))}, TypeError, "where got dtype float32"),
        ("grpo", (jnp.ones(2),), {"keep_logits": True}, TypeError, "keep_logits is no option"),
        ("orpo", (), {}, ValueError, r"tokens got shape \(2, 3\); pass pairs"),
        ("kto", (jnp.ones(2), jnp.ones(2, bool)), {"kl": 0.0, "reduction": "none"}, ValueError, "reduction got 'none'"),
    ],
)  # fmt: skip
def test_errors(name, arguments, given, error, match):
    hidden, kernel, tokens, _ = jax.tree.map(jnp.asarray, make(2, 3))
    with pytest.raises(error, match=match):
        getattr(losses, f"fused_linear_{name}")(hidden, kernel, tokens, *arguments, **given)
