"""Tests shifted labels against labels shifted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jliger

LENGTH = 7


def by_hand(tokens, mask, by, segment_ids, ignore_index):
    """Labels computed in a Python loop, with segment 0 as padding."""
    labels = np.full_like(tokens, ignore_index)
    for row in np.ndindex(tokens.shape[:-1]):
        for here in range(tokens.shape[-1] - by):
            same = segment_ids is None or 0 != segment_ids[row][here] == segment_ids[row][here + by]
            if same and (mask is None or mask[row][here + by]):
                labels[row][here] = tokens[row][here + by]
    return labels


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by", [0, 1, 3, LENGTH, LENGTH + 2])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_against_shifting_by_hand(batch, by, masked, packed):
    random = np.random.default_rng(by)
    tokens = random.integers(0, 50, (*batch, LENGTH)).astype(np.int32)
    mask = random.random(tokens.shape) < 0.6 if masked else None
    segment_ids = np.sort(random.integers(0, 3, tokens.shape), axis=-1) if packed else None
    result = jax.jit(lambda *arrays: jliger.shift_labels(*arrays[:2], by, segment_ids=arrays[2], ignore_index=-7))(
        tokens, mask, segment_ids
    )
    np.testing.assert_array_equal(result, by_hand(tokens, mask, by, segment_ids, -7))
    assert result.dtype == jnp.int32


def test_several_distances():
    random = np.random.default_rng(0)
    tokens, mask = random.integers(0, 50, (3, LENGTH)), random.random((3, LENGTH)) < 0.5
    result = jliger.shift_labels(tokens, mask, by=range(1, 4))
    np.testing.assert_array_equal(result, [jliger.shift_labels(tokens, mask, by=by) for by in (1, 2, 3)])


def test_padding_segment():
    tokens, segment_ids = np.array([5, 6, 7, 8, 9, 0, 0, 0]), np.array([1, 1, 2, 2, 2, 0, 0, 0])
    for options, right in (
        ({}, [6, -100, 8, 9, -100, -100, -100, -100]),
        ({"by": 0}, [5, 6, 7, 8, 9, -100, -100, -100]),
        ({"by": [0]}, [[5, 6, 7, 8, 9, -100, -100, -100]]),
        ({"padding_segment": None}, [6, -100, 8, 9, -100, 0, 0, -100]),
        ({"padding_segment": 2}, [6, -100, -100, -100, -100, 0, 0, -100]),
    ):
        assert jliger.shift_labels(tokens, segment_ids=segment_ids, **options).tolist() == right


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int16"])
def test_ignore_index_always_fits(dtype):
    result = jliger.shift_labels(np.array([1, 2, 100], dtype))
    assert result.tolist() == [2, 100, -100]


@pytest.mark.parametrize(
    ("error", "says", "arguments"),
    [
        (ValueError, "by got -1", {"by": -1}),
        (ValueError, "by got no distances", {"by": []}),
        (TypeError, "mask got dtype int32", {"mask": np.ones((2, 3), np.int32)}),
        (ValueError, r"mask got shape \(3,\)", {"mask": np.ones(3, bool)}),
        (ValueError, r"segment_ids got shape \(2, 1\)", {"segment_ids": np.ones((2, 1), int)}),
        (TypeError, "segment_ids got dtype bool", {"segment_ids": np.ones((2, 3), bool)}),
        (TypeError, "padding_segment got '0'", {"segment_ids": np.ones((2, 3), int), "padding_segment": "0"}),
        (TypeError, "tokens got dtype float32", {"tokens": np.ones((2, 3), np.float32)}),
        (ValueError, "tokens got a scalar", {"tokens": 3}),
    ],
)
def test_what_is_refused(error, says, arguments):
    with pytest.raises(error, match=says):
        jliger.shift_labels(**{"tokens": np.ones((2, 3), np.int32), **arguments})
