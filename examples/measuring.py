"""Measures a compiled step: time, memory, tokens per second; and keeps records of measurements in a file."""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from llama import LlamaConfig, Tree, flops_per_token
from reporting import MIB
from runs import DeviceMemoryError, Record, write_json
from training import Compiled, Program, compile_step, device_memory, device_memory_errors

from jliger.bench.report import environment

# Dense bfloat16 operations per second of an H100 or H200 (SXM) according to NVIDIA's data sheets, in 10¹².
HOPPER_TFLOPS = 989.0
Size = tuple[int, int]  # rows and their length


def measured(compiled: Compiled, run: Callable[[], Any], steps: int, seconds: float) -> Record:
    """Time and memory of a compiled program; `run` calls it once and returns what to wait for.

    After one call that does not count, it is called `steps` times, or until the calls have taken `seconds`. A peak
    that was there before is left out: it came from something else, such as XLA's choice of kernels.
    """
    limit, before = device_memory("bytes_limit"), device_memory("peak_bytes_in_use")
    if limit is not None and compiled.memory["total"] > limit:
        raise DeviceMemoryError(f"the compiled program needs {compiled.memory['total']} bytes of {limit}")
    times: list[float] = []
    with device_memory_errors():
        while len(times) < 1 + steps and sum(times[1:]) <= seconds:
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - began)
    peak = device_memory("peak_bytes_in_use")
    return {
        "milliseconds": 1e3 * statistics.median(times[1:]),
        "milliseconds_of_calls": [1e3 * each for each in times],
        "warmed_up": True,
        "memory_bytes": compiled.memory,
        "peak_bytes": None if peak == before else peak,
        "compile_seconds": compiled.seconds,
        "rows_by": compiled.rows_by,
    }


def measured_steps(program: Program, batch: Tree, config: LlamaConfig, size: Size, args: argparse.Namespace) -> Record:
    """The figures of a training step; `args` has `timed_steps`, `timed_seconds` and `peak_tflops`."""
    compiled = compile_step(program.step)
    with device_memory_errors():
        state = jax.block_until_ready(program.initial_state())
    losses = []

    def run() -> Any:
        nonlocal state
        state, result = compiled.step(state, batch)
        losses.append(result.loss)
        return state, result

    record = measured(compiled, run, args.timed_steps, args.timed_seconds)
    speed = rates(config, size, record["milliseconds"] / 1e3, args.peak_tflops)
    return {**record, **speed, "losses": [float(loss) for loss in losses]}


def rates(config: LlamaConfig, size: Size, seconds: float, peak_tflops: float | None = None) -> Record:
    """Tokens per second and, if the devices' peak is known, the model's share of its operations."""
    tokens_per_second = math.prod(size) / seconds
    if peak_tflops is None and any(name in jax.devices()[0].device_kind for name in ("H100", "H200")):
        peak_tflops = HOPPER_TFLOPS
    utilisation = None
    if peak_tflops is not None:
        needed = flops_per_token(config, size[1]) * tokens_per_second
        utilisation = needed / (peak_tflops * 1e12 * jax.device_count())
    return {"tokens_per_second": tokens_per_second, "model_flop_utilisation": utilisation}


def in_words(record: Record) -> str:
    """The time, speed and memory of a step, in one line."""
    if record.get("out_of_memory"):
        return f"out of memory ({record['reason']})"
    parts = [f"{record['milliseconds']:.1f} ms a step"]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("model_flop_utilisation") is not None:
        parts.append(f"{100 * record['model_flop_utilisation']:.1f} % model-flop utilisation")
    if record["peak_bytes"] is not None:
        parts.append(f"peak memory {record['peak_bytes'] / MIB:,.0f} MiB a device")
    memory = record["memory_bytes"]
    parts.append(f"XLA's account {memory['total'] / MIB:,.0f} MiB a device, {memory['temporary'] / MIB:,.0f} temporary")
    return ", ".join(parts)


class Records:
    """Records of measurements in a JSON file, which is written after each of them."""

    def __init__(self, path: Path, **about: Any) -> None:
        self.path, self.about = path, {**environment(), "bytes_limit": device_memory("bytes_limit"), **about}
        self.records: list[Record] = []

    def add(self, about: Record, measure: Callable[[], Record]) -> Record:
        """Measures and keeps a record; running out of memory is a record, too.

        A device's peak memory can't be reset. Measure in ascending order: a peak that is not above all earlier ones
        is not this measurement's, and is left out.
        """
        try:
            record = {**about, "out_of_memory": False, **measure()}
            earlier = [each.get("peak_bytes") or 0 for each in self.records]
            if record["peak_bytes"] is not None and record["peak_bytes"] <= max(earlier, default=-math.inf):
                record["peak_bytes"] = None
        except DeviceMemoryError as error:
            record = {**about, "out_of_memory": True, "reason": str(error)}
        self.records.append(record)
        if jax.process_index() == 0:
            write_json(self.path, {"environment": self.about, "records": self.records})
        return record
