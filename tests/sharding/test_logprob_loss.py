"""A user's loss of tokens or rows, wherever tokens, columns and its own arguments are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import BATCH, HIDDEN, IMPLEMENTATION, MODES, PLACES, VOCAB, assert_same, pick

import jliger
from jliger.testing.unit_losses import fused, make, reference_loss, row_loss, token_loss, values_and_grads

LOSSES = {"tokens": token_loss, "rows": row_loss}


def arrays(units):
    """Inputs, labels, arguments and mask; and arrays for the loss to close over."""
    problem = make(BATCH, units, features=HIDDEN, vocab=VOCAB)
    return *jax.tree.map(np.asarray, problem), np.float32(0.7), np.array([0, 2])


def run(function, units, inputs, labels, args, where, factor, integers, **options):
    def loss_fn(result, *arguments):
        loss, aux = LOSSES[units](result, *arguments)
        return factor * loss * integers[1], aux

    options = {"units": units, "where": where, "precision": "highest", **options}
    return values_and_grads(function, loss_fn, inputs, labels, args, **options)


ours = functools.partial(run, functools.partial(fused, implementation=IMPLEMENTATION, chunk_size=8))


@functools.cache
def expected(units):
    with jax.enable_x64(True):
        in_float64 = jax.tree.map(
            lambda a: jnp.asarray(a, np.float64 if a.dtype == np.float32 else a.dtype), arrays(units)
        )
        return jax.tree.map(np.asarray, jax.jit(functools.partial(run, reference_loss, units))(*in_float64))


def specs(place, units):
    kernel = (*place.kernel, None, None)
    of_units = place.tokens if units == "tokens" else P(*place.tokens[:1])
    inputs = {"hidden": place.tokens, "kernel": place.kernel, "bias": P(kernel[1])}
    return inputs, place.tokens, (of_units, of_units), place.tokens, P(), P()


CASES = pick(
    [
        ("fsdp-h+tp", "tokens", "auto"),
        ("dp+sp+fsdp+tp", "tokens", "explicit"),
        ("fsdp-v+tp", "rows", "explicit"),
        ("dp+sp", "rows", "auto"),  # a row is spread over devices: XLA gathers it
        pytest.param("tp", "rows", "auto", marks=pytest.mark.exhaustive),
    ],
    on_gpus=[("fsdp-h+tp", "tokens", "auto"), ("tp", "rows", "explicit")],
    interpreted=[("dp+tp", "rows", "explicit")],
)


@pytest.mark.parametrize(("place", "units", "mode"), CASES)
def test_equal_to_those_of_one_device(place, units, mode):
    assert mode in MODES
    place = PLACES[place]
    mesh = place.mesh(mode)
    with jax.set_mesh(mesh):
        put = jax.tree.map(
            lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays(units), specs(place, units)
        )
        found = jax.block_until_ready(jax.jit(functools.partial(ours, units))(*put))
        assert_same(found, expected(units))
        if mode == "explicit":
            for name, array in put[0].items():
                assert found[f"d {name}"].sharding.is_equivalent_to(array.sharding, array.ndim), name


@pytest.mark.parametrize(("units", "check_vma"), [("tokens", False), ("rows", True)])
def test_inside_a_shard_map(units, check_vma):
    place = PLACES["dp+tp"]
    mesh = place.mesh("explicit")
    inputs, *rest = arrays(units)

    def local(inputs, labels, args, where, factor, integers):
        def loss_fn(result, *arguments):
            loss, aux = LOSSES[units](result, *arguments)
            return factor * 1 * loss * integers[1], aux  # an array that is made here

        total, aux = fused(
            loss_fn, inputs["hidden"], inputs["kernel"], labels, args, units=units, bias=inputs["bias"], where=where,
            vocab_axis_name="model", precision="highest", chunk_size=8, implementation=IMPLEMENTATION,
        )  # fmt: skip
        return jax.lax.psum(total, "data"), aux

    def around(inputs, *rest):
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=specs(place, units), out_specs=(P(), P("data")), check_vma=check_vma
        )
        value, pull_back, aux = jax.vjp(lambda inputs: mapped(inputs, *rest), inputs, has_aux=True)
        aux = {f"aux {index}": leaf for index, leaf in enumerate(jax.tree.leaves(aux))}
        grads = pull_back(jnp.float32(0.7))[0]
        return {"loss": value, **aux, **{f"d {name}": grad for name, grad in grads.items()}}

    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), (inputs, *rest), specs(place, units)
        )
        assert_same(jax.block_until_ready(jax.jit(around)(*arguments)), expected(units))


def test_an_explicit_axis_that_spreads_rows_is_refused_by_name():
    place = PLACES["dp+sp"]
    mesh = place.mesh("explicit")
    if mesh.shape["seq"] == 1:
        pytest.skip("needs two devices along the rows")
    with jax.set_mesh(mesh):
        hidden, labels = (
            jax.device_put(array, NamedSharding(mesh, place.tokens))
            for array in (jnp.ones((*BATCH, HIDDEN)), jnp.zeros(BATCH, int))
        )
        with pytest.raises(NotImplementedError, match="sharded over 'seq'; all tokens of a row"):
            jliger.fused_linear_loss(
                lambda result: result.logprobs.sum(), hidden, jnp.ones((HIDDEN, VOCAB)), labels, units="rows"
            )


def test_control_flow_with_arrays_of_explicit_axes_is_refused():
    mesh = PLACES["dp"].mesh("explicit")
    with jax.set_mesh(mesh):
        hidden, factor = (
            jax.device_put(array, NamedSharding(mesh, P())) for array in (jnp.ones((*BATCH, HIDDEN)), jnp.float32(2))
        )

        def loss_fn(result):
            return jax.lax.cond(result.logprobs > factor, jnp.sin, jnp.cos, result.logprobs)

        with pytest.raises(NotImplementedError, match=r"loss_fn closes over arrays .* pass these arrays in args"):
            jliger.fused_linear_loss(loss_fn, hidden, jnp.ones((HIDDEN, VOCAB)), jnp.zeros(BATCH, int), units="tokens")
