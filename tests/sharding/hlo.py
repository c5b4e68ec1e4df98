"""Collectives, as compiled text has them."""

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast)(-start)?\("
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_BODY = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One array that one collective makes.

    Attributes:
      kind: such as `"all-reduce"`.
      dtype: such as `"f32"`.
      shape: on one device.
      in_loop: whether a loop's body has it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    in_loop: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def collectives(text: str) -> list[Collective]:
    """Every array that a collective makes; several, where XLA has combined collectives into one."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations.setdefault(header[1], [])
        else:
            lines.append(line)

    in_loops: set[str] = set()
    reached = [body for lines in computations.values() for line in lines for body in _BODY.findall(line)]
    while reached:
        name = reached.pop()
        if name in in_loops:
            continue
        in_loops.add(name)
        reached += [called for line in computations[name] for called in _NAME.findall(line) if called in computations]

    found = []
    for name, lines in computations.items():
        for match in filter(None, map(_COLLECTIVE.search, lines)):
            shapes = _SHAPE.findall(match[1])
            # What is started has its operands beside its results, and ahead of them; all-reduces sometimes have not.
            if match[3] and (match[2] != "all-reduce" or match[1].startswith("((")):
                shapes = shapes[len(shapes) // 2 :]
            for dtype, sides in shapes:
                shape = tuple(int(side) for side in sides.split(",") if side)
                found.append(Collective(match[2], dtype, shape, name in in_loops))
    return found
