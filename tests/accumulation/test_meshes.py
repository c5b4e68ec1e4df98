"""On a mesh: the whole batch's gradients, each summed over devices once, after the last microbatch."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jliger
from jliger.testing.promotion import promoting, with_promotion

ROWS, LENGTH, SIZE, VOCAB, COUNT = 32, 3, 16, 64, 4
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
# What float32 sums of some tens of terms differ by, in whichever order; a microbatch that a device left out, or had
# twice, would be a part in 32.
ROUNDING = 1e-5
SHAPES = {"body": (SIZE, SIZE), "norm": (SIZE,), "head": (SIZE, VOCAB)}


def make_mesh(mode, sizes=(4, 2)):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(MODES[mode],) * 2)


@functools.cache
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}
    rng = np.random.default_rng(0)
    counted = np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (ROWS, 1))
    labels = np.where(counted, rng.integers(0, VOCAB, (ROWS, LENGTH)), -100)
    return params, {"x": jnp.asarray(rng.normal(size=(ROWS, LENGTH, SIZE)), jnp.float32), "labels": jnp.asarray(labels)}


@with_promotion
def hidden_states(params, batch):
    return jnp.tanh(batch["x"] @ params["body"]) * params["norm"]


def fused_sums(params, batch):
    loss, metrics = jliger.fused_linear_cross_entropy(
        hidden_states(params, batch), params["head"], batch["labels"], reduction="sum", return_metrics=True
    )
    aux = {"weight": metrics.weight, "accuracy": metrics.accuracy, "predictions": metrics.predictions}
    return loss, metrics.weight, aux


@with_promotion
def optax_sums(params, batch):
    logits = hidden_states(params, batch) @ params["head"]
    counted = batch["labels"] >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["labels"], 0))
    weight, right = jnp.sum(counted), jnp.sum((logits.argmax(-1) == batch["labels"]) & counted)
    predictions = jnp.where(counted, logits.argmax(-1), -1).astype(jnp.int32)
    return (
        jnp.sum(losses, where=counted),
        weight,
        {
            "weight": weight,
            "accuracy": right / jnp.maximum(weight, 1),
            "predictions": predictions,
        },
    )


LOSSES = {"fused": fused_sums, "optax": optax_sums}
KINDS = {"weight": "sum", "accuracy": "mean", "predictions": "concatenate"}


@functools.cache
def expected(loss):
    """Of the whole batch, on one device, by `jax.value_and_grad`."""
    params, batch = problem()

    @with_promotion
    def mean(params):
        total, weight, aux = LOSSES[loss](params, batch)
        return total / weight, (weight, aux)

    (found, (weight, aux)), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return jliger.accumulation.AccumulatedLoss(found, weight, aux), grads


def assert_same(found, expected):
    """Equal up to rounding, by norm; integers exactly."""
    for (path, one), (_, other) in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(expected), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        if not np.issubdtype(one.dtype, np.floating):
            np.testing.assert_array_equal(one, other, str(path))
        else:
            error = np.linalg.norm(one - other)
            assert error <= ROUNDING * np.linalg.norm(other), f"{path}: off by {error}"


# Which axes share the batch, and where parameters lie.
PLACES = {
    "data parallel": (("data",), {}),
    "data parallel over both": (("data", "model"), {}),
    "FSDP": (("data", "model"), {"body": P("data"), "norm": P("data"), "head": P("model", "data")}),
    "FSDP over one axis of two": (("data", "model"), {"body": P("data"), "head": P(None, "data")}),
    "FSDP along two at once": (("data", "model"), {"body": P(("data", "model")), "head": P(None, ("model", "data"))}),
    "tensor parallel": (("data",), {"head": P(None, "model")}),
    "FSDP and tensor parallel": (("data",), {"body": P("data"), "head": P("data", "model")}),
}
CASES = [("auto", place, "fused") for place in PLACES if place != "data parallel over both"]
CASES += [("explicit", place, "fused") for place in ("data parallel", "FSDP", "FSDP and tensor parallel")]
CASES += [("auto", "FSDP and tensor parallel", "optax"), ("explicit", "FSDP", "optax")]


def put(mesh, place):
    """Parameters, batch, axes and specs as a place says."""
    params, batch = problem()
    axes, specs = PLACES[place]
    specs = {name: specs.get(name, P()) for name in params}
    params = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    return params, jax.device_put(batch, NamedSharding(mesh, P(axes))), axes, specs


@pytest.mark.parametrize(("mode", "place", "loss"), CASES)
def test_each_gradient_is_summed_once(mode, place, loss):
    mesh = make_mesh(mode)
    params, batch, axes, specs = put(mesh, place)
    step = jax.jit(
        jliger.accumulate_gradients(
            LOSSES[loss], COUNT, aux_reduction=KINDS, batch_axes=axes, specs=specs if mode == "auto" else None
        )
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(params, batch).compile()
    found = compiled(params, batch)
    assert_same(found, expected(loss))
    for name, gradient in found[1].items():
        assert gradient.sharding.is_equivalent_to(params[name].sharding, gradient.ndim), name

    moved = collectives(compiled.as_text())
    assert {one.kind for one in moved} <= {"all-reduce", "all-gather", "reduce-scatter"}
    # Nothing of the batch moves.
    assert all(one.dtype == "f32" for one in moved if not one.in_loop and one.size > 1)
    if not axes_of(specs.values()) - set(axes):
        assert not any(one.in_loop for one in moved)
    after = [one.shape for one in moved if not one.in_loop and one.kind != "all-gather" and one.size > 1]
    assert collections.Counter(after) == sums_one_would_write(mesh, axes, specs)
    gathered = any(one.kind == "all-gather" and not one.in_loop for one in moved)
    assert gathered == bool(axes_of(specs.values()) & set(axes))


def sums_one_would_write(mesh, axes, specs):
    """The shapes that sums over devices leave: for each parameter a reduce-scatter a dimension, and the rest's."""
    found = collections.Counter()
    axes = set(axes)
    for name, spec in specs.items():
        entries = [axes_of([P(entry)]) for entry in (*spec, None, None)][: len(SHAPES[name])]
        others = [math.prod(mesh.shape[axis] for axis in entry - axes) for entry in entries]
        shape = [size // parts for size, parts in zip(SHAPES[name], others, strict=True)]
        if axes_of([spec]) - axes or set(mesh.explicit_axes) - axes:
            # Beside other axes that spread it or are Explicit: an all-reduce, then a slice, which XLA on GPUs fuses.
            found[tuple(shape)] += 1
            continue
        for dim, entry in enumerate(entries):
            if entry & axes:
                shape[dim] //= math.prod(mesh.shape[axis] for axis in entry & axes)
                found[tuple(shape)] += 1
        if axes - axes_of([spec]):
            found[tuple(shape)] += 1
    return found


def axes_of(specs):
    """The axes that specs name."""
    entries = [entry for spec in specs for entry in spec if entry is not None]
    return {axis for entry in entries for axis in (entry if isinstance(entry, tuple) else (entry,))}


def test_without_a_mesh_in_scope_and_eagerly():
    mesh = make_mesh("auto")
    for place in ("data parallel", "tensor parallel"):
        params, batch, axes, specs = put(mesh, place)
        step = jliger.accumulate_gradients(fused_sums, COUNT, aux_reduction=KINDS, batch_axes=axes, specs=specs)
        assert_same(step(params, batch), expected("fused"))


@pytest.mark.parametrize("axes", [None, "data"])
def test_explicit_axes_that_are_not_named(axes):
    # Then sums are made where types ask for them; rows stay where they are.
    mesh = make_mesh("explicit")
    params, batch, _, _ = put(mesh, "data parallel")
    options = {} if axes is None else {"batch_axes": axes}
    with jax.set_mesh(mesh):
        step = jax.jit(jliger.accumulate_gradients(fused_sums, COUNT, aux_reduction=KINDS, **options))
        found = step(params, batch)
    assert_same(found, expected("fused"))
    assert found[0].aux["predictions"].sharding.spec == P("data", None)


def test_auto_axes_beside_explicit_ones():
    # The batch is XLA's to spread, the head is spread by its type.
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    params, batch, axes, specs = put(mesh, "tensor parallel")
    with jax.set_mesh(mesh):
        step = jax.jit(jliger.accumulate_gradients(fused_sums, COUNT, aux_reduction=KINDS, batch_axes=axes))
        found = step(params, batch)
    assert_same(found, expected("fused"))
    assert found[1]["head"].sharding.spec == specs["head"]


def test_an_axis_that_is_not_named_is_summed_in_each_microbatch():
    # Rows are spread over both axes, parameters over one; the other's sum waits.
    mesh = make_mesh("auto")
    params, batch = problem()
    batch = jax.device_put(batch, NamedSharding(mesh, P(("data", "model"))))
    params = jax.device_put(params, NamedSharding(mesh, P("model")))
    step = jax.jit(
        jliger.accumulate_gradients(optax_sums, COUNT, aux_reduction=KINDS, batch_axes="data", specs=P("model"))
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(params, batch).compile()
    found = compiled(params, batch)
    assert_same(found, expected("optax"))
    assert all(leaf.sharding.spec == P("model") for leaf in found[1].values())
    after = [one.shape for one in collectives(compiled.as_text()) if not one.in_loop and one.kind == "all-reduce"]
    shares = [params[name].sharding.shard_shape(SHAPES[name]) for name in params]
    assert sorted(shape for shape in after if shape) == sorted(shares)


def test_sums_over_devices_are_float32():
    mesh = make_mesh("auto", (8, 1))
    ones = jax.device_put(jnp.ones((ROWS * 32, 1), jnp.bfloat16), NamedSharding(mesh, P("data")))

    def sums(param, rows):
        return jnp.sum(param.astype(jnp.float32) * rows.astype(jnp.float32)), rows.size

    step = jliger.accumulate_gradients(sums, 128, batch_axes="data")
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(jnp.ones((), jnp.bfloat16), ones)
        (found, gradient) = lowered.compile()(jnp.ones((), jnp.bfloat16), ones)
    assert (float(found.weight), float(gradient), gradient.dtype) == (1024, 1, jnp.bfloat16)
    reduced = [line for line in lowered.as_text().splitlines() if "stablehlo.add" in line and "bf16" in line]
    assert not reduced


# ---- what each device has of its own -------------------------------------------------------------------------------


def test_devices_have_keys_of_their_own():
    mesh = make_mesh("auto", (8, 1))
    rows = jax.device_put(jnp.ones((ROWS,)), NamedSharding(mesh, P("data")))

    def sums(param, rows, keys):
        return jnp.sum(param * rows), rows.size, jax.tree.map(lambda key: jax.random.bits(key, rows.shape), keys)

    step = jax.jit(
        jliger.accumulate_gradients(sums, COUNT, key_argnums=2, aux_reduction="concatenate", batch_axes="data")
    )
    with jax.set_mesh(mesh):
        found, _ = step(1.0, rows, {"typed": jax.random.key(0), "raw": jax.random.PRNGKey(1)})
    for drawn in found.aux.values():
        assert len(set(np.asarray(drawn).tolist())) == ROWS


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(SIZE, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(SIZE, VOCAB, use_bias=False, rngs=rngs)
        self.frozen = nnx.Variable(jnp.float32(2))


def module_sums(model, batch):
    dropped = model.dropout(batch["x"])
    loss, metrics = jliger.fused_linear_cross_entropy(
        model.norm(dropped) * model.frozen[...],
        model.head.kernel[...],
        batch["labels"],
        reduction="sum",
        return_metrics=True,
    )
    return loss, metrics.weight, dropped == 0


def test_modules():
    mesh = make_mesh("auto", (8, 1))
    _, batch = problem()
    model = Model(nnx.Rngs(0))
    key = nnx.state(model, nnx.RngKey)["dropout"]["rngs"]["key"][...]
    step = jliger.accumulate_gradients(module_sums, COUNT, aux_reduction="concatenate", batch_axes="data")
    with jax.set_mesh(mesh):
        found, grads = nnx.jit(step)(model, jax.device_put(batch, P("data")))
    masks = np.asarray(found.aux)
    # No two rows have a mask in common, be they of one device or of one microbatch.
    assert len({mask.tobytes() for mask in masks}) == ROWS
    state = nnx.state(model)
    assert state["dropout"]["rngs"]["count"][...] == COUNT
    assert state["dropout"]["rngs"]["key"][...] == key
    assert list(grads) == ["head", "norm"]

    # By hand: each device's four microbatches in turn, from the same state on, with the masks that were drawn.
    means = []
    for device in range(8):
        mean = jnp.zeros(SIZE)
        for i in range(COUNT):
            rows = slice(device * 4 + i, device * 4 + i + 1)
            dropped = jnp.where(masks[rows], 0, 2 * batch["x"][rows])
            mean = 0.5 * mean + 0.5 * dropped.mean((0, 1))
        means.append(mean)
    np.testing.assert_allclose(state["norm"]["mean"][...], jnp.stack(means).mean(0), rtol=1e-5, atol=1e-7)


def test_a_module_without_dropout_as_on_one_device():
    mesh = make_mesh("auto", (8, 1))
    _, batch = problem()
    model = Model(nnx.Rngs(0))
    model.eval()
    kinds = "concatenate"
    truth, grads_of_whole = jliger.accumulate_gradients(module_sums, 1, aux_reduction=kinds)(model, batch)
    step = jliger.accumulate_gradients(module_sums, COUNT, aux_reduction=kinds, batch_axes="data")
    with jax.set_mesh(mesh):
        found, grads = nnx.jit(step)(model, jax.device_put(batch, P("data")))
    assert_same((found, nnx.to_pure_dict(grads)), (truth, nnx.to_pure_dict(grads_of_whole)))


# ---- within a shard_map of the caller's ------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_within_a_shard_map(mode, check_vma):
    mesh = make_mesh(mode)
    params, batch, axes, _ = put(mesh, "data parallel over both")
    options = {} if check_vma else {"batch_axes": axes}
    step = jliger.accumulate_gradients(fused_sums, COUNT, aux_reduction=KINDS, **options)
    out_specs = ((P(), P(), {"weight": P(), "accuracy": P(), "predictions": P(axes)}), P())
    out_specs = (jliger.accumulation.AccumulatedLoss(*out_specs[0]), out_specs[1])
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(axes)), out_specs=out_specs, check_vma=check_vma)
    compiled = jax.jit(mapped).lower(params, batch).compile()
    assert_same(compiled(params, batch), expected("fused"))
    assert not any(one.in_loop for one in collectives(compiled.as_text()))


def test_within_a_shard_map_sums_that_are_whole_already():
    mesh = make_mesh("auto")
    params, batch, axes, _ = put(mesh, "data parallel over both")

    def sums(params, batch):
        loss, weight, _ = fused_sums(params, batch)
        return jax.lax.psum((loss, weight), axes)

    mapped = jax.shard_map(jliger.accumulate_gradients(sums, COUNT), mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    found, grads = jax.jit(mapped)(params, batch)
    truth, expected_grads = expected("fused")
    assert_same((found.loss, found.weight, grads), (truth.loss, truth.weight, expected_grads))

    def mixed(params, batch):
        loss, weight, _ = fused_sums(params, batch)
        return jax.lax.psum(loss, axes), weight

    mapped = jax.shard_map(jliger.accumulate_gradients(mixed, COUNT), mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    with pytest.raises(ValueError, match="sum both over devices, or neither"):
        jax.jit(mapped)(params, batch)


# ---- across steps ------------------------------------------------------------------------------------------------


def test_updates_from_several_calls():
    mesh = make_mesh("auto")
    params, _, axes, specs = put(mesh, "FSDP")
    optimizer = jliger.weighted_multi_steps(promoting(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1))), 2)
    accumulate = jliger.accumulate_gradients(fused_sums, 2, aux_reduction=KINDS, batch_axes=axes, specs=specs)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        found, grads = accumulate(params, batch)
        updates, state = optimizer.update(grads, state, params, weight=found.weight)
        return optax.apply_updates(params, updates), state

    _, grads = expected("fused")
    plain = promoting(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)))
    updates, _ = plain.update(grads, plain.init(problem()[0]), problem()[0])
    whole = optax.apply_updates(problem()[0], updates)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init)(params)
        halves = [jax.device_put(jax.tree.map(lambda leaf, i=i: leaf[i::2], problem()[1]), P(axes)) for i in range(2)]
        for half in halves:
            params, state = step(params, state, half)
    assert bool(state.has_updated)
    for name, leaf in params.items():
        assert leaf.sharding.is_equivalent_to(state.mean_gradients[name].sharding, leaf.ndim)
        # Adam divides by each gradient's own size: rounding of the smallest ones shows.
        np.testing.assert_allclose(leaf, whole[name], rtol=1e-4, atol=1e-4)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_rows_that_devices_can_not_share():
    mesh = make_mesh("auto")
    params, batch, axes, _ = put(mesh, "data parallel over both")
    with pytest.raises(ValueError, match=r"3, which doesn't divide the batch's 32 rows over 8 devices; .* add 16 rows"):
        jliger.accumulate_gradients(fused_sums, 3, batch_axes=axes)(params, batch)
    mesh = make_mesh("explicit")
    params, batch, _, _ = put(mesh, "data parallel over both")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="8, which doesn't divide the batch's 32 rows over 8 dev"):
        jliger.accumulate_gradients(fused_sums, 8)(params, batch)


def test_axes_and_specs_that_do_not_fit():
    mesh = make_mesh("auto")
    params, batch, _, _ = put(mesh, "data parallel")
    with pytest.raises(
        ValueError, match=r"batch_axes got 'rows', which is no axis of the mesh \(\('data', 'model'\)\)"
    ):
        jliger.accumulate_gradients(fused_sums, 2, batch_axes="rows")(params, batch)
    with pytest.raises(ValueError, match="specs got a tree that is no prefix"):
        jliger.accumulate_gradients(fused_sums, 2, batch_axes="data", specs={"head": P()})(params, batch)
    step = jliger.accumulate_gradients(fused_sums, 2, batch_axes=("data", "model"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"})
    with pytest.raises(ValueError, match=r"of which only \('data',\) are manual here"):
        jax.jit(mapped)(params, batch)
