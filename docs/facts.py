"""The README's facts, each from a result file."""

import json
import statistics
from pathlib import Path
from typing import Any

Record = dict[str, Any]

OWN = "jliger, float32 kernel"


def facts(folder: Path, page: Path) -> str:
    """A list of what was measured, by subject."""
    del page
    found = [
        *head(_read(folder / "head_h100.json")),
        skipped(_read(folder / "skip_gradients_h200.json")),
        float8(_read(folder / "float8_h200.json"), _read(folder / "float8_training_h200.json")),
        long_context(_read(folder / "gradient_accumulation_h200.json")["long_context"]),
        post_training(_read(folder / "post_training_h100.json")),
        mesh(_read(folder / "train_sharded_h200x4_816.json"), _read(folder / "train_sharded_h200x4_largest.json")),
    ]
    return "\n".join(f"- {fact}" for fact in found)


def head(result: Record) -> list[str]:
    """Memory at the most tokens, and speed at the main shape beside other libraries."""
    most, main = (at_shape(result, shape) for shape in ("(131072, 4096, 128256)", "(8192, 4096, 128256)"))
    own, plain, fused = most[OWN], plain_jax(most), main[OWN]
    others = {
        "tokamax": main["tokamax, default"],
        "Cut Cross-Entropy": main["Cut Cross-Entropy, default (filter)"],
        "PyTorch Liger": main["PyTorch Liger, default (chunk_mem_const=1)"],
    }
    times = ", ".join(f"{name} {other['milliseconds']:.0f}" for name, other in others.items())
    return [
        f"**Memory.** Loss and gradients of 131,072 tokens need {own['extra_mib'] / 1024:.1f} GiB beside arguments and "
        f"results; with full logits in bfloat16, {plain['extra_mib'] / 1024:.1f} GiB by the compiler's account "
        "(H = 4096, V = 128256).",
        f"**Speed.** 8,192 tokens take {fused['milliseconds']:.0f} ms on an H100 at the same sizes, "
        f"{100 * fused['of_floor']:.0f} % of the speed of the matrix products alone. With default settings {times} ms; "
        f"PyTorch Liger with its best chunk budget {fastest_liger(main)['milliseconds']:.0f} ms.",
    ]


def at_shape(result: Record, shape: str) -> dict[str, Record]:
    """The records of one shape, by the method's name."""
    return {record["name"]: record for record in result["records"] if record["shape"] == shape}


def plain_jax(at: dict[str, Record]) -> Record:
    """Full logits in bfloat16."""
    return next((r for name, r in at.items() if name.startswith("plain JAX") and "bfloat16 logits" in name), {})


def fastest_liger(at: dict[str, Record]) -> Record:
    """PyTorch Liger with the best of its chunk budgets, as it sums gradients by default."""
    budgets = [r for name, r in at.items() if name.startswith("PyTorch Liger") and "float32" not in name]
    return min(budgets, key=lambda record: record["milliseconds"], default={})


def skipped(result: Record) -> str:
    """What skipping small gradients saves at the end of the training that was measured."""
    last = max(record["step"] for record in result["records"])
    at = {r["limit"]: r for r in result["records"] if r["step"] == last and r["kernel"] == "float32"}
    whole, fast = at[None], at[2**-12]
    return (
        "**Half the time.** With `skip_gradients_below=2**-12` the same takes "
        f"{fast['milliseconds']:.0f} ms instead of {whole['milliseconds']:.0f} "
        f"(one H200, a model after {last:,} steps). "
        f"Gradients are off by {100 * fast['kernel_error']:.1f} % (kernel) and {100 * fast['hidden_error']:.1f} % "
        "(hidden states); "
        "[three seeds](docs/skip_gradients.md) learned as much as without, within their spread."
    )


def float8(result: Record, trained: Record) -> str:
    """What 8-bit products save, and how held-out losses differ after training with them, seed by seed."""
    at = at_shape(result, "(8192, 4096, 128256)")
    whole, fast = at[OWN], at["jliger, float8, float32 kernel"]
    losses = {(r["variant"], r["seed"]): list(r["heldout"].values())[-1] for r in trained["records"]}
    seeds = {seed for _, seed in losses}
    above = [100 * (losses["float8", seed] / losses["bfloat16", seed] - 1) for seed in seeds]
    error = statistics.stdev(above) / len(above) ** 0.5
    return (
        f'**8-bit products.** With `products="float8"` it takes {fast["milliseconds"]:.0f} ms instead of '
        f"{whole['milliseconds']:.0f}, {fast['of_floor']:.1f} times the speed of the matrix products alone in bfloat16 "
        f"(one H200). Trained with it, {len(seeds)} small models ended {signed(statistics.mean(above))} ± {error:.2f} "
        "% from the held-out loss without it. Its gradients are [less exact](docs/float8.md#errors)."
    )


def signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")


def long_context(section: Record) -> str:
    """A whole step on the longest sequence."""
    records = [record for record in section["records"] if not record["out_of_memory"]]
    longest = max(record["length"] for record in records if record["head"] == "full")
    at = {record["head"]: record for record in records if record["length"] == longest}
    full, fused = at["full"], at["jliger"]
    return (
        f"**Long context.** A training step of Llama 3.2 1B on one sequence of {longest:,} tokens peaks at "
        f"{fused['peak_bytes'] / 2**30:.0f} GiB instead of {full['peak_bytes'] / 2**30:.0f} GiB, at "
        f"{fused['tokens_per_second']:,.0f} tokens/s instead of {full['tokens_per_second']:,.0f} "
        "(bfloat16 parameters and moments, one H200)."
    )


def post_training(result: Record) -> str:
    """Steps of DPO, with as many sequences as full logits fit, and of GRPO, where full logits do not fit."""
    at = {(record["loss"], record["head"]): record for record in result["records"]}
    full, fused, grpo = at["dpo", "full"], at["dpo", "jliger"], at["grpo", "jliger"]
    assert at["grpo", "full"]["out_of_memory"]
    saved = 1 - fused["peak_bytes"] / full["peak_bytes"]
    speed = fused["tokens_per_second"] / full["tokens_per_second"]
    return (
        f"**Preferences, reinforcement learning.** A DPO step of Llama 3.2 1B on "
        f"{fused['sequences'] * fused['length']:,} tokens peaks at {fused['peak_bytes'] / 2**30:.0f} GiB instead of "
        f"{full['peak_bytes'] / 2**30:.0f} GiB, {100 * saved:.0f} % less, at {100 * speed:.0f} % of the speed (one "
        f"H100). A GRPO step on {grpo['sequences'] * grpo['length']:,} tokens does not fit there with full logits; "
        f"jliger's peaks at {grpo['peak_bytes'] / 2**30:.0f} GiB."
    )


def mesh(result: Record, largest: Record) -> str:
    """A step of both heads at the largest batch that was measured with both, and the largest batches that fit."""
    steps = {(r["head"], r["batch"]): r for r in result["records"]}
    batch = max(number for head, number in steps if head == "full" and ("jliger", number) in steps)
    full, fused = steps["full", batch], steps["jliger", batch]
    saved = 1 - fused["memory_bytes"]["total"] / full["memory_bytes"]["total"]
    fitted = {
        head: max(r["batch"] for r in largest["records"] if r["head"] == head and not r["out_of_memory"])
        for head in ("full", "jliger")
    }
    return (
        f"**Several GPUs.** A training step of Llama 3 8B on {batch} sequences of {full['length']} tokens, on four "
        f"H200s, takes {100 * saved:.0f} % less memory than with full logits, at {fused['tokens_per_second']:,.0f} "
        f"tokens/s instead of {full['tokens_per_second']:,.0f}. Batches of up to {fitted['jliger']:,} sequences fit "
        f"instead of {fitted['full']:,}."
    )


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))
