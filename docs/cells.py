"""What tables are made of."""

from collections.abc import Iterable, Sequence

NOTHING = "–"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose columns after the first `left` are aligned to the right."""
    rules = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rules, *rows))


def percent(share: float | None) -> str:
    # + 0.0 makes 0 of -0.
    return NOTHING if share is None else f"{round(100 * share, 1) + 0.0:.1f} %"


def mib(amount: float | None) -> str:
    return NOTHING if amount is None else f"{amount:,.0f}"
