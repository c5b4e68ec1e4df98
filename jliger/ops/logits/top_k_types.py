"""Arguments and results of the row functions for the largest logits of a row, and for columns that a teacher names."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

# The most columns that `top_k` selects: the Triton kernel keeps its candidates in registers.
MOST_COLUMNS = 256

# The id of a place without a column, in a block that has fewer than k columns. It sorts after every column.
NO_COLUMN = 2**31 - 1


class TopLogits(NamedTuple):
    """The largest logits of each row, from the largest to the smallest; of equal ones, the lower id first.

    Attributes:
      ids: their columns; `NO_COLUMN` where the block has fewer than k columns.
      logits: their values; −inf where the block has fewer than k columns.
    """

    ids: Int[Array, "*B k"]
    logits: Float[Array, "*B k"]


class TopKStats(NamedTuple):
    """The largest logits of each row, and the statistics of all logits that make them log-probabilities.

    Attributes:
      top: the largest logits.
      max, log_sum: as in `jliger.ops.logits.RowStats`.
    """

    top: TopLogits
    max: Float[Array, "*B"]
    log_sum: Float[Array, "*B"]
