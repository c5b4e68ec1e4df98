"""What a step's time goes to, from a trace of the profiler."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

STEPS = 2
# Parts of kernels' names, and what they are. The first that fits counts.
KINDS = {
    "jliger's kernels": ("row_", "rms_", "norm_", "jliger"),
    "attention": ("fmha", "flash", "cudnn", "sdpa", "mha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "sm90_", "sm80_", "splitk"),
    "copies": ("memcpy", "memset", "copy"),
}


def milliseconds_by_kind(run: Callable[[], Any], folder: Path) -> dict[str, float]:
    """Traces some steps, keeps the trace in `folder`, and sums up the time of the device's kernels for each step."""
    with jax.profiler.trace(str(folder)):
        for number in range(STEPS):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                jax.block_until_ready(run())
    sums: Counter[str] = Counter()
    for file in sorted(folder.rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(file)).planes:
            if "GPU" in plane.name:
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            sums[kind_of(event.name)] += event.duration_ns / 1e6 / STEPS
    return dict(sums)


def kind_of(name: str) -> str:
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other kernels of XLA")
