"""Other people's ways, each where it is installed; PyTorch's are timed on the same GPU in the same rounds."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from jliger.bench.cases import Shape, Way, loss_and_gradients


def tokamax_ways() -> list[Way]:
    """Tokamax's memory-bounded linear softmax cross entropy, if tokamax is installed."""
    try:
        import tokamax
    except ImportError:
        return []

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel.astype(hidden.dtype), reduction="mean", implementation="chunked_xla"
        )

    return [Way("tokamax chunked_xla", loss_and_gradients(loss), "bfloat16")]


def torch_ways(shape: Shape) -> dict[str, tuple[Callable[[], Any], Callable[[], int]]]:
    """PyTorch's, by name: a function that computes loss and gradients, and one that gives its extra memory in bytes."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    hidden = torch.randn(shape.tokens, shape.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kernel = torch.randn(shape.vocab, shape.hidden, device="cuda", dtype=torch.bfloat16) * shape.hidden**-0.5
    kernel.requires_grad_()
    labels = torch.randint(shape.vocab, (shape.tokens,), device="cuda")
    losses: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        losses["PyTorch Liger"] = lambda: Liger.apply(hidden, kernel, labels)
        losses["PyTorch Liger, float32 sums"] = lambda: Liger.apply(
            hidden, kernel, labels, None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32
        )
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        losses["Cut Cross-Entropy"] = lambda: linear_cross_entropy(hidden, kernel, labels, filter_eps=None)

    def measured(loss: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], int]]:
        def step() -> Any:
            value = loss()
            value = value[0] if isinstance(value, tuple) else value
            torch.autograd.grad(value, (hidden, kernel))
            torch.cuda.synchronize()

        def extra_memory() -> int:
            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            results = (hidden.nbytes + kernel.nbytes) if hidden.requires_grad else 0
            return max(0, torch.cuda.max_memory_allocated() - before - results)

        return step, extra_memory

    return {name: measured(loss) for name, loss in losses.items()}
