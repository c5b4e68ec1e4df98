"""Losses of log-probabilities are plain JAX: sharded arrays change nothing, and parts add up inside a shard_map."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import crossed

from jliger import losses
from jliger.testing.oracle import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="has no kernels")

B, T = 8, 16
SPEC = P("data", "seq")


def mesh_of(axis_type):
    seq = 2 if jax.device_count() > 2 else 1
    return jax.make_mesh((jax.device_count() // seq, seq), ("data", "seq"), axis_types=(axis_type,) * 2)


def batch():
    random = np.random.default_rng(0)
    tokens = {name: random.uniform(-3, -1, (B, T)).astype(np.float32) for name in ("logprobs", "old", "ref", "other")}
    where = random.random((B, T)) < 0.6
    where[1] = False
    return {**tokens, "where": where, "advantages": random.normal(size=B).astype(np.float32)}


def policy_loss(batch, normalizer=None, **options):
    return losses.grpo(
        batch["logprobs"], batch["advantages"], where=batch["where"], old_logprobs=batch["old"],
        ref_logprobs=batch["ref"], beta=0.1, normalizer=normalizer, **options,
    )  # fmt: skip


def preference_loss(batch, normalizer=None):
    sequences = [losses.sequence_logprobs(batch[name], batch["where"]) for name in ("logprobs", "other", "old", "ref")]
    where = (sequences[0].counts > 0) & (sequences[1].counts > 0)
    return losses.dpo(*(each.logprobs for each in sequences), where=where, normalizer=normalizer)


LOSSES = {
    "dapo": policy_loss,
    "grpo": functools.partial(policy_loss, loss_type="grpo"),
    "gspo": functools.partial(policy_loss, loss_type="grpo", importance_sampling_level="sequence"),
    "dpo": preference_loss,
}


def of_logprobs(loss, batch, **options):
    return jax.value_and_grad(lambda logprobs: loss({**batch, "logprobs": logprobs}, **options), has_aux=True)(
        batch["logprobs"]
    )


@pytest.mark.parametrize(("axis_type", "name"), crossed([AxisType.Auto, AxisType.Explicit], list(LOSSES)), ids=str)
def test_sharded_arrays(name, axis_type):
    wanted = of_logprobs(LOSSES[name], batch())
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        sharded = {
            key: jax.device_put(array, NamedSharding(mesh, SPEC if array.ndim == 2 else P("data")))
            for key, array in batch().items()
        }
        found = jax.jit(functools.partial(of_logprobs, LOSSES[name]))(sharded)
        assert found[1].sharding.is_equivalent_to(sharded["logprobs"].sharding, 2)
    jax.tree.map(lambda ours, truth: np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-7), found, wanted)


POLICY = {
    "where": lambda: jnp.ones((B, T), bool),
    "old": lambda: jnp.full((B, T), -2.0),
    "advantages": lambda: jnp.ones(B),
}
SEQUENCES = {"ref": lambda: jnp.full(B, -2.0), "where": lambda: jnp.ones(B, bool), "kl": lambda: jnp.ones(B)}


@pytest.mark.parametrize("spread", ["logprobs", pytest.param("others", marks=pytest.mark.exhaustive)])
def test_arguments_spread_over_other_explicit_axes_than_the_log_probabilities(spread):
    def policy(logprobs, where, old, advantages):
        options = {"where": where, "old_logprobs": old, "ref_logprobs": old, "entropy": old, "beta": 0.1}
        options["weights"], _ = losses.sampler_correction(logprobs, old, level="sequence", where=where)
        loss_types = ("dapo", "grpo", "cispo", "sapo")
        return sum(losses.grpo(logprobs, advantages, loss_type=each, **options)[0] for each in loss_types)

    def preference(logprobs, ref, where, kl):
        dpo = losses.dpo(logprobs, ref, ref, ref, where=where)[0]
        return dpo + losses.cpo(logprobs, ref)[0] + losses.kto(logprobs, ref, where, kl=kl, where=where)[0]

    mesh = mesh_of(AxisType.Explicit)
    for loss, others, shape in ((policy, POLICY, (B, T)), (preference, SEQUENCES, (B,))):
        others = {name: make() for name, make in others.items()}
        logprobs = jnp.linspace(-3, -1, math.prod(shape)).reshape(shape)
        wanted = jax.value_and_grad(loss)(logprobs, **others)
        with jax.set_mesh(mesh):
            place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
            if spread == "logprobs":
                logprobs = place(logprobs)
            else:
                others = {name: place(array) for name, array in others.items()}
            found = jax.jit(jax.value_and_grad(loss))(logprobs, **others)
        for ours, truth in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=1e-7)


def test_spread_log_probabilities_without_a_mesh_in_scope():
    logprobs = jnp.linspace(-3, -1, B)
    spread = jax.device_put(logprobs, NamedSharding(mesh_of(AxisType.Explicit), P("data")))
    where = np.arange(B) % 2 == 0
    found, wanted = (losses.cpo(chosen, logprobs - 1, where=where)[0] for chosen in (spread, logprobs))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("check_vma", "name"), crossed([True, False], list(LOSSES)))
def test_parts_inside_a_shard_map_with_the_global_count(name, check_vma):
    (wanted, _), wanted_grads = of_logprobs(LOSSES[name], batch())
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if B % jax.device_count():
        pytest.skip("sequences don't divide over devices")

    def local(batch):
        counts = batch["where"].sum() if name == "dapo" else batch["where"].any(axis=-1).sum()
        (loss, _), grads = of_logprobs(LOSSES[name], batch, normalizer=jax.lax.psum(counts, "data"))
        return jax.lax.psum(loss, "data"), grads

    both = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")), check_vma=check_vma))
    loss, grads = both(batch())
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(grads, wanted_grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_reference_point_of_kto_inside_a_shard_map(check_vma):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    logprobs, ref_logprobs = jnp.linspace(-8, -2, 16), jnp.full(16, -5.1)
    kl = jax.shard_map(
        functools.partial(losses.kto_kl, axis_name="data"),
        mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma,
    )(logprobs, ref_logprobs)  # fmt: skip
    np.testing.assert_allclose(kl, 0.1, rtol=1e-5)
