"""Tests what the benchmark computes from times and how often it calls; not how fast anything is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from jliger import reference
from jliger.bench import chunk_sizes, head, logprobs, measure, methods, operations, problem, report
from jliger.bench.problem import ONE, THREE, Bound, Floor, Method, Problem, Shape
from jliger.bench.timing import Effort, Timed, time_in_turn

SHAPE = Shape(16, 8, 32)


def test_bursts_alternate_and_wait_once_each():
    happened = []

    def thing(name):
        return Timed(lambda: happened.append(name), lambda _: happened.append(f"{name} waited for"))

    result = time_in_turn({"a": thing("a"), "b": thing("b")}, Effort(bursts=3, seconds=0))
    assert [len(seconds) for seconds in result.values()] == [3, 3]
    # Two calls of each determine the number of calls per burst, which is 1 here.
    calibration, bursts = happened[:6], happened[6:]
    assert calibration == ["a", "a", "a waited for", "b", "b", "b waited for"]
    assert bursts == ["a", "a waited for", "b", "b waited for"] * 3


def test_a_bound_adds_products_and_bytes():
    bound = Bound((THREE, ONE), bytes=600)
    assert bound.seconds({THREE: 3.0, ONE: 1.0}, bandwidth=100.0) == 10.0


def test_bytes_that_are_moved_outside_of_products():
    tokens, hidden, vocab = 8, 4, 32
    shape = Shape(tokens, hidden, vocab)
    assert methods.bound(shape).bytes == 4 * tokens * vocab + 6 * hidden * vocab
    assert methods.forward_bound(shape, "bfloat16").bytes == 2 * tokens * vocab
    assert methods.recomputed_bound(shape, "float32").bytes == 6 * tokens * vocab + 12 * hidden * vocab
    assert methods.recomputed_bound(shape, "float32").floors == (THREE, ONE)


@pytest.mark.parametrize(
    ("shape", "tokens", "times"), [((8192, 4096, 128256), 8192, 1), ((131072, 4096, 128256), 32768, 4)]
)
def test_a_floor_of_many_logits_is_that_of_fewer_tokens_several_times(shape, tokens, times):
    part, result = problem.floor_part(Shape(*shape))
    assert (part.tokens, result) == (tokens, times)


def test_the_floor_is_the_products_of_the_layer():
    rng = np.random.default_rng(0)
    hidden, kernel, grads = (rng.normal(size=size).astype(np.float32) for size in ((16, 8), (8, 32), (16, 32)))
    result = problem.three_products(*map(jnp.asarray, (hidden, kernel, grads)))
    for one, expected in zip(result, (hidden @ kernel, grads @ kernel.T, hidden.T @ grads), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_shares_are_of_medians_in_the_same_bursts():
    floors = {THREE: Floor(THREE, lambda: None, tuple, times=2, flops=1)}
    result = {THREE: [1.0, 2.0, 9.0], "own": [8.0, 5.0, 4.0]}
    record = measure.speed(result, floors, 10.0, "own", THREE, Bound((THREE,), 5))
    assert (record["milliseconds"], record["of_floor"], record["of_bound"]) == (5000.0, 4 / 5, 4.5 / 5)
    assert "of_bound" not in measure.speed(result, floors, None, "own", THREE, Bound((THREE,), 5))


def test_processes_are_merged_by_medians():
    def part(milliseconds, of_floor, **more):
        record = {"what": "head", "shape": "(1, 2, 3)", "name": "a", "milliseconds": milliseconds}
        record |= {"of_floor": of_floor, "bursts": [milliseconds, milliseconds + 1], "extra_mib": 7, **more}
        return {"environment": {"device": "x"}, "copy_gb_per_second": milliseconds, "records": [record]}

    parts = [part(10.0, 0.9, first_call={"all": 3}), part(30.0, 0.7), part(20.0, 0.8)]
    (record,) = report.merged(parts)["head"]["records"]
    assert (record["milliseconds"], record["of_floor"], record["of_floor_spread"]) == (20.0, 0.8, [0.7, 0.9])
    assert (record["fastest_milliseconds"], record["slowest_milliseconds"]) == (10.0, 31.0)
    assert (record["processes"], record["bursts"], record["extra_mib"]) == (3, 6, 7)
    assert record["first_call"] == {"all": 3}
    assert "what" not in record


@pytest.mark.parametrize(
    ("device", "count", "slug"), [("NVIDIA H100 80GB HBM3", 1, "h100"), ("NVIDIA H200", 2, "h200x2"), ("cpu", 1, "cpu")]
)
def test_files_are_named_after_devices(device, count, slug):
    assert report.slug({"device": device, "devices": count}) == slug


def test_a_shape_is_measured():
    """Measures a method, one with a baseline, one that is too large to run, and one that runs out of memory."""

    def fails(*operands):
        raise RuntimeError("out of memory")

    def logits(hidden, kernel, labels):
        return hidden @ kernel

    small = Problem(
        str(SHAPE),
        functools.partial(problem.operands, SHAPE, "float32"),
        problem.head_floors(SHAPE)[1:],
        [
            Method("own", logits, floor=ONE, bound=Bound((ONE,), 8), first_call=True),
            Method("other", logits, floor=None, baseline="own"),
            Method("large", logits, floor=ONE, memory_only=True),
        ],
    )
    programs = measure.Programs([small], time_first_calls=True)
    with tqdm(disable=True) as progress:
        records = measure.measure_methods(small, programs, 1e9, Effort(1, 0), progress)
    result = {record["name"]: record for record in records}
    assert list(result) == [ONE, "own", "large", "other"]
    assert result["own"]["of_floor"] > 0
    assert result["own"]["first_call"]["all"] > 0
    assert result["other"]["baseline"] == "own"
    assert "milliseconds" not in result["large"]
    assert result["large"]["extra_mib"] == result["own"]["extra_mib"]
    assert measure._time_what_fits(small, {"fails": Timed(fails)}, Effort(1, 0)) == {}


def test_plain_jax_computes_what_the_operation_does():
    @jax.jit
    def losses():
        operands = problem.operands(SHAPE, "float32", "float32")
        ways = (methods.plain_loss(*operands, "float32"), methods.checkpointed_chunks(*operands, chunk=8))
        return reference.fused_linear_cross_entropy(*operands), ways

    expected, result = losses()
    np.testing.assert_allclose(result, [expected] * 2, rtol=1e-5)


def test_times_are_those_of_one_repetition():
    record = {"milliseconds": 8.0, "bound_milliseconds": 4.0, "bursts": [8.0, 12.0]}
    assert measure._of_one(record, 4) == {"milliseconds": 2.0, "bound_milliseconds": 1.0, "bursts": [2.0, 3.0]}


def test_backends_of_an_operation_have_the_same_results():
    for each in operations.problems():
        shapes = jax.eval_shape(functools.partial(each.operands, ""))
        results = {}
        for method in each.methods:
            if method.about["backend"] != "copy":
                found = jax.tree.leaves(jax.eval_shape(method.function, *shapes))
                results.setdefault(method.about["direction"], []).append(found)
        assert results
        assert all(found == others[0] for others in results.values() for found in others), each.shape


def test_a_cpu_measures_one_small_shape():
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU measures all shapes")
    for what in (head, chunk_sizes, logprobs):
        assert [one.shape for one in what.problems()] == [head.CPU_SHAPE]


def test_methods_of_a_line_differ_in_a_setting():
    """Of these, a table and a plot show speed against memory."""
    for what in (chunk_sizes, logprobs):
        (one, *_) = what.problems()
        lines = [(m.about["line"], m.about["setting"]) for m in one.methods if "line" in m.about]
        assert 1 < len(lines) == len(set(lines))
