"""A kernel that overwrites its operand behind XLA's back, beside one whose gradients are an output.

    python examples/undeclared_write.py

Both compute the cross entropy of `hidden · kernel + bias` and its gradients, in chunks of tokens. The table has the
relative errors of loss and gradients against `jax.value_and_grad` over full logits; docs/data_flow.md says why.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

TOKENS, HIDDEN, VOCAB, CHUNKS = 1024, 256, 4096, 4


@triton.jit
def loss_and_grads(logits_ptr, labels_ptr, loss_ptr, grads_ptr, V: tl.constexpr):
    """A row's loss and logit gradients, by one program."""
    row, columns = tl.program_id(0), tl.arange(0, V)
    logits = tl.load(logits_ptr + row * V + columns)
    shifted = logits - tl.max(logits, axis=0)
    total = tl.sum(tl.exp(shifted), axis=0)
    at_label = columns == tl.load(labels_ptr + row)
    tl.store(loss_ptr + row, tl.log(total) - tl.sum(tl.where(at_label, shifted, 0.0), axis=0))
    tl.store(grads_ptr + row * V + columns, tl.exp(shifted) / total - at_label.to(tl.float32))


@triton.jit
def undeclared_write(logits_ptr, labels_ptr, loss_ptr, V: tl.constexpr):
    """The same, but the gradients overwrite the logits."""
    loss_and_grads(logits_ptr, labels_ptr, loss_ptr, logits_ptr, V)


def row_functions() -> dict[str, Callable]:
    """Functions of logits and labels that give losses and logit gradients, by how they are written."""

    def call(kernel, out_type, logits, labels):
        about = {"grid": logits.shape[:1], "V": logits.shape[1], "num_warps": 8}
        about["backend_options"] = {"enable_fp_fusion": True}
        return jax_triton.triton_call(logits, labels, kernel=kernel, out_type=out_type, **about)

    def wrong(logits, labels):
        loss = call(undeclared_write, jax.ShapeDtypeStruct(labels.shape, logits.dtype), logits, labels)
        return loss, logits  # in the hope that `logits` are gradients by now

    def right(logits, labels):
        out_type = [jax.ShapeDtypeStruct(shape, logits.dtype) for shape in (labels.shape, logits.shape)]
        return call(loss_and_grads, out_type, logits, labels)

    return {"undeclared write": wrong, "explicit output": right}


def value_and_grads(rows, scan, hidden, kernel, bias, labels):
    """The summed loss and its gradients by hidden, kernel and bias, a chunk of tokens at a time."""

    def step(sums, chunk):
        hidden, labels = chunk
        logits = hidden @ kernel
        loss, grads = rows(logits if bias is None else logits + bias, labels)
        return jax.tree.map(jnp.add, sums, (loss.sum(), hidden.T @ grads, grads.sum(axis=0))), grads @ kernel.T

    chunks = hidden.reshape(CHUNKS, -1, HIDDEN), labels.reshape(CHUNKS, -1)
    (loss, *sums), parts = scan(step, (jnp.zeros(()), jnp.zeros_like(kernel), jnp.zeros((VOCAB,))), chunks)
    return loss, parts.reshape(hidden.shape), *sums


def python_scan(step, carry, chunks):
    parts = []
    for chunk in zip(*chunks, strict=True):
        carry, part = step(carry, chunk)
        parts.append(part)
    return carry, jnp.stack(parts)


@jax.jit
def expected(hidden, kernel, bias, labels):
    """The same over full logits."""

    def loss(hidden, kernel, bias):
        return -jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel + bias), labels[:, None], axis=1).sum()

    value, grads = jax.value_and_grad(loss, (0, 1, 2))(hidden, kernel, jnp.zeros((VOCAB,)) if bias is None else bias)
    return value, *grads


def main() -> None:
    if jax.default_backend() != "gpu":
        print("This program shows what a GPU kernel does, and JAX finds no GPU here: nothing was run.")
        return
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (TOKENS, HIDDEN))
    kernel = jax.random.normal(keys[1], (HIDDEN, VOCAB)) * HIDDEN**-0.5
    labels = jax.random.randint(keys[2], (TOKENS,), 0, VOCAB)
    print(f"Relative errors against full logits, on {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    names = ("loss", "d hidden", "d kernel", "d bias")
    print(f"{'written as':18}{'run':10}{'bias':5}", *(f"{name:>9}" for name in names))
    with jax.default_matmul_precision("highest"):
        for written, rows in row_functions().items():
            under_jit = jax.jit(partial(value_and_grads, rows, jax.lax.scan))
            op_by_op = partial(value_and_grads, rows, python_scan)
            for run, function in {"jit": under_jit, "op by op": op_by_op}.items():
                for bias in (None, jax.random.normal(keys[3], (VOCAB,))):
                    pairs = zip(*(f(hidden, kernel, bias, labels) for f in (function, expected)), strict=True)
                    errors = [float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right)) for found, right in pairs]
                    print(f"{written:18}{run:10}{'no' if bias is None else 'yes':5}", *(f"{e:9.1e}" for e in errors))


if __name__ == "__main__":
    main()
