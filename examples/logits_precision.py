"""How far log-probabilities are from those of a float32 head, with logits in bfloat16 and in float32.

    python examples/logits_precision.py

Hidden states are bfloat16, and labels are sampled from the softmax, as in reinforcement learning. The float32 head
computes its product in float32, with the kernel as it is. docs/reinforcement_learning.md says when to use which.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from options import COUNT, parser_of
from reporting import number, table_of
from runs import Record

import jliger

DEVIATIONS = (1.0, 4.0)  # of logits: nearly uniform, and peaked as a trained model's


@partial(jax.jit, static_argnums=(0, 1, 2))
def problem(tokens: int, hidden_size: int, vocab: int, deviation: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, a float32 kernel, and labels sampled from the float32 head."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, hidden_size), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (hidden_size, vocab)) * deviation * hidden_size**-0.5
    logits = jnp.dot(hidden.astype(jnp.float32), kernel, precision="highest")
    return hidden, kernel, jax.random.categorical(keys[2], logits)


@partial(jax.jit, static_argnames=("logits_dtype", "precision"))
def logprobs(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, **options: object) -> jax.Array:
    return jliger.linear_logprobs(hidden, kernel, labels, ignore_index=None, **options).logprobs


def records(tokens: int, hidden_size: int, vocab: int) -> Iterator[Record]:
    """The errors of bfloat16 products, for kernels of two dtypes, logits of two dtypes and of two deviations."""
    for deviation in DEVIATIONS:
        hidden, kernel, labels = problem(tokens, hidden_size, vocab, deviation)
        for kernel_dtype in ("float32", "bfloat16"):
            own = kernel.astype(kernel_dtype)
            wide = hidden.astype(jnp.float32), own.astype(jnp.float32)
            truth = np.asarray(logprobs(*wide, labels, precision="highest"), np.float64)
            for logits_dtype in ("bfloat16", "float32"):
                found = np.asarray(logprobs(hidden, own, labels, logits_dtype=logits_dtype), np.float64)
                errors = np.abs(found - truth)
                about = {"deviation": deviation, "kernel": kernel_dtype, "logits": logits_dtype}
                # A ratio of two policies is the exponential of a difference of log-probabilities.
                off = {"ratio": float(np.expm1(errors).max()), "sum": abs(float((found - truth).sum()))}
                yield {**about, "mean": float(errors.mean()), "most": float(errors.max()), **off}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("logits_precision", __doc__)
    parser.add_argument("--tokens", type=COUNT, default=4096, metavar="N", help="(%(default)s)")
    parser.add_argument("--hidden-size", type=COUNT, default=4096, metavar="H", help="(%(default)s)")
    parser.add_argument("--vocab", type=COUNT, default=128256, metavar="V", help="(%(default)s)")
    args = parser.parse_args(argv)
    sizes = args.tokens, args.hidden_size, args.vocab
    columns = {
        "deviation of logits": number("deviation"),
        "kernel": number("kernel"),
        "logits": number("logits"),
        "mean error": number("mean", ".1e"),
        "largest error": number("most", ".1e"),
        "largest error of a ratio": number("ratio", ".2%"),
        "error of the sum": number("sum", ".1e"),
    }
    print(f"Errors of log-probabilities against a float32 head, N, H, V = {sizes}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table_of(list(records(*sizes)), columns))


if __name__ == "__main__":
    main()
