"""Tests that blocks of columns cover each column exactly once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jliger.ops.linear_head.chunks.packed_tokens import Chunk
from jliger.ops.linear_head.chunks.vocab_blocks import Blocks
from jliger.ops.linear_head.types import Head, HeadConfig
from jliger.ops.logits import StatsWanted


@pytest.mark.parametrize(
    ("vocab", "vocab_size"),
    [(100, None), (128, None), (129, None), (250, None), (256, None), (301, None), (301, 250), (301, 100)],
)
def test_each_column_is_in_one_block(vocab, vocab_size):
    config = HeadConfig(
        kernel_layout="vh", logit_scale=1.0, logit_softcap=None, logits_dtype=jnp.dtype("float32"), precision=None,
        chunk_size=None, implementation="xla", compute_capability=None, stats_wanted=StatsWanted(),
        vocab_size=vocab_size,
    )  # fmt: skip
    columns = jnp.arange(vocab, dtype=jnp.float32)
    blocks = Blocks.make(config, Head(columns[:, None], columns, None), jnp.float32, 8, min(vocab, 128))
    real = vocab_size or vocab
    labels = jnp.asarray([real - 1])
    chunk = Chunk(slots=jnp.zeros(1, jnp.int32), hidden=jnp.zeros((1, 8)), labels=labels, adapted=None, teacher=None)

    def step(span, carry):
        head, block = blocks.block(span, chunk)
        # After padding, widths are multiples of 64. The label is a column of the last block only.
        assert head.kernel.shape[0] == block.bias.size == span.width + (-span.width % 64 if span.width % 8 else 0)
        count, kernel, bias, label_column = carry
        return (
            blocks.write(count, jnp.ones(span.width), span, 0, add=True),
            blocks.write(kernel, head.kernel, span, 0, add=False),
            blocks.write(bias, block.bias, span, 0, add=False),
            label_column + jnp.where((block.labels >= 0) & (block.labels < span.width), block.labels + span.start, 0),
        )

    result = blocks.sweep(step, (jnp.zeros(vocab), jnp.zeros((vocab, 8)), jnp.zeros(vocab), jnp.zeros(1, jnp.int32)))
    count, kernel, bias, label_column = map(np.asarray, result)
    # Nothing is written to columns that do not exist.
    columns = np.where(columns < real, columns, 0)
    np.testing.assert_array_equal(count, np.arange(vocab) < real)
    np.testing.assert_array_equal(bias, columns)
    np.testing.assert_array_equal(kernel, columns[:, None] * (np.arange(8) == 0))
    np.testing.assert_array_equal(label_column, labels)
