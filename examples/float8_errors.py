"""How far 8-bit products move log-probabilities, the loss and its gradients, beside what products in bfloat16 do.

    python examples/float8_errors.py
    python examples/float8_errors.py --steps 2000 --hidden-size 512 --vocab-size 32768

Hidden states are bfloat16, the kernel is float32. Without --steps both are random, and labels are sampled from the
softmax, as a trained model's would be. With --steps they are the last layer of a language model after that many steps
of training, on held-out text. Errors are against float32 products. docs/float8.md says what they mean.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import loading  # noqa: F401
import options
import runs
from corpus import heldout_batches
from language_model import Head, inputs_and_labels, language_model_loss
from llama import LlamaConfig, Tree, hidden_states, last_layer
from options import COUNT, COUNT_OR_ZERO
from reporting import number, table_of
from runs import Record
from sweeps import command_of
from training import TrainingConfig, text_training

import jliger
from jliger.bench.report import environment

SETTINGS = [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (1.0, 30.0), (1.0, 1000.0)]  # deviation of logits, scale of hidden
PRODUCTS = {
    "bfloat16": {},
    "float8": {"products": "float8"},
    "float8_forward": {"products": "float8_forward"},
}
COLUMNS = {
    "deviation of logits": number("deviation", ".3g"),
    "scale of hidden states": number("scale", ".4g"),
    "products": number("products"),
    "loss": number("loss", "+.1e"),
    "logit": number("logit_error", ".1e"),
    "log-probability": number("logprob_error", ".1e"),
    "hidden: error": number("hidden_error", ".1e"),
    "cosine": number("hidden_cosine", ".5f"),
    "kernel: error": number("kernel_error", ".1e"),
    "its cosine": number("kernel_cosine", ".5f"),
    "length, labels' columns": number("bias_of_labels", "+.1e"),
    "others": number("bias_of_others", "+.1e"),
    "worst": number("worst_bias_of_others", ".1e"),
}

Layer = tuple[jax.Array, jax.Array, jax.Array]  # hidden states, kernel, labels
Results = tuple[jax.Array, tuple[jax.Array, jax.Array], jliger.LinearLogprobs]


@partial(jax.jit, static_argnums=(0, 1, 2))
def random_layer(tokens: int, hidden_size: int, vocab: int, deviation: float, scale: float) -> Layer:
    """A random layer, and labels sampled from its float32 logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = (jax.random.normal(keys[0], (tokens, hidden_size)) * scale).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (hidden_size, vocab)) * deviation / scale * hidden_size**-0.5
    return hidden, kernel, jax.random.categorical(keys[2], logits_of(hidden, kernel))


def logits_of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(hidden.astype(jnp.float32), kernel, precision="highest")


def trained_layer(args: argparse.Namespace) -> Layer:
    """The last layer of a language model that is trained here, and a held-out batch."""
    corpus = options.corpus_of(args)
    config, learning = options.model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    loss_fn = language_model_loss(Head("jliger"), config, corpus.end_of_text)
    with TemporaryDirectory() as folder:
        training = text_training("model", Path(folder), loss_fn, config, learning, corpus.train)
        training.begin(None, False)
        training.prepare()
        for step in range(args.steps):
            training.advance(step + 1)
    (batch,) = heldout_batches(corpus.heldout, args.batch_size, args.length, 1)
    return layer_of(config, training.state["parameters"], batch)


@partial(jax.jit, static_argnums=0)
def layer_of(config: LlamaConfig, params: Tree, tokens: jax.Array) -> Layer:
    inputs, labels, _ = inputs_and_labels(tokens, -1)
    hidden = hidden_states(config, params, inputs).reshape(-1, config.hidden_size).astype(jnp.bfloat16)
    kernel, layout = last_layer(config, params)
    return hidden, (kernel if layout == "hv" else kernel.T).astype(jnp.float32), labels.reshape(-1)


@partial(jax.jit, static_argnames=("products", "precision"))
def results_of(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, **options: object) -> Results:
    """The loss, its gradients, and log-probabilities."""

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jliger.fused_linear_cross_entropy(hidden, kernel, labels, ignore_index=None, **options)

    value, grads = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    return value, grads, jliger.linear_logprobs(hidden, kernel, labels, ignore_index=None, **options)


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


def root_mean_square(values: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(values))))


def records_of(layer: Layer) -> Iterator[Record]:
    """The errors of each kind of products."""
    hidden, kernel, labels = layer
    loss, grads, truth = results_of(hidden.astype(jnp.float32), kernel, labels, precision="highest")
    # Columns that are no token's label have the gradients that push rare tokens down.
    is_label = jnp.zeros(kernel.shape[1], jnp.bool).at[labels].set(True)
    for name, chosen in PRODUCTS.items():
        own_loss, own, result = results_of(hidden, kernel, labels, **chosen)
        errors = [[float(value) for value in compared(*pair)] for pair in zip(own, grads, strict=True)]
        bias = lengths(own[1], grads[1])
        # The label's logit is the log-probability plus the log-sum-exp.
        of_logprobs, of_lse = result.logprobs - truth.logprobs, result.logsumexp - truth.logsumexp
        yield {
            "products": name,
            "loss": float(own_loss - loss),
            "logit_error": root_mean_square(of_logprobs + of_lse),
            "logprob_error": root_mean_square(of_logprobs),
            "hidden_error": errors[0][0],
            "hidden_cosine": errors[0][1],
            "kernel_error": errors[1][0],
            "kernel_cosine": errors[1][1],
            "bias_of_labels": float(jnp.mean(bias, where=is_label)),
            "bias_of_others": float(jnp.mean(bias, where=~is_label)),
            "worst_bias_of_others": float(jnp.max(jnp.abs(bias), where=~is_label, initial=0)),
        }


def random_records(tokens: int, hidden_size: int, vocab: int) -> list[Record]:
    """The errors for each deviation of logits and scale of hidden states."""
    return [
        {"deviation": deviation, "scale": scale, **record}
        for deviation, scale in SETTINGS
        for record in records_of(random_layer(tokens, hidden_size, vocab, deviation, scale))
    ]


def trained_records(layer: Layer) -> list[Record]:
    """The errors of a trained layer, with the deviation of its logits in each row, and its hidden states' size."""
    hidden, kernel, _ = layer
    deviation = root_mean_square(jax.jit(lambda *layer: jnp.std(logits_of(*layer), axis=1))(hidden[:1024], kernel))
    about = {"deviation": deviation, "scale": root_mean_square(hidden.astype(jnp.float32))}
    return [{**about, **record} for record in records_of(layer)]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("float8_errors", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    parser.add_argument("--tokens", type=COUNT, default=2048, metavar="N", help="of a random layer (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=COUNT_OR_ZERO, default=0, metavar="N", help="of training; 0 for a random layer (%(default)s)")
    options.add_seed_option(add)
    options.add_learning_options(add, "100, at most half of the steps")
    parser.set_defaults(hidden_size=2048, vocab_size=128256, dtype="bfloat16", learning_rate=1e-3)
    args = parser.parse_args(argv)
    args.command = command_of("float8_errors", argv)
    if args.steps:
        options.check(parser, args, share=2, most=100)
    return args


def run(args: argparse.Namespace) -> None:
    if args.steps:
        layer = trained_layer(args)
        sizes, found = (*layer[0].shape, layer[1].shape[1]), trained_records(layer)
    else:
        sizes = args.tokens, args.hidden_size, args.vocab_size
        found = random_records(*sizes)
    print(f"Errors against float32 products, N, H, V = {sizes}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{args.command}\n\n{table_of(found, COLUMNS)}")
    if args.out is not None:
        about = {**environment(), "command": args.command}
        args.out.write_text(json.dumps({"environment": about, "sizes": sizes, "records": found}, indent=1))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("float8_errors", run, parse_args(argv))


if __name__ == "__main__":
    main()
