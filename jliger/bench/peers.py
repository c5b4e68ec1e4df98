"""Methods in PyTorch, if installed: each at its default, and at other settings with the same result."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from jliger.bench.problem import Peer, Shape
from jliger.bench.timing import Timed

PEAKED = 4.0  # the standard deviation of peaked logits
Prepared = tuple[Timed, Callable[[], int]]


def torch_peers(shape: Shape, *, at_all_settings: bool) -> list[Peer]:
    """PyTorch Liger and Cut Cross-Entropy.

    Args:
      shape: the problem.
      at_all_settings: also PyTorch Liger with more chunk sizes and with float32 sums, and Cut Cross-Entropy without its
        filter, and on peaked logits with labels sampled from them, which are the case that the filter is made for.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    peers = [Peer("PyTorch, three products", functools.partial(_products, shape))]
    if importlib.util.find_spec("liger_kernel") is not None:
        for size in (1, 8, 16, 32) if at_all_settings else (1, 16, 32):
            name = "PyTorch Liger, " + ("default (chunk_mem_const=1)" if size == 1 else f"chunk_mem_const={size}")
            peers.append(Peer(name, functools.partial(_liger, shape, size)))
        if at_all_settings:
            name = "PyTorch Liger, chunk_mem_const=16, float32 sums"
            peers.append(Peer(name, functools.partial(_liger, shape, 16, float32_sums=True)))
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        settings = {"default (filter)": {}, "no filter": {"filter_eps": None}}
        for deviation in (1.0, PEAKED) if at_all_settings else (1.0,):
            logits = ", peaked logits" if deviation > 1 else ""
            for setting, options in settings.items() if at_all_settings else [*settings.items()][:1]:
                name = f"Cut Cross-Entropy, {setting}{logits}"
                peers.append(Peer(name, functools.partial(_cut, shape, deviation, options)))
    return peers


@functools.lru_cache(maxsize=1)
def _operands(shape: Shape, deviation: float = 1.0) -> tuple[Any, Any, Any]:
    """Hidden states, kernel [V, H] and labels in PyTorch. The cache holds one shape at a time."""
    import torch

    torch.manual_seed(0)
    on_gpu = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(shape.tokens, shape.hidden, **on_gpu)
    kernel = torch.randn(shape.vocab, shape.hidden, **on_gpu) * (deviation * shape.hidden**-0.5)
    labels = torch.randint(shape.vocab, (shape.tokens,), device="cuda")
    if deviation > 1:
        # The largest logit plus Gumbel noise is a sample from the softmax.
        for part in torch.arange(shape.tokens, device="cuda").split(1024):
            logits = (hidden[part] @ kernel.T).float()
            labels[part] = (logits - torch.empty_like(logits).exponential_().log_()).argmax(dim=-1)
    return hidden.requires_grad_(), kernel.requires_grad_(), labels


def _liger(shape: Shape, chunk_mem_const: int, *, float32_sums: bool = False) -> Prepared:
    import torch
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    hidden, kernel, labels = _operands(shape)
    defaults = (None, None, -100, 0.0, 0.0, "mean", None, False)
    rest = (torch.float32 if float32_sums else None, False, False, False, None, None, chunk_mem_const)
    return _gradients(lambda: Liger.apply(hidden, kernel, labels, *defaults, *rest), hidden, kernel)


def _cut(shape: Shape, deviation: float, options: dict[str, Any]) -> Prepared:
    from cut_cross_entropy import linear_cross_entropy

    hidden, kernel, labels = _operands(shape, deviation)
    return _gradients(lambda: linear_cross_entropy(hidden, kernel, labels, **options), hidden, kernel)


def _products(shape: Shape) -> Prepared:
    import torch

    hidden, kernel, _ = (operand.detach() for operand in _operands(shape))
    grads = torch.randn(shape.tokens, shape.vocab, device="cuda", dtype=torch.bfloat16)
    return _timed(lambda: (hidden @ kernel.T, grads @ kernel, grads.T @ hidden), results=0)


def _gradients(loss: Callable[[], Any], hidden: Any, kernel: Any) -> Prepared:
    import torch

    def step() -> Any:
        value = loss()
        return torch.autograd.grad(value[0] if isinstance(value, tuple) else value, (hidden, kernel))

    return _timed(step, results=hidden.nbytes + kernel.nbytes)


def _timed(step: Callable[[], Any], results: int) -> Prepared:
    import torch

    def extra_memory() -> int:
        """The allocator's peak during a step, minus its memory before and that of the results."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - results)

    return Timed(step, lambda _: torch.cuda.synchronize()), extra_memory
