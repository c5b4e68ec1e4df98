"""A task whose answers can be checked: to close brackets. `([{(=` is completed by `)}])`."""

from dataclasses import dataclass

import numpy as np

OPENING, CLOSING, END = "([{<", ")]}>", "="


@dataclass(frozen=True)
class Brackets:
    """Prompts of `depth` opening brackets and `=`; an answer closes them, the last one first.

    Tokens are the opening brackets, the closing ones, `=`, and any others that a vocabulary has.
    """

    depth: int
    kinds: int

    @property
    def tokens(self) -> int:
        return 2 * self.kinds + 1

    def prompts(self, count: int, random: np.random.Generator) -> np.ndarray:
        """`[count, depth + 1]` tokens."""
        brackets = random.integers(0, self.kinds, (count, self.depth))
        return np.pad(brackets, ((0, 0), (0, 1)), constant_values=2 * self.kinds).astype(np.int32)

    def rewards(self, tokens: np.ndarray) -> np.ndarray:
        """The share of brackets that are right, `[count]`, in prompts with completions `[count, 2 * depth + 1]`."""
        opening, completions = tokens[:, : self.depth], tokens[:, self.depth + 1 :]
        return np.mean(opening[:, ::-1] + self.kinds == completions, axis=1, dtype=np.float32)

    def text(self, tokens: np.ndarray) -> str:
        """Tokens as text, with `·` for those that are not the task's."""
        names = OPENING[: self.kinds] + CLOSING[: self.kinds] + END
        return "".join(names[token] if token < len(names) else "·" for token in tokens)
