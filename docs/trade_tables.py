"""Tables and plots of methods that take more memory to be faster: speed against memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import NOTHING, markdown, mib, percent

Record = dict[str, Any]
OTHERS = ("plain JAX", "PyTorch Liger", "Cut Cross-Entropy")


def trade_table(path: Path, page: Path) -> str:
    """Methods that differ in one setting, and other libraries at the same shapes."""
    del page
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    shapes = dict.fromkeys(record["shape"] for record in records if "line" in record)
    rows = [
        [
            shape,
            r.get("line", r["name"]),
            f"`{r['setting']}`" if "=" in r.get("setting", "") else r.get("setting", NOTHING),
            f"{r['milliseconds']:.1f}",
            percent(r["of_floor"]),
            mib(r["extra_mib"]),
        ]
        for shape in shapes
        for r in records
        if r["shape"] == shape and "of_floor" in r and ("line" in r or r["name"].startswith(OTHERS))
    ]
    return markdown(("N, H, V", "method", "setting", "ms", "of the floor", "extra MiB"), rows, left=3)


def trade_plot(path: Path, page: Path) -> str:
    """The plot beside a result file."""
    picture = path.with_name(f"{path.stem}_trade.png")
    return f"![speed against extra memory]({os.path.relpath(picture, page.parent)})"


TRADE_KINDS: dict[str, Callable[[Path, Path], str]] = {"trade": trade_table, "trade_plot": trade_plot}
