"""Tests the arguments of kernels and what kernels are compiled for, on a GPU and in the interpreter."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jliger.testing.launches import HAS_PLUGIN, launches, lowered, pointers, written_parameters
from jliger.testing.oracle import INTERPRETED, ON_GPU

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from jliger.core.triton_call import call_kernel  # noqa: E402

needs_plugin = pytest.mark.skipif(INTERPRETED or not HAS_PLUGIN, reason="lowering for a GPU needs jax-cuda13-plugin")
needs_triton = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="kernels run on a GPU or in the interpreter")


class Map(NamedTuple):
    scale: float
    offset: float | None


@triton.jit
def _apply(pointer, index, MAP: tl.constexpr):
    value = tl.load(pointer + index) * MAP.scale
    if MAP.offset is not None:
        value += MAP.offset
    return value


@triton.jit
def map_kernel(left_ptr, right_ptr, left_out_ptr, right_out_ptr, count_ptr, MAP: tl.constexpr):
    index = tl.program_id(0)
    if left_ptr is not None:
        tl.store(left_out_ptr + index, _apply(left_ptr, index, MAP))
    if right_out_ptr is not None:
        tl.store(right_out_ptr + index, -_apply(right_ptr, index, MAP))
    tl.store(count_ptr + index, index)


def call(left, right, logit_map):
    """Maps both arrays, and negates the right one; None stays None."""
    present = left if right is None else right
    count = jax.ShapeDtypeStruct(present.shape, jnp.int32)
    return call_kernel(
        map_kernel, [left, right], [left, right, count], name="map", grid=present.shape, num_warps=1, num_stages=1,
        compute_capability=90 if not ON_GPU else None, flops=0, bytes_accessed=0, MAP=logit_map,
    )  # fmt: skip


BOTH_MAPS = [Map(2.0, None), Map(2.0, 1.0)]


@needs_triton
@pytest.mark.parametrize("logit_map", BOTH_MAPS)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
def test_triton_reads_and_writes_what_there_is(given, logit_map):
    arrays = [jnp.arange(4.0) + 10 * side if is_given else None for side, is_given in enumerate(given)]
    *result, count = jax.jit(functools.partial(call, logit_map=logit_map))(*arrays)
    for sign, array, value in zip((1, -1), arrays, result, strict=True):
        assert (value is None) == (array is None)
        if array is not None:
            np.testing.assert_array_equal(value, sign * (array * 2 + (logit_map.offset or 0)))
    np.testing.assert_array_equal(count, np.arange(4))


@needs_plugin
def test_what_is_none_is_no_pointer_and_another_kernel():
    array = jax.ShapeDtypeStruct((4,), "float32")
    codes = []
    # The first combination again: the cache key must contain everything that a kernel is compiled for.
    for given in [(array, None), (None, array), (array, array), (array, None)]:
        for logit_map in BOTH_MAPS:
            (launch,) = launches(lowered(functools.partial(call, logit_map=logit_map), *given, capability=90))
            sides = 2 - given.count(None)
            assert (launch.operands, launch.results) == (sides, sides + 1)
            assert pointers(launch.ptx) == launch.operands + launch.results
            assert written_parameters(launch.ptx) == set(range(sides, 2 * sides + 1))
            codes.append(launch.ptx)
    assert codes[:2] == codes[-2:]
    assert len(set(codes)) == 6
