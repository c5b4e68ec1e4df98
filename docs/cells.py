"""What tables are made of."""

from collections.abc import Iterable, Sequence

NOTHING = "–"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose columns after the first `left` are aligned to the right."""
    rules = ["---" if i < left else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rules, *rows))


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def mib(amount: float | None) -> str:
    return NOTHING if amount is None else f"{amount:,.0f}"
