"""The tables of docs/study.md: whole training steps by examples/study.py, each operation by jliger or by plain XLA."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumulation_tables import memory_of
from cells import NOTHING, markdown, percent

Record = dict[str, Any]
GIB = 2**30
SWITCHES = {
    "rope": "rotary embeddings",
    "swiglu": "SwiGLU",
    "rms_norm": "RMS norms",
    "flce": "fused linear cross entropy",
    "tiled_mlp": "MLP in chunks",
}
MODELS = {"0.6b": "Qwen3-0.6B", "1b": "Llama 3.2 1B", "8b": "Llama 3 8B"}


def kind(table: Callable[[list[Record]], str]) -> Callable[[Path, Path], str]:
    """A kind of table: of the records of a results file, with what they were measured with."""

    def with_environment(path: Path, page: Path) -> str:
        del page
        result = json.loads(path.read_text(encoding="utf-8"))
        about = result["environment"]
        names = ("jax", "jaxlib", "jax-triton", "triton")
        versions = ", ".join(f"{name} {about['versions'][name]}" for name in names)
        return f"{table(result['records'])}\n\nMeasured on {about['device']}, driver {about['driver']}, {versions}."

    return with_environment


def name_of(record: Record) -> str:
    """The operations that jliger computes."""
    kernels = record["kernels"]
    if len(kernels) > 1:
        return "all but the MLP in chunks"
    return SWITCHES[kernels[0]] if kernels else "none"


def figures(record: Record | None) -> list[str]:
    """Time, speed and memory."""
    if record is None:
        return [NOTHING] * 3
    if record["out_of_memory"]:
        return [NOTHING, NOTHING, "out of memory"]
    peak = f"{memory_of(record) / GIB:.1f}"
    return [f"{record['milliseconds']:.1f}", f"{record['tokens_per_second']:,.0f}", peak]


def switches(records: list[Record]) -> str:
    """Each operation alone, and all, against none, where each was measured alone."""
    rows = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in records if len(r["kernels"]) == 1):
        own = [
            r for r in records if (r["model"], r["batch"]) == (model, batch) and not r["is_remat"] | len(r["offload"])
        ]
        by_name = {name_of(record): record for record in own}
        none = by_name["none"]
        for name in ("none", *SWITCHES.values(), name_of({"kernels": SWITCHES})):
            record = by_name[name]
            more = [NOTHING] * 2
            if name != "none" and not record["out_of_memory"] and not none["out_of_memory"]:
                speed = record["tokens_per_second"] / none["tokens_per_second"]
                more = [f"{speed:.3f}", percent(1 - memory_of(record) / memory_of(none))]
            rows.append([MODELS[model], str(batch), name, *figures(record), *more])
    headings = ("model", "sequences", "by jliger", "ms a step", "tokens/s", "peak GiB", "times as fast", "memory saved")
    return markdown(headings, rows, left=3)


def batches(records: list[Record]) -> str:
    """None and all by batch, with and without computing layers again."""
    at = {
        (r["model"], r["is_remat"], r["batch"], bool(r["kernels"])): r
        for r in records
        if len(r["kernels"]) != 1 and not r["offload"]
    }
    rows = []
    for model, is_remat, batch in dict.fromkeys(key[:3] for key in at):
        both = [at.get((model, is_remat, batch, is_all)) for is_all in (False, True)]
        faster, saved = NOTHING, NOTHING
        if all(record is not None and not record["out_of_memory"] for record in both):
            none, own = both
            faster = f"{own['tokens_per_second'] / none['tokens_per_second']:.3f}"
            saved = percent(1 - memory_of(own) / memory_of(none))
        cells = [cell for record in both for cell in figures(record)[1:]]
        rows.append([MODELS[model], "yes" if is_remat else "no", str(batch), *cells, faster, saved])
    headings = ("model", "remat", "sequences", "XLA, tokens/s", "XLA, peak GiB", "jliger, tokens/s", "jliger, peak GiB")
    return markdown((*headings, "times as fast", "memory saved"), rows, left=3)


def largest(records: list[Record]) -> str:
    """The fastest configuration of each side that fits, whatever the batch."""
    rows = []
    for model in dict.fromkeys(r["model"] for r in records if not r["offload"]):
        best = []
        for is_all in (False, True):
            own = [
                r
                for r in records
                if r["model"] == model
                and len(r["kernels"]) != 1
                and bool(r["kernels"]) == is_all
                and not r["offload"]
                and not r["out_of_memory"]
            ]
            for is_remat in (False, True):
                fitting = [r for r in own if r["is_remat"] == is_remat]
                if fitting:
                    record = max(fitting, key=lambda r: r["batch"])
                    side = "jliger" if is_all else "plain XLA"
                    rows.append(
                        [MODELS[model], side, "yes" if is_remat else "no", str(record["batch"]), *figures(record)[1:]]
                    )
        del best
    return markdown(("model", "by", "remat", "largest batch measured", "tokens/s", "peak GiB"), rows, left=3)
