"""How many tokens a chunk holds and how many columns a block: what measured best within the memory that is promised."""

from typing import Any

from jax import export

from jliger.ops.linear_head.types import HeadConfig


def forward_chunk(config: HeadConfig, num_tokens: int, vocab: int) -> int:
    """Tokens a chunk in the forward form, over the whole vocabulary.

    Sums of kernel gradients hide behind their product from about 735 tokens on (on an H200), which 2048 leave far
    behind; more, up to 8192, as long as logits and their gradients stay below 1 GiB.
    """
    return even_chunk(
        num_tokens, config.chunk_size or _within(config, vocab, gpu=(28, 2048, 8192), other=(23, 128, 1024))
    )


def stats_chunk(config: HeadConfig, num_tokens: int, vocab: int) -> int:
    """Tokens a chunk for stats within the recompute form's memory, over the whole vocabulary: 0.5 GiB of logits."""
    return even_chunk(
        num_tokens, config.chunk_size or _within(config, vocab, gpu=(28, 128, 8192), other=(23, 128, 1024))
    )


def recompute_tile(config: HeadConfig, num_tokens: int, vocab: int) -> tuple[int, int]:
    """Tokens a chunk and columns a block in the recompute form.

    Each chunk adds to the whole kernel's gradient, so chunks are large; blocks are what then fits in about 0.5 GiB,
    next to hidden states and their gradient.
    """
    on_gpu = config.implementation == "triton"
    chunk = even_chunk(num_tokens, config.chunk_size or (8192 if on_gpu else 1024))
    most = max(1024, floor_power_of_two((2**26 if on_gpu else 2**21) // chunk) * 11 // 16)
    num_blocks = -(-vocab // most)
    return chunk, min(vocab, round_up(-(-vocab // num_blocks), 128))


def part_sizes(chunk: int) -> tuple[int, ...]:
    """The sizes a large chunk can be computed in, so that one that is not full costs less than one that is."""
    if chunk < 1024:
        return (chunk,)
    return (*(round_up(chunk * quarter // 4, 128) for quarter in (1, 2, 3)), chunk)


def even_chunk(num_tokens: int, most: int) -> int:
    """Chunks of at most `most` tokens, as many as that needs, all of one size; `most` if `num_tokens` is symbolic."""
    if is_symbolic(num_tokens):
        return most
    num_chunks = max(1, -(-num_tokens // most))
    return min(most, round_up(-(-num_tokens // num_chunks), 8))


def is_symbolic(size: Any) -> bool:
    """Whether a size is known only when an exported program is called. Sizes of chunks and loops then must not be."""
    return export.is_symbolic_dim(size)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def floor_power_of_two(size: int) -> int:
    return 1 << (max(1, size).bit_length() - 1)


def _within(config: HeadConfig, vocab: int, gpu: tuple[int, int, int], other: tuple[int, int, int]) -> int:
    """The power of two of tokens that makes `2 ** log_logits` logits, between `least` and `most`."""
    log_logits, least, most = gpu if config.implementation == "triton" else other
    return min(most, max(least, floor_power_of_two(2**log_logits // vocab)))
