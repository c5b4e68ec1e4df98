"""How far 8-bit products move the loss and its gradients, beside what products in bfloat16 do.

    python examples/float8_errors.py

Hidden states are bfloat16, the kernel is float32, and labels are sampled from the softmax, as a trained model's would
be. Errors are against float32 products. docs/float8.md says what they mean.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from options import COUNT, parser_of
from reporting import number, table_of
from runs import Record

import jliger
from jliger.bench.report import environment

SETTINGS = [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (1.0, 30.0), (1.0, 1000.0)]  # deviation of logits, scale of hidden
PRODUCTS = {"bfloat16": {}, "float8": {"products": "float8"}}

Gradients = tuple[jax.Array, tuple[jax.Array, jax.Array]]


@partial(jax.jit, static_argnums=(0, 1, 2))
def problem(tokens: int, hidden_size: int, vocab: int, deviation: float, scale: float) -> tuple[jax.Array, ...]:
    """Hidden states, a float32 kernel, and labels sampled from the float32 head."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = (jax.random.normal(keys[0], (tokens, hidden_size)) * scale).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (hidden_size, vocab)) * deviation / scale * hidden_size**-0.5
    logits = jnp.dot(hidden.astype(jnp.float32), kernel, precision="highest")
    return hidden, kernel, jax.random.categorical(keys[2], logits)


@partial(jax.jit, static_argnames=("products", "precision"))
def loss_and_gradients(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, **options: object) -> Gradients:
    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jliger.fused_linear_cross_entropy(hidden, kernel, labels, ignore_index=None, **options)

    return jax.value_and_grad(loss, (0, 1))(hidden, kernel)


@jax.jit
def compared(found: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The relative error and the cosine."""
    found, truth = found.astype(jnp.float32), truth.astype(jnp.float32)
    norms = jnp.linalg.norm(found), jnp.linalg.norm(truth)
    return jnp.linalg.norm(found - truth) / norms[1], jnp.vdot(found / norms[0], truth / norms[1])


@jax.jit
def lengths(found: jax.Array, truth: jax.Array) -> jax.Array:
    """By how much the gradient of each column is too long, along its true direction."""
    return jnp.sum((found - truth) * truth, axis=0) / jnp.sum(truth * truth, axis=0)


def records(tokens: int, hidden_size: int, vocab: int) -> Iterator[Record]:
    """The errors of both products, for each deviation of logits and scale of hidden states."""
    for deviation, scale in SETTINGS:
        hidden, kernel, labels = problem(tokens, hidden_size, vocab, deviation, scale)
        loss, grads = loss_and_gradients(hidden.astype(jnp.float32), kernel, labels, precision="highest")
        # Columns that are no token's label have the gradients that push rare tokens down.
        is_label = jnp.zeros(vocab, jnp.bool).at[labels].set(True)
        for name, options in PRODUCTS.items():
            own_loss, own = loss_and_gradients(hidden, kernel, labels, **options)
            errors = [[float(value) for value in compared(*pair)] for pair in zip(own, grads, strict=True)]
            bias = lengths(own[1], grads[1])
            yield {
                "deviation": deviation,
                "scale": scale,
                "products": name,
                "loss": float(own_loss - loss),
                "hidden_error": errors[0][0],
                "hidden_cosine": errors[0][1],
                "kernel_error": errors[1][0],
                "kernel_cosine": errors[1][1],
                "bias_of_labels": float(jnp.mean(bias, where=is_label)),
                "bias_of_others": float(jnp.mean(bias, where=~is_label)),
                "worst_bias_of_others": float(jnp.max(jnp.abs(bias), where=~is_label, initial=0)),
            }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("float8_errors", __doc__)
    parser.add_argument("--tokens", type=COUNT, default=2048, metavar="N", help="(%(default)s)")
    parser.add_argument("--hidden-size", type=COUNT, default=2048, metavar="H", help="(%(default)s)")
    parser.add_argument("--vocab", type=COUNT, default=128256, metavar="V", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    sizes = args.tokens, args.hidden_size, args.vocab
    columns = {
        "deviation of logits": number("deviation"),
        "scale of hidden states": number("scale"),
        "products": number("products"),
        "loss": number("loss", "+.1e"),
        "hidden: error": number("hidden_error", ".1e"),
        "cosine": number("hidden_cosine", ".5f"),
        "kernel: error": number("kernel_error", ".1e"),
        "its cosine": number("kernel_cosine", ".5f"),
        "length, labels' columns": number("bias_of_labels", "+.1e"),
        "others": number("bias_of_others", "+.1e"),
        "worst": number("worst_bias_of_others", ".1e"),
    }
    found = list(records(*sizes))
    print(f"Errors against float32 products, N, H, V = {sizes}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table_of(found, columns))
    if args.out is not None:
        args.out.write_text(json.dumps({"environment": environment(), "sizes": sizes, "records": found}, indent=1))


if __name__ == "__main__":
    main()
