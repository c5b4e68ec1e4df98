"""What the examples of PyTorch Liger claim, beside what was measured here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import markdown, percent

Record = dict[str, Any]
NOT_MEASURED = "not measured"
HEADS = ("full", "jliger")


def _read(path: Path) -> Record | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def compared(full: Record, fused: Record) -> list[str]:
    """Cells for two steps of the same batch: memory saved, tokens per second gained."""
    memory = [each.get("peak_bytes") or each["memory_bytes"]["total"] for each in (full, fused)]
    return [
        percent(1 - memory[1] / memory[0]),
        f"{100 * (fused['tokens_per_second'] / full['tokens_per_second'] - 1):+.1f} %".replace("-", "−"),
    ]


def matched(records: Sequence[Record], **about: Any) -> list[Record]:
    """The records of full logits and of jliger at the largest batch that both fitted; none if there is none."""
    own = [r for r in records if not r["out_of_memory"] and all(r.get(key) == value for key, value in about.items())]
    at = {head: {r.get("batch", 0): r for r in own if r["head"] == head} for head in HEADS}
    shared = at["full"].keys() & at["jliger"].keys()
    return [at[head][max(shared)] for head in at] if shared else []


def row(about: str, claim: str, path: Path, where: str, find: Callable[[Record], list[Record]]) -> list[str]:
    """A line: what was measured, the claim, the saving, the gain, and the result file."""
    result = _read(path)
    pair = [] if result is None else find(result)
    if not pair:
        return [about, claim, NOT_MEASURED, NOT_MEASURED, ""]
    return [about, claim, *compared(*pair), f"{where}, `{path.parent.name}/{path.name}`"]


def steps_of_both(summary: Record) -> list[Record]:
    """The steps of a run of one of the examples."""
    return [
        {**summary["heads"][head], "tokens_per_second": 1 / summary["heads"][head]["step_seconds"]} for head in HEADS
    ]


def claims_table(folder: Path, page: Path) -> str:
    """Each claim with what was measured: memory and throughput of the same step with full logits and with jliger."""
    del page
    sharded_path, tuned = folder / "train_sharded_h200x4_816.json", folder / "finetune_h100.json"
    tuned_mesh, adapted = folder / "finetune_h200x4.json", folder / "finetune_lora_h200.json"
    posted, posted_mesh = folder / "post_training_h100.json", folder / "post_training_h200x4.json"
    medusa, medusa_largest = folder / "medusa_h200x4.json", folder / "medusa_h200x4_largest.json"
    vision = folder / "vlm_sft_h200_vocabulary.json"

    def every(result: Record) -> list[Record]:
        return matched(result["records"])

    def shape(name: str) -> Callable[[Record], list[Record]]:
        return lambda result: matched(result["records"], shape=name)

    def loss(name: str) -> Callable[[Record], list[Record]]:
        return lambda result: matched(result["records"], loss=name)

    def stage(number: int, heads: int) -> Callable[[Record], list[Record]]:
        return lambda result: matched(result["records"], medusa_heads=heads, stage=number)

    rows = [
        row("Llama 3 8B, FSDP, 512 tokens", "−40 %, +20 %", sharded_path, "4 × H200", every),
        row("Llama 3 8B, fine-tuning, FSDP, 512 tokens", "−40 %, +20 %", tuned_mesh, "4 × H200", shape("llama-3-8b")),
        row("Qwen2 7B, fine-tuning, FSDP, 512 tokens", "−50 %, +10 %", tuned_mesh, "4 × H200", shape("qwen2-7b")),
        row("Gemma 7B, fine-tuning, FSDP, 512 tokens", "−33 %, +24 %", tuned_mesh, "4 × H200", shape("gemma-7b")),
        row("Llama 3 8B, LoRA, 512 tokens", "", adapted, "H200", shape("llama-3-8b")),
        row("Qwen2 7B, LoRA, 512 tokens", "", adapted, "H200", shape("qwen2-7b")),
        row("Gemma 7B, LoRA, 512 tokens", "", adapted, "H200", shape("gemma-7b")),
        row("Gemma 2 2B, fine-tuning, 512 tokens", "", tuned, "H100", shape("gemma-2-2b")),
        row("Llama 3.2 1B, fine-tuning, 512 tokens", "", tuned, "H100", shape("llama-3.2-1b")),
        row("Qwen3 0.6B, fine-tuning, 512 tokens", "", tuned, "H100", shape("qwen3-0.6b")),
        row("Llama 3.2 1B, ORPO, 2,048 tokens", "−50 %", posted, "H100", loss("orpo")),
        row("Llama 3.2 1B, DPO, 2,048 tokens", "up to −80 %, losses after pretraining", posted, "H100", loss("dpo")),
        row("Llama 3.1 8B, ORPO, FSDP, 2,048 tokens", "", posted_mesh, "4 × H200", loss("orpo")),
        row("Llama 3.1 8B, GRPO, FSDP, 2,048 tokens", "", posted_mesh, "4 × H200", loss("grpo")),
        row("Medusa, Llama 3 8B, 3 heads, stage 1", "", medusa_largest, "4 × H200", stage(1, 3)),
        row("Medusa, Llama 3 8B, 5 heads, stage 1", "−80 %, +40 %", medusa, "4 × H200", stage(1, 5)),
        row("Medusa, Llama 3 8B, 3 heads, stage 2", "", medusa, "4 × H200", stage(2, 3)),
        row("Medusa, Llama 3 8B, 5 heads, stage 2", "−80 %, +40 %", medusa, "4 × H200", stage(2, 5)),
        row("Qwen2-VL's vocabulary, small model, images and text", "no figure", vision, "H200", steps_of_both),
        ["Llama 3 8B, Lightning, ZeRO-3, 8 GPUs", "−40 %, +15 %", NOT_MEASURED, NOT_MEASURED, ""],
    ]
    headings = (
        "model and step",
        "Liger's claim: memory, tokens/s",
        "memory saved here",
        "more tokens/s",
        "measured on",
    )
    files = (sharded_path, tuned_mesh, adapted, tuned, posted, posted_mesh, medusa, medusa_largest, vision)
    paths = [path for path in files if path.exists()]
    commands = "\n".join(f"- `{folder.name}/{path.name}`: `{_read(path)['environment']['command']}`" for path in paths)
    return f"{markdown(headings, rows, left=2)}\n\nThe commands:\n\n{commands}"


def small_claims_table(folder: Path, page: Path) -> str:
    """The same for the small examples, on a CPU."""
    del page
    rows = []
    if (medusa := _read(folder / "medusa_cpu.json")) is not None:
        for each in medusa["records"]:
            if "saved" in each:
                about = f"examples/medusa.py, {each['heads']} heads, stage {each['stage']}"
                rows.append([about, percent(each["saved"]), f"{100 * each['faster']:+.1f} %".replace("-", "−")])
    if (vlm := _read(folder / "vlm_sft_cpu.json")) is not None:
        full, fused = (vlm["heads"][head]["step_seconds"] for head in HEADS)
        saved = vlm["comparison"]["temporary_memory_saving_percent"] / 100
        rows.append(["examples/vlm_sft.py", percent(saved), f"{100 * (full / fused - 1):+.1f} %".replace("-", "−")])
    if not rows:
        return "Not measured yet."
    return markdown(("example, as it is, on a CPU", "temporary memory saved", "faster"), rows)


CLAIMS_KINDS = {"claims": claims_table, "small_claims": small_claims_table}
