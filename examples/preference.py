"""Teaches a small language model which of two continuations is the text's own, by ORPO or by DPO, with either head.

    python examples/preference.py
    python examples/preference.py --loss dpo --out runs/dpo

A briefly pretrained model gets pairs: a text's own continuation, and the same with some tokens replaced. The trainings
with full logits and with jliger begin with the same parameters and have the same curve; margin and accuracy on held-out
pairs rise. docs/post_training.md says what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import options
import reporting
import runs
from corpus import Batches, heldout_batches, windows
from language_model import CURVE_TOLERANCE, HEADS, Head, inputs_and_labels, language_model_loss
from llama import LlamaConfig, Tree
from options import COUNT, NUMBER
from runs import Events, Record
from training import Training, TrainingConfig, build_program, text_training, train

from jliger import losses
from jliger.accumulation import AccumulatedLoss

# The default weights of the preference. The ORPO paper's is 0.1, for models that know more to begin with.
BETA = {"orpo": 1.0, "dpo": 0.1}
# How much farther apart two curves may be than those of a language model, to be called the same. ORPO's loss is a
# language model's with a term added. DPO's is of a difference of sums of log-probabilities, of 100 nats or more.
TOLERANCE_FACTOR = {"orpo": 1, "dpo": 10}
# The folder of the pretraining; each head has one, too.
PRETRAINING = "pretraining"


@dataclass(frozen=True)
class Preference:
    """The loss of a batch of pairs, with one head."""

    loss: str
    head: Head
    config: LlamaConfig
    beta: float
    prompt_length: int
    end_of_text: int

    def of_tokens(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Inputs, labels, and which labels belong to a completion, of `[2·B, T+1]` tokens."""
        inputs, labels, where = inputs_and_labels(tokens, self.end_of_text)
        return inputs, labels, where & (jnp.arange(1, tokens.shape[1]) >= self.prompt_length)

    @partial(jax.jit, static_argnums=0)
    def logprobs(self, params: Tree, tokens: jax.Array) -> losses.SequenceLogprobs:
        """Log-probabilities of completions, `[2·B]`: ORPO is defined on means over tokens, DPO on sums."""
        inputs, labels, where = self.of_tokens(tokens)
        logprobs = self.head.logprobs(self.config, params, inputs, labels, where=where).logprobs
        return losses.sequence_logprobs(logprobs, where, reduction="mean" if self.loss == "orpo" else "sum")

    def training(self, folder: Path, learning: TrainingConfig) -> Training:
        """The training, without its data."""
        batch = {"tokens": learning.tokens()}
        if self.loss == "dpo":
            batch["reference"] = jax.ShapeDtypeStruct((learning.batch_size,), jnp.float32)
        create, optimizer = partial(learning.initial_parameters, self.config), learning.optimizer(self.config)
        program = build_program(self, create, optimizer, batch)
        return Training(self.head.name, folder, program, figures=lambda results, *_: figures(results[-1]))

    def batch(self, tokens: np.ndarray, reference: Tree) -> Tree:
        """Tokens `[2·B, T+1]` of pairs and, for DPO, their log-probabilities under the reference model."""
        if self.loss == "orpo":
            return {"tokens": tokens}
        return {"tokens": tokens, "reference": self.logprobs(reference, tokens).logprobs}

    def __call__(self, params: Tree, batch: Tree) -> tuple[jax.Array, float, losses.PreferenceMetrics]:
        """The loss, its weight, and metrics; the first half of the batch's sequences is the chosen ones."""
        references = () if self.loss == "orpo" else jnp.split(batch["reference"], 2)
        if self.head.name == "jliger":
            # Both sequences of a pair side by side before the model runs: on a mesh, a pair is then on one device.
            pairs = jnp.stack(jnp.split(batch["tokens"], 2), axis=1)
            inputs, labels, where = self.of_tokens(pairs.reshape(batch["tokens"].shape))
            hidden, kernel, how = self.head.last_layer(self.config, params, inputs)
            hidden, labels, where = (array.reshape(-1, 2, *array.shape[1:]) for array in (hidden, labels, where))
            fused = losses.fused_linear_orpo if self.loss == "orpo" else losses.fused_linear_dpo
            loss, metrics = fused(hidden, kernel, labels, *references, beta=self.beta, where=where, **how)
        else:
            sequences = self.logprobs(params, batch["tokens"])
            chosen, rejected = jnp.split(sequences.logprobs, 2)
            counted = (sequences.counts > 0).reshape(2, -1).all(axis=0)
            flat = losses.orpo if self.loss == "orpo" else losses.dpo
            loss, metrics = flat(chosen, rejected, *references, beta=self.beta, where=counted)
        return loss, 1.0, metrics


@dataclass(frozen=True, eq=False)
class Pairs:
    """Makes pairs from rows of text: `[B, T+1]` tokens to `[2·B, T+1]`, the text's own first.

    In the others, `corruption` of the completion's tokens are replaced by tokens of `pool`, as frequent as there.
    """

    prompt_length: int
    corruption: float
    end_of_text: int
    pool: np.ndarray

    def __call__(self, rows: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        random = np.random.default_rng(seed)
        replaced = random.random(rows.shape) < self.corruption
        replaced[:, : self.prompt_length] = False
        # Ends of texts, and what fills a short row, stay.
        replaced &= (rows >= 0) & (rows != self.end_of_text)
        return np.concatenate([rows, np.where(replaced, random.choice(self.pool, rows.shape), rows)])


def figures(result: AccumulatedLoss) -> Record:
    names = {"margin": "margins", "accuracy": "accuracy"}
    names |= {"chosen_reward": "chosen_rewards", "rejected_reward": "rejected_rewards"}
    return {"loss": float(result.loss)} | {name: float(getattr(result.aux, own)) for name, own in names.items()}


def evaluate(preference: Preference, batches: Sequence[Tree], params: Tree) -> Record:
    """Means over the pairs of all batches."""
    results = [AccumulatedLoss(*_loss(preference, params, batch)) for batch in batches]
    counts, records = [int(result.aux.count) for result in results], [figures(result) for result in results]
    means = {name: np.dot(counts, [each[name] for each in records]) / max(1, sum(counts)) for name in records[0]}
    return {name: float(mean) for name, mean in means.items()} | {"pairs": sum(counts)}


_loss = jax.jit(Preference.__call__, static_argnums=0)


def report_of(events: dict[str, Events], summary: Record) -> list[str]:
    heldout = {
        f"held-out {name}": reporting.number(f"heldout/{name}", ".6f") for name in ("loss", "margin", "accuracy")
    }
    first, last = next(iter(summary["heldout_before"].values())), next(iter(summary["heads"].values()))["heldout"]
    return [
        reporting.curve_table(events, "Margin on held-out pairs", "eval", "margin", digits=6),
        reporting.curve_table(events, "Accuracy on held-out pairs", "eval", "accuracy", digits=4),
        f"On {last['pairs']} held-out pairs the margin went from {first['margin']:.4f} to {last['margin']:.4f}, the "
        f"accuracy from {first['accuracy']:.4f} to {last['accuracy']:.4f}.",
        *reporting.summary_parts(
            summary,
            TOLERANCE_FACTOR[summary["loss"]] * CURVE_TOLERANCE[summary["dtype"]],
            reporting.LAST_LOSS | heldout,
        ),
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("preference", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    options.add_training_options(parser)
    text = "The sequences of a batch are pairs: half of them are the text's own."
    add = parser.add_argument_group("preferences", text).add_argument
    add("--loss", choices=list(BETA), default="orpo", help="of a pair (%(default)s)")
    default = ", ".join(f"{loss}: {beta}" for loss, beta in BETA.items())
    add("--beta", type=NUMBER, metavar="X", help=f"weight of the preference ({default})")
    add("--prompt-length", type=COUNT, default=16, metavar="N", help="of --length, that a pair shares (%(default)s)")
    add("--corruption", type=NUMBER, default=0.15, metavar="X", help="share of tokens replaced (%(default)s)")
    add("--pretraining-steps", type=COUNT, default=100, metavar="N", help="on the text as it is (%(default)s)")
    add("--pretraining-learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")
    options.add_eval_options(options.add_run_options(parser, "runs/preference"), 10, 16)
    parser.set_defaults(max_bytes=4_000_000, vocab_size=8192, steps=50, batch_size=32, length=48, learning_rate=2e-3)
    args = parser.parse_args(argv)
    args.beta = BETA[args.loss] if args.beta is None else args.beta
    options.check(parser, args, "pretraining_steps")
    if args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} must be even: its sequences are pairs")
    if args.prompt_length > args.length:
        parser.error(f"--prompt-length {args.prompt_length} leaves nothing of --length {args.length} to complete")
    if args.corruption > 1:
        parser.error(f"--corruption {args.corruption}: must be at most 1")
    return args


def run(args: argparse.Namespace) -> None:
    corpus = options.corpus_of(args)
    config, learning = options.model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    names = ("loss", "beta", "prompt_length", "corruption", "pretraining_steps", "pretraining_learning_rate")
    own = {name: getattr(args, name) for name in names}
    settings = {"corpus": corpus.digest, **asdict(config), **asdict(learning), **own}
    # Whatever can be refused is refused before the folder is changed.
    end, seed = corpus.end_of_text, learning.seed
    pretraining = replace(learning, steps=args.pretraining_steps, learning_rate=args.pretraining_learning_rate)
    text_loss = language_model_loss(options.jliger_head(args), config, end)
    first = text_training(PRETRAINING, args.out / PRETRAINING, text_loss, config, pretraining, corpus.train)
    trainings = {}
    for head in options.heads_of(args):
        preference = Preference(args.loss, head, config, args.beta, args.prompt_length, end)
        trainings[preference] = preference.training(args.out / head.name, learning)
    runs.open_folder(args, settings, (PRETRAINING, *HEADS), corpus.tokenizer)
    train([first], args, pretraining.steps)

    pretrained = first.state["parameters"]
    pairs = Pairs(args.prompt_length, args.corruption, end, corpus.train)
    heldout = heldout_batches(corpus.heldout, learning.batch_size // 2, learning.length, args.eval_batches)
    # Not the rows that the pretraining began with.
    order = Batches(windows(corpus.train, learning.length), learning.batch_size // 2, seed + 1)

    def next_batch(preference: Preference, step: int, params: Tree) -> Tree:
        return preference.batch(pairs(order[step - 1], [seed, 1, step]), pretrained)

    for preference, training in trainings.items():
        batches = [preference.batch(pairs(rows, [seed, 2, i]), pretrained) for i, rows in enumerate(heldout)]
        training.begin_with, training.next_batch = pretrained, partial(next_batch, preference)
        training.evaluate = partial(evaluate, preference, batches)
    train(list(trainings.values()), args, learning.steps)
    events = runs.read_heads(args.out)
    before = {head: records["eval"][0] for head, records in events.items()}
    summary = reporting.summarize(events, settings) | {"heldout_before": before}
    panels = [
        reporting.curves_panel(events, "Margin on held-out pairs", "margin", ("eval",), "chosen less rejected reward"),
        reporting.curves_panel(events, "Accuracy on held-out pairs", "accuracy", ("eval",), "share with a margin > 0"),
        *reporting.comparison_panels(events, summary),
    ]
    reporting.report(args.out, summary, panels, report_of(events, summary))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("preference", run, parse_args(argv))


if __name__ == "__main__":
    main()
