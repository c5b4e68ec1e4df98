"""Pictures of words, and an encoder of their patches, in the way of Qwen2-VL.

An image is cut into square patches, which see each other and have two positions each, row and column. A projector makes
a token of the language model of each patch.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import jliger

Tree = Any
# Pixels from one letter to the next, and the font's size.
PITCH, FONT_SIZE = 8, 14


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of an image, its patches in pixels, and the encoder."""

    height: int = 16
    width: int = 48
    patch: int = 8
    size: int = 64
    heads: int = 4
    layers: int = 2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def longest_word(self) -> int:
        return self.width // PITCH - 1


def words_of(documents: Sequence[str], shortest: int, longest: int, most: int) -> list[str]:
    """The commonest words of so many letters, without those that occur once."""
    counts = Counter(word for text in documents for word in re.findall(r"\b[a-z]+\b", text.lower()))
    return [word for word, n in counts.most_common() if n > 1 and shortest <= len(word) <= longest][:most]


@lru_cache
def font() -> Any:
    """Pillow's own; to read it takes longer than to draw a word."""
    return ImageFont.load_default(FONT_SIZE)


def picture(config: VisionConfig, word: str, random: np.random.Generator) -> np.ndarray:
    """A word in light letters on dark ground, `[height, width]` in 0 to 1, with noise and not quite in its place."""
    image = Image.new("L", (config.width, config.height))
    draw = ImageDraw.Draw(image)
    x, y = PITCH / 2 + random.uniform(0, 1), config.height / 2 + random.uniform(-1, 1)
    for place, letter in enumerate(word):
        draw.text((x + PITCH * place, y), letter, fill=int(random.integers(160, 256)), font=font(), anchor="mm")
    pixels = np.asarray(image, np.float32) / 255
    return np.clip(pixels + random.normal(0, 0.05, pixels.shape), 0, 1).astype(np.float32)


def initial_encoder(config: VisionConfig, hidden_size: int, key: jax.Array) -> Tree:
    size, layers = config.size, config.layers
    shapes = {
        "patches": (config.patch**2, size),
        "layers": {
            "qkv": (layers, size, 3 * size),
            "attention_out": (layers, size, size),
            "up": (layers, size, 4 * size),
            "down": (layers, 4 * size, size),
        },
        "projector": {"up": (size, 2 * hidden_size), "down": (2 * hidden_size, hidden_size)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    # All numbers at once: XLA compiles one random generator for each call.
    ends = np.cumsum([np.prod(shape) for shape in leaves])
    parts = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    params = tree.unflatten(part.reshape(shape) * shape[-2] ** -0.5 for part, shape in zip(parts, leaves, strict=True))
    params["layers"] |= {f"{name}_norm": jnp.ones((layers, size)) for name in ("attention", "mlp")}
    return params | {"norm": jnp.ones(size)}


def rotary(config: VisionConfig, x: jax.Array) -> jax.Array:
    """Half of the pairs of `[B, N, heads, head size]` turns with a patch's row, half with its column."""
    pairs = x.shape[-1] // 4
    frequencies = np.kron(np.eye(2), 10.0 ** (-np.arange(pairs) / pairs))
    positions = jnp.asarray(np.indices(config.grid).reshape(2, 1, -1))
    return jliger.apply_rope(x, jnp.broadcast_to(positions, (2, *x.shape[:2])), frequencies=frequencies)


def layer(config: VisionConfig, x: jax.Array, weights: Tree) -> jax.Array:
    """`[B, N, E]` to `[B, N, E]`: every patch sees every patch."""
    normed = jliger.layer_norm(x, weights["attention_norm"])
    qkv = (normed @ weights["qkv"]).reshape(*x.shape[:2], 3, config.heads, -1)
    query, key, value = (qkv[:, :, i] for i in range(3))
    attended = jax.nn.dot_product_attention(rotary(config, query), rotary(config, key), value)
    x += attended.reshape(x.shape) @ weights["attention_out"]
    normed = jliger.layer_norm(x, weights["mlp_norm"])
    return x + jax.nn.gelu(normed @ weights["up"]) @ weights["down"]


def encode(config: VisionConfig, params: Tree, pixels: jax.Array) -> jax.Array:
    """Images `[B, height, width]` to tokens `[B, N, H]` of the language model, row by row."""
    (rows, columns), patch, batch = config.grid, config.patch, len(pixels)
    patches = pixels.reshape(batch, rows, patch, columns, patch).swapaxes(2, 3).reshape(batch, rows * columns, -1)
    body = partial(layer, config)
    x, _ = jax.lax.scan(lambda x, weights: (body(x, weights), None), patches @ params["patches"], params["layers"])
    normed = jliger.layer_norm(x, params["norm"])
    return jax.nn.gelu(normed @ params["projector"]["up"]) @ params["projector"]["down"]
