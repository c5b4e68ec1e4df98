"""Devices say to each other what one would have them say by hand, and each works on its own tokens only."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from hlo import collectives
from jax.sharding import PartitionSpec as P
from sharded import (
    BATCH,
    HIDDEN,
    IMPLEMENTATION,
    MODES,
    PLACES,
    REDUCTIONS,
    VOCAB,
    assert_same,
    jitted,
    now_and_then,
    oracle,
    pick,
    problem_of,
    put,
)

import jliger
from jliger.ops.linear_head import chunks
from jliger.ops.linear_head.chunks import fused
from jliger.ops.linear_head.types import Operands

CHUNK = 4


def lowered(problem, place, mode):
    mesh = PLACES[place].mesh(mode)
    with jax.set_mesh(mesh):
        return jitted(problem).lower(put(problem, PLACES[place], mesh))


def in_turn(places):
    """Each place in each mode, with one form in the one and the other in the other; half of these are exhaustive."""
    often = {(place, MODES[number // 2 % len(MODES)]) for number, place in enumerate(places)}
    cases = [
        (mode, place, REDUCTIONS[(number + turn) % 2])
        for turn, mode in enumerate(MODES)
        for number, place in enumerate(places)
    ]
    return now_and_then(cases, lambda _, case: (case[1], case[0]) in often)


def shares(place, mode="auto"):
    """How many devices share the batch, the sequence, the kernel's rows, and its columns; and whose columns differ."""
    sizes = dict(PLACES[place].mesh(mode).shape)

    def parts(spec, dim):
        entry = (*spec, None, None)[dim]
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        return functools.reduce(lambda product, axis: product * sizes[axis], axes, 1)

    tokens, kernel = PLACES[place].tokens, PLACES[place].kernel
    flat = [axis for entry in tokens if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    columns = (*kernel, None, None)[1] or ()
    vocab_axes = [axis for axis in ((columns,) if isinstance(columns, str) else columns) if axis not in flat]
    vocab = functools.reduce(lambda product, axis: product * sizes[axis], vocab_axes, 1)
    return parts(tokens, 0), parts(tokens, 1), parts(kernel, 0), parts(kernel, 1), vocab


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        ("f32[3,4]{1,0} all-reduce(%a)", [(3, 4)]),
        ("(f32[3,4]{1,0}, f32[]) all-reduce(%a, %b)", [(3, 4), ()]),
        ("f32[3,4]{1,0} all-reduce-start(%a)", [(3, 4)]),
        ("(f32[3,4]{1,0}, f32[5]{0}) all-reduce-start(%a, %b)", [(3, 4), (5,)]),
        ("((f32[3,4]{1,0}), f32[3,4]{1,0}) all-reduce-start(%a)", [(3, 4)]),
        ("((f32[3,4]{1,0}, f32[5]{0}), (f32[3,4]{1,0}, f32[5]{0})) all-reduce-start(%a, %b)", [(3, 4), (5,)]),
        ("(f32[3,4]{1,0}, f32[6,4]{1,0}) all-gather-start(%a)", [(6, 4)]),
        ("((f32[6,4]{1,0}), f32[3,4]{1,0}) reduce-scatter-start(%a)", [(3, 4)]),
        ("f32[3,4]{1,0} all-reduce-done(%a)", []),
    ],
)
def test_what_a_collective_makes_is_counted_once(operation, shapes):
    text = f"ENTRY %main (a: f32[3,4]) -> f32[3,4] {{\n  %found = {operation}, channel_id=1\n}}\n"
    assert [one.shape for one in collectives(text)] == shapes


@pytest.mark.parametrize(
    ("mode", "place", "reduction"),
    pick(
        in_turn(list(PLACES)),
        on_gpus=[(mode, place, "mean") for mode in MODES for place in ("dp", "fsdp-h", "dp+tp")],
        interpreted=in_turn(["fsdp-h+tp"]),
    ),
)
def test_collectives_are_those_one_would_write(mode, place, reduction):
    problem = problem_of(reduction, chunk_size=CHUNK, z_loss=0.1, ignored=0.1)
    found = collectives(lowered(problem, place, mode).compile().as_text())
    batch, length, rows, columns, vocab = shares(place)
    tokens = BATCH[0] // batch * (BATCH[1] // length)
    share, gathered = (HIDDEN // rows, VOCAB // columns), (HIDDEN, VOCAB // vocab)
    by_kind = collections.defaultdict(list)
    for one in found:
        by_kind[one.kind].append(one)

    assert set(by_kind) <= {"all-reduce", "all-gather", "reduce-scatter"}
    # FSDP: the kernel is gathered once, and its gradient's sum scattered once; nothing else ever is.
    is_scattered = share != gathered
    assert {one.shape for one in by_kind["all-gather"][-1:]} == ({gathered} if is_scattered else set())
    scatters = by_kind["reduce-scatter"]
    assert [one.shape for one in scatters[-1:]] == ([share] if is_scattered else [])
    # Along two dimensions at once it takes one gather, and one scatter, for each.
    steps = int(share[0] != gathered[0]) + int(share[1] != gathered[1])
    assert len(by_kind["all-gather"]) == len(scatters) == steps
    # Of the rest: the kernel's gradient where it is replicated, dX where columns are shared, and numbers of tokens.
    is_summed = batch * length > 1 and not is_scattered
    expected = [gathered] * is_summed + [(BATCH[0] // batch, BATCH[1] // length, HIDDEN)] * (vocab > 1)
    large = [one for one in by_kind["all-reduce"] if one.size > tokens]
    assert len(large) <= len(expected)  # on GPUs XLA joins sums into one
    # Beside them go a few scalars, and where columns are shared, each token's stats.
    numbers = sum(one.size for one in by_kind["all-reduce"]) - sum(map(math.prod, expected))
    assert 0 <= numbers <= 8 + 5 * tokens * (vocab > 1)
    assert all(one.dtype == "f32" for one in (*large, *by_kind["all-gather"], *scatters))
    # A chunk has something to say only to those that share its columns: its tokens' numbers.
    in_loop = [one for one in found if one.in_loop]
    assert {one.kind for one in in_loop} <= ({"all-reduce"} if vocab > 1 else set())
    # In sum, since on GPUs they are joined: maximum, sum and the label's logit of each of its tokens.
    assert sum(one.size for one in in_loop) <= 3 * CHUNK


@pytest.mark.skipif(IMPLEMENTATION != "xla", reason="what is summed doesn't depend on the row functions")
@pytest.mark.parametrize(("mode", "place", "reduction"), in_turn(["dp", "fsdp-h", "fsdp-v", "dp+tp"]))
def test_sums_over_devices_are_float32_also_of_bfloat16(mode, place, reduction):
    problem = problem_of(reduction, dtype="bfloat16", kernel_dtype="bfloat16", bias="bfloat16", chunk_size=CHUNK)
    # Before compilation: the CPU's compiler has no bfloat16 sums, and would make them float32 by itself.
    mesh = PLACES[place].mesh(mode)
    seen = []
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        for name in ("psum", "psum_scatter"):
            patch.setattr(jax.lax, name, _recording(getattr(jax.lax, name), seen))
        jax.clear_caches()
        jitted(problem).lower(put(problem, PLACES[place], mesh)).compile()
    assert seen
    assert all(dtype == jnp.float32 for dtype in seen)


def _recording(function, seen):
    def recorded(array, *args, **kwargs):
        seen.append(array.dtype)
        return function(array, *args, **kwargs)

    return recorded


@pytest.mark.parametrize(
    ("mode", "place", "reduction"), pick(in_turn(list(PLACES)), on_gpus=in_turn(["dp+tp"]), interpreted=[])
)
def test_each_device_works_on_its_own_tokens_and_columns(mode, place, reduction, monkeypatch):
    seen = []
    for name in ("stats_pass", "fused_pass", "recompute_pass"):
        monkeypatch.setattr(chunks, name, _seeing(getattr(chunks, name), seen))
    jax.clear_caches()
    problem = problem_of(reduction, chunk_size=CHUNK)
    program = lowered(problem, place, mode)
    if mode == "auto":
        # So far shapes are those of the whole; XLA asks for what a device does as it compiles.
        seen.clear()
        program.compile()
    batch, length, _, _, vocab = shares(place, mode)
    tokens = BATCH[0] * BATCH[1] // (batch * length)
    assert seen
    assert set(seen) == {((tokens, HIDDEN), (HIDDEN, VOCAB // vocab))}


def _seeing(function, seen):
    def watched(*args, **kwargs):
        operands = next(arg for arg in args if isinstance(arg, Operands))
        seen.append((operands.hidden.shape, operands.kernel.shape))
        return function(*args, **kwargs)

    return watched


@pytest.mark.parametrize("mode", pick(["explicit", "manual"], on_gpus=["manual"], interpreted=[]))
def test_each_device_skips_what_does_not_count_of_its_own(mode, monkeypatch):
    # With Auto axes it is the same share that is computed, but callbacks don't live long enough there.
    computed = []

    def product(config, hidden, *others):
        jax.debug.callback(lambda: computed.append(hidden.shape[0]))
        return logits_product(config, hidden, *others)

    logits_product = fused.logits_product
    monkeypatch.setattr(fused, "logits_product", product)
    jax.clear_caches()
    where = jnp.arange(32).reshape(4, 8) < 21
    problem = problem_of(chunk_size=CHUNK).replace(where=where)
    mesh = PLACES["dp"].mesh("auto" if mode == "manual" else mode)
    devices, axis_size = jax.device_count(), mesh.shape["data"]
    arrays = put(problem, PLACES["dp"], mesh)
    with jax.set_mesh(mesh):
        if mode == "manual":

            def loss(hidden, kernel, labels, where):
                total = jliger.fused_linear_cross_entropy(
                    hidden,
                    kernel,
                    labels,
                    where=where,
                    normalizer=21,
                    chunk_size=CHUNK,
                    implementation=IMPLEMENTATION,
                )
                return jax.lax.psum(total, "data")

            sharded = jax.shard_map(loss, in_specs=(P("data"), P(), P("data"), P("data")), out_specs=P())
            inputs = arrays.inputs
            value, grad = jax.jit(jax.value_and_grad(sharded))(
                inputs["hidden"], inputs["kernel"], arrays.labels, arrays.options["where"]
            )
            found = {"loss": value, "hidden": grad * problem.cotangent}
        else:
            found = jitted(problem)(arrays)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert_same(found, {name: oracle(problem)[name] for name in found})
    counted = jnp.sum(where.reshape(axis_size, -1), axis=1)
    chunks_each = jnp.maximum(-(-counted // CHUNK), 1)  # the first chunk is computed always
    assert set(computed) == {CHUNK}
    assert len(computed) == int(jnp.sum(chunks_each)) * (devices // axis_size)
    assert len(computed) < 32 // CHUNK * (devices // axis_size)
    jax.clear_caches()
