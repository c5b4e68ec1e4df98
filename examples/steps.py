"""A compiled training step: what the compiler says about it, and what the devices do."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from reporting import Record, memory_of
from runs import RunError

# With which a program ends that has run out of a device's memory.
OUT_OF_MEMORY_EXIT = 3


class DeviceMemoryError(RunError):
    """The step, or the state, doesn't fit into a device's memory."""


@contextmanager
def device_memory_errors() -> Iterator[None]:
    """Raises XLA's running out of memory, while compiling or running, as DeviceMemoryError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise DeviceMemoryError(str(error).strip().splitlines()[0]) from None


@dataclass(frozen=True)
class Compiled:
    """The step, ready to run, and what the compiler says about it; figures of memory are of one device."""

    step: Callable[..., Any]
    seconds: float
    memory: dict[str, int]
    rows_by: str

    def record(self) -> Record:
        """All but the step itself, for a metrics file."""
        return {"seconds": self.seconds, "memory": self.memory, "rows_by": self.rows_by}


def compile_step(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles: one compilation serves the memory's figures and the run."""
    began = time.perf_counter()
    with device_memory_errors():
        step = lowered.compile()
    seconds = time.perf_counter() - began
    # Read off the program itself, not off what was asked for.
    rows_by = "triton" if "triton_kernel_call" in step.as_text() else "xla"
    return Compiled(step, seconds, memory_of(step.memory_analysis()), rows_by)


def device_memory(figure: str) -> int | None:
    """The largest of a figure of `memory_stats` over this process's devices; None where they keep none (CPUs)."""
    statistics_of = [device.memory_stats() for device in jax.local_devices()]
    found = [each[figure] for each in statistics_of if each and figure in each]
    return max(found, default=None)
