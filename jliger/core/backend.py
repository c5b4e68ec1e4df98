"""Which backend fits, and which GPU to compile for."""

import contextlib
import importlib.util
from typing import Literal

import jax

Implementation = Literal["triton", "xla"]

_compute_capability = jax.make_user_context(None)


def compute_capability(capability: int) -> contextlib.AbstractContextManager[None]:
    """Compiles for a GPU of this compute capability, on a machine that may have none.

    Within this context `implementation=None` means Triton, and functions are traced anew: what was traced outside it is
    not reused inside, nor the other way round.

    Args:
      capability: ten times the major version plus the minor: 80 (A100), 90 (H100, H200), 100 (B200).

    Raises:
      ValueError: if `capability` is not such a number.

    Example:
      Lowering a loss for an H100 on a machine without a GPU (this needs `jax-cuda13-plugin`, but no CUDA)::

        with jliger.compute_capability(90):
            exported = jax.export.export(
                jax.jit(loss),
                platforms=["cuda"],
                disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")],
            )(*shapes)
    """
    if not isinstance(capability, int) or not 80 <= capability < 1000:
        raise ValueError(
            f"compute_capability got {capability!r}; pass ten times the major version plus the minor, at least 80 "
            "(90 for an H100)."
        )
    return _compute_capability(capability)


def target_compute_capability() -> int | None:
    """The capability asked for by `compute_capability`, or None."""
    return _compute_capability.value


def fitting_implementation() -> Implementation:
    """Triton for an NVIDIA GPU, present or named by `compute_capability`; XLA for anything else."""
    if target_compute_capability() is not None:
        return "triton"
    device = jax.config.jax_default_device
    platform = getattr(device, "platform", device) or jax.default_backend()
    is_nvidia = platform in ("gpu", "cuda") and "cuda" in jax.devices()[0].client.platform_version.lower()
    return "triton" if is_nvidia and has_triton() else "xla"


def can_run_triton() -> bool:
    """Whether a Triton kernel can be compiled or interpreted here; triton must be installed."""
    import triton

    if target_compute_capability() is not None or triton.knobs.runtime.interpret:
        return True
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def has_triton() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))
