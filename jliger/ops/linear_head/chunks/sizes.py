"""The number of tokens per chunk and of columns per block: the fastest measured sizes within the memory bounds."""

from typing import Any

from jax import export

from jliger.ops.linear_head.types import HeadConfig


def forward_chunk(config: HeadConfig, num_tokens: int, vocab: int) -> int:
    """Tokens per chunk in the fused pass, which computes all columns.

    Each chunk reads and writes the float32 sum of kernel gradients. On an H200, the kernel-gradient product takes
    longer than that from about 735 tokens on. The minimum of 2048 is well above; the size grows up to 8192 while logits
    and their gradients take less than 1 GiB.
    """
    return even_chunk(num_tokens, _most_tokens(config, vocab))


def rows_of_chunk(config: HeadConfig, num_rows: int, length: int, vocab: int) -> tuple[int, int]:
    """Tokens per chunk, and the most rows, for rows of `length` tokens that must not be split.

    A chunk has room for as many whole rows as `forward_chunk` has tokens for, and at least one. It may have four times
    as many rows, if few of their tokens count.
    """
    rows = max(1, _most_tokens(config, vocab) // length)
    if is_symbolic(num_rows):
        return rows * length, 4 * rows
    rows = -(-num_rows // -(-num_rows // rows))
    return rows * length, min(num_rows, 4 * rows)


def _most_tokens(config: HeadConfig, vocab: int) -> int:
    return config.chunk_size or _within(config, vocab, gpu=(28, 2048, 8192), other=(23, 128, 1024))


def stats_chunk(config: HeadConfig, num_tokens: int, vocab: int) -> int:
    """Tokens per chunk for statistics within the recompute pass's memory: all columns, 0.5 GiB of logits."""
    return even_chunk(
        num_tokens, config.chunk_size or _within(config, vocab, gpu=(28, 128, 8192), other=(23, 128, 1024))
    )


def recompute_tile(config: HeadConfig, num_tokens: int, vocab: int) -> tuple[int, int]:
    """Tokens per chunk and columns per block in the recompute pass.

    Each chunk adds to the gradient of the whole kernel, so chunks are large, to have few of them. Blocks have as many
    columns as then fit in about 0.5 GiB, together with the chunk's hidden states and their gradient.
    """
    on_gpu = config.implementation == "triton"
    chunk = even_chunk(num_tokens, config.chunk_size or (8192 if on_gpu else 1024))
    most = max(1024, floor_power_of_two((2**26 if on_gpu else 2**21) // chunk) * 11 // 16)
    num_blocks = -(-vocab // most)
    return chunk, min(vocab, round_up(-(-vocab // num_blocks), 128))


def selection_tile(config: HeadConfig, num_tokens: int, vocab: int) -> tuple[int, int]:
    """Tokens per chunk and columns per block, to select columns of a kernel that is cast block by block.

    Each chunk casts the kernel, so chunks are large; each block costs a selection of its own, so blocks are large, too.
    Logits take 0.5 GiB.
    """
    on_gpu = config.implementation == "triton"
    chunk = even_chunk(num_tokens, config.chunk_size or (8192 if on_gpu else 1024))
    num_blocks = -(-vocab // max(1024, (2**28 if on_gpu else 2**23) // chunk))
    return chunk, min(vocab, round_up(-(-vocab // num_blocks), 128))


def saved_tokens(config: HeadConfig, num_tokens: int, vocab: int, shares: int) -> int:
    """How many tokens' logits fit in a share of `config.logits_budget`; the same for both implementations."""
    assert config.logits_budget is not None
    most = config.logits_budget // (shares * vocab * config.logits_dtype.itemsize)
    if not is_symbolic(num_tokens) and num_tokens <= most:
        return num_tokens
    return most // 8 * 8


def part_sizes(chunk: int) -> tuple[int, ...]:
    """The sizes for which a chunk is compiled, so that a partly filled chunk takes less time than a full one."""
    if chunk < 1024:
        return (chunk,)
    return (*(round_up(chunk * quarter // 4, 128) for quarter in (1, 2, 3)), chunk)


def even_chunk(num_tokens: int, most: int) -> int:
    """The size of chunks, at most `most`, that splits `num_tokens` evenly into the fewest; `most` if it is symbolic."""
    if is_symbolic(num_tokens):
        return most
    num_chunks = max(1, -(-num_tokens // most))
    return min(most, round_up(-(-num_tokens // num_chunks), 8))


def is_symbolic(size: Any) -> bool:
    """Whether a size is symbolic: known only when an exported program is called. Chunk sizes must not depend on it."""
    return export.is_symbolic_dim(size)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def floor_power_of_two(size: int) -> int:
    return 1 << (max(1, size).bit_length() - 1)


def _within(config: HeadConfig, vocab: int, gpu: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """The largest power of two of tokens with at most `2 ** log_logits` logits, but within `[least, most]`."""
    log_logits, least, most = gpu if config.implementation == "triton" else other
    return min(most, max(least, floor_power_of_two(2**log_logits // vocab)))
