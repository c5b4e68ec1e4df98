"""The choice of a backend, and of the GPU to compile for."""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from jliger.core.checks import check_choice

Implementation = Literal["triton", "xla"]

Choice = Literal["triton", "xla", "by platform"]
"""An implementation, or both: `run_by_platform` then traces both, and lowering selects one for each platform."""

_LOWEST_CAPABILITY = 80
_PACKAGE = str(Path(__file__).parent.parent)

# A user context (jax 0.12) is part of the keys of JAX's caches, so functions are traced again when its value changes.
_compute_capability = jax.make_user_context(None)


def compute_capability(capability: int) -> contextlib.AbstractContextManager[None]:
    """A context that compiles for a GPU of this compute capability, even on a machine without one.

    Within the context, `implementation=None` means Triton in programs lowered for NVIDIA GPUs, and XLA in programs for
    other platforms; an export for both `"cpu"` and `"cuda"` contains both. JAX does not reuse traces from outside the
    context inside it, or the reverse.

    Args:
      capability: ten times the major version plus the minor version: 80 (A100), 90 (H100, H200), 100 (B200).

    Raises:
      ValueError: `capability` is not an integer of at least 80.

    Examples:
      Lowering a loss for an H100 on a machine without a GPU (this needs `jax-cuda13-plugin`, but no CUDA):

        with jliger.compute_capability(90):
            exported = jax.export.export(
                jax.jit(loss),
                platforms=["cuda"],
                disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)],
            )(*shapes)
    """
    if not isinstance(capability, int) or not 80 <= capability < 1000:
        raise ValueError(
            f"compute_capability got {capability!r}; pass ten times the major version plus the minor, at least 80 "
            "(90 for an H100)."
        )
    return _compute_capability(capability)


def target_compute_capability() -> int | None:
    """The capability set by `compute_capability`, or None."""
    return _compute_capability.value


def capability_in_use() -> int | None:
    """The capability set by `compute_capability`, or else the lowest of this process's NVIDIA GPUs; None without."""
    return target_compute_capability() or _present_capability()


def fitting_implementation(*arrays: jax.Array) -> Choice:
    """The backend that `implementation=None` means for an operation on these arrays.

    Triton on NVIDIA GPUs of at least sm_80, present or set by `compute_capability`; XLA on all other devices. If all
    arrays are concrete, the operation runs on their devices. If one is a tracer, the platform is only known at
    lowering.
    """
    capability = capability_in_use()
    if capability is None or capability < _LOWEST_CAPABILITY:
        return "xla"
    platforms = {None if isinstance(array, jax.core.Tracer) else _platform_of(array) for array in arrays}
    if platforms.isdisjoint(("gpu", "cuda", None)):
        return "xla"
    if not has_triton():
        _warn_of_missing_triton()
        return "xla"
    # If the arrays are on several platforms, some are uncommitted, and JAX will move those to the others' devices.
    return "triton" if platforms <= {"gpu", "cuda"} else "by platform"


def run_by_platform(function: Callable[..., Any], choice: Choice, *operands: Any) -> Any:
    """Calls `function(implementation, *operands)` with the chosen implementation.

    Args:
      function: traceable with both implementations, with results of the same structure, shapes and dtypes.
      choice: an implementation; `"by platform"` traces both, and lowering for a platform selects one.
      *operands: trees of arrays.
    """
    if choice != "by platform":
        return function(choice, *operands)
    return jax.lax.platform_dependent(
        *operands, cuda=functools.partial(function, "triton"), default=functools.partial(function, "xla")
    )


def check_implementation(implementation: str | None) -> None:
    """Raises unless it is None or a backend that runs here."""
    check_choice("implementation", implementation, ("triton", "xla", None))
    if implementation == "triton" and not has_triton():
        raise ValueError(
            "implementation got 'triton', but triton and jax-triton are not installed; pass 'xla', or install them: "
            "pip install 'jliger[cuda13]', or 'jliger[cuda12]' for CUDA 12."
        )
    if implementation == "triton" and not can_run_triton():
        raise ValueError(
            f"implementation got 'triton', but JAX has no GPU here (its default backend is {jax.default_backend()}); "
            "pass 'xla' or None. To compile for a GPU of another machine, use jliger.compute_capability."
        )


def can_run_triton() -> bool:
    """Whether Triton kernels can be compiled or interpreted here. Triton must be installed."""
    import triton

    if target_compute_capability() is not None or triton.knobs.runtime.interpret:
        return True
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def has_triton() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


def _present_capability() -> int | None:
    """The lowest compute capability of this process's NVIDIA GPUs, in the units of `compute_capability`, or None."""
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:  # JAX has no CUDA backend on this machine
        return None
    versions = (gpu.compute_capability.split(".") for gpu in gpus)
    return min((10 * int(major) + int(minor) for major, minor in versions), default=None)


def _platform_of(array: jax.Array) -> str:
    return next(iter(array.sharding.device_set)).platform


@functools.cache
def _warn_of_missing_triton() -> None:
    """Warns once per process, because the function is cached."""
    warnings.warn(
        "jliger uses XLA on NVIDIA GPUs here, because triton and jax-triton are not installed. Its Triton kernels are "
        "faster and need less memory: pip install 'jliger[cuda13]', or 'jliger[cuda12]' for CUDA 12. To keep XLA "
        "without this warning, pass implementation='xla'.",
        stacklevel=2,
        skip_file_prefixes=(_PACKAGE,),
    )
