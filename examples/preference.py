"""Teaches a small language model which of two continuations is the text's own, by ORPO or by DPO, with either head.

    python examples/preference.py
    python examples/preference.py --loss dpo --out runs/dpo

A briefly pretrained model is given pairs: a text's own continuation, and the same with some tokens replaced. Trained
with full logits and with jliger, from one seed, both have one curve; margin and accuracy on held-out pairs rise.
docs/post_training.md has the options and says what a run leaves behind.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from corpus import Batches, heldout_batches
from flax import nnx
from language_model import LanguageModel, ModelConfig
from matplotlib.figure import Figure
from options import (
    COUNT,
    NUMBER,
    add_corpus_options,
    add_model_options,
    add_training_options,
    check_options,
    corpus_of,
)
from post_training import Head, Tree, add_folder_options, finite, initial_state, trace_step
from reporting import (
    LAST_LOSS,
    Events,
    MetricsFile,
    Record,
    curve_table,
    draw_curves,
    draw_difference,
    draw_memory,
    heldout_row,
    read_metrics,
    save_figure,
    summarize,
    summary_table,
    verdict,
    write_json,
)
from runs import METRICS, SUMMARY, TOKENIZER, begin_folder, check_folder, inputs_and_labels
from steps import compile_step
from tqdm import tqdm
from train_lm import CURVE_TOLERANCE, HEADS, PLOT, jliger_loss
from training import TrainingConfig, run_program

from jliger import losses

# The weight of the preference where none is given. The paper's is 0.1 for ORPO, whose models know more to begin with.
BETA = {"orpo": 1.0, "dpo": 0.1}
# How much farther apart two curves may lie than two of a language model's, and still be called one. ORPO's loss is such
# a model's with something added. DPO's comes from a difference of sums of log-probabilities, of a hundred nats or more.
TOLERANCE_FACTOR = {"orpo": 1, "dpo": 10}
# The pretraining's folder in a run's own; each head has one, too.
PRETRAINING = "pretraining"


# ---- loss ------------------------------------------------------------------------------------------------------


def sequence_logprobs(loss: str, logprobs: jax.Array, where: jax.Array) -> losses.SequenceLogprobs:
    """Log-probabilities `[B, T]` of tokens to those of sequences: ORPO is defined on means, DPO on sums."""
    return losses.sequence_logprobs(logprobs, where, reduction="mean" if loss == "orpo" else "sum")


def pair_loss(
    loss: str, logprobs: jax.Array, where: jax.Array, beta: float, reference: jax.Array | None = None
) -> tuple[jax.Array, losses.PreferenceMetrics]:
    """Loss of pairs from log-probabilities `[2·B, T]` of tokens, the chosen sequences first.

    `reference` is DPO's: log-probabilities `[2·B]` of the sequences under the model that training began with.
    """
    found = sequence_logprobs(loss, logprobs, where)
    chosen, rejected = jnp.split(found.logprobs, 2)
    counted = (found.counts > 0).reshape(2, -1).all(axis=0)
    if loss == "orpo":
        return losses.orpo(chosen, rejected, beta=beta, where=counted)
    ref_chosen, ref_rejected = jnp.split(reference, 2)
    return losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, where=counted)


@dataclass(frozen=True)
class Preference:
    """The loss of a batch of pairs, with one head."""

    loss: str
    head: Head
    beta: float
    prompt_length: int
    end_of_text: int

    def logprobs(self, model: LanguageModel, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities `[2·B, T]` of the tokens after the first, and which belong to a completion."""
        inputs, labels, where = inputs_and_labels(tokens, self.end_of_text)
        where &= jnp.arange(1, tokens.shape[1]) >= self.prompt_length
        return self.head.of_model(model, inputs, labels, where).logprobs, where

    def reference(self, model: LanguageModel, tokens: jax.Array) -> jax.Array:
        """What DPO needs of the model that training began with, once a batch: `[2·B]`."""
        return sequence_logprobs(self.loss, *self.logprobs(model, tokens)).logprobs

    def __call__(self, model: LanguageModel, batch: Tree) -> tuple[jax.Array, losses.PreferenceMetrics]:
        """Loss and metrics."""
        return pair_loss(self.loss, *self.logprobs(model, batch["tokens"]), self.beta, batch.get("reference"))


# ---- pairs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Makes pairs of windows of text: `[B, T+1]` tokens to `[2·B, T+1]`, the text's own first.

    In the others, `corruption` of the completion's tokens are replaced by tokens of the text's, as frequent as there.
    """

    prompt_length: int
    corruption: float
    end_of_text: int
    pool: np.ndarray

    def __call__(self, windows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Each window beside its corrupted copy."""
        replaced = random.random(windows.shape) < self.corruption
        replaced[:, : self.prompt_length] = False
        # Ends of texts, and what fills a window that is cut short, stay.
        replaced &= (windows >= 0) & (windows != self.end_of_text)
        return np.concatenate([windows, np.where(replaced, random.choice(self.pool, windows.shape), windows)])

    def endless(self, windows: Batches, seed: int) -> Iterator[np.ndarray]:
        """Batches of pairs, in the order of the windows."""
        random = np.random.default_rng([seed, 1])
        return (self(window, random) for window in windows)


# ---- training --------------------------------------------------------------------------------------------------


def pretrain(program: jax.stages.Traced, model: nnx.State, windows: Batches, args: argparse.Namespace) -> nnx.State:
    """Trains on the text as it is, and gives the parameters that all else begins with."""
    config = pretraining_config(args)
    compiled = compile_step(program.lower())
    state = initial_state(model, config.optimizer())
    with (
        MetricsFile(args.out / PRETRAINING / METRICS) as metrics,
        tqdm(total=config.steps, desc=PRETRAINING, unit="step", disable=args.no_progress) as bar,
    ):
        metrics.write("compiled", 0, **compiled.record())
        for step in range(1, config.steps + 1):
            state, (loss, _) = compiled.step(state, next(windows))
            metrics.write("train", step, loss=finite(loss, PRETRAINING, step))
            bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            bar.update()
    return state["parameters"]


def pretraining_config(args: argparse.Namespace) -> TrainingConfig:
    """As the training itself, but for length and rate; all of a batch's sequences are the text's own."""
    return replace(TrainingConfig.of(args), steps=args.pretraining_steps, learning_rate=args.pretraining_learning_rate)


@dataclass(frozen=True)
class Program:
    """One head's training step, and its evaluation of parameters on a batch; nothing of it has been compiled or run."""

    preference: Preference
    config: TrainingConfig
    step: jax.stages.Traced
    evaluate: Callable[[nnx.State, Tree], tuple[jax.Array, losses.PreferenceMetrics]]
    reference: Callable[[nnx.State, np.ndarray], jax.Array]

    def batch(self, tokens: np.ndarray, reference: nnx.State) -> Tree:
        """Tokens `[2·B, T+1]` of pairs, and what the loss needs to know of the reference model."""
        if self.preference.loss == "orpo":
            return {"tokens": tokens}
        return {"tokens": tokens, "reference": self.reference(reference, tokens)}


def build_program(
    preference: Preference, config: TrainingConfig, graphdef: nnx.GraphDef[LanguageModel], parameters: nnx.State
) -> Program:
    """Traces, from the parameters' shapes."""
    batch = {"tokens": jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)}
    if preference.loss == "dpo":
        batch["reference"] = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)
    return Program(
        preference=preference,
        config=config,
        step=trace_step(preference, graphdef, config.optimizer(), parameters, batch),
        evaluate=jax.jit(lambda parameters, batch: preference(nnx.merge(graphdef, parameters), batch)),
        reference=jax.jit(lambda parameters, tokens: preference.reference(nnx.merge(graphdef, parameters), tokens)),
    )


def figures(loss: jax.Array, metrics: losses.PreferenceMetrics) -> Record:
    """What is logged of a batch."""
    return {
        "loss": float(loss),
        "margin": float(metrics.margins),
        "accuracy": float(metrics.accuracy),
        "chosen_reward": float(metrics.chosen_rewards),
        "rejected_reward": float(metrics.rejected_rewards),
    }


def evaluate(program: Program, parameters: nnx.State, batches: Sequence[Tree]) -> Record:
    """Means over the pairs of all batches."""
    found = [program.evaluate(parameters, batch) for batch in batches]
    counts = [int(metrics.count) for _, metrics in found]
    records = [figures(*each) for each in found]
    return {
        name: sum(count * record[name] for count, record in zip(counts, records, strict=True)) / max(1, sum(counts))
        for name in records[0]
    } | {"pairs": sum(counts)}


def train(
    program: Program,
    folder: Path,
    begun_with: nnx.State,
    pairs: Iterator[np.ndarray],
    heldout: Sequence[np.ndarray],
    args: argparse.Namespace,
) -> None:
    """Trains one head from the pretrained parameters, which are DPO's reference."""
    config, name = program.config, program.preference.head.name
    heldout_batches = [program.batch(tokens, begun_with) for tokens in heldout]
    compiled = compile_step(program.step.lower())
    state = initial_state(begun_with, config.optimizer())
    with (
        MetricsFile(folder / METRICS) as metrics,
        tqdm(total=config.steps, desc=name, unit="step", disable=args.no_progress) as bar,
    ):
        metrics.write("compiled", 0, **compiled.record())
        metrics.write("eval", 0, **evaluate(program, begun_with, heldout_batches))
        for step in range(1, config.steps + 1):
            batch = program.batch(next(pairs), begun_with)
            began = time.perf_counter()
            state, found = compiled.step(state, batch)
            record = figures(*found)
            seconds = time.perf_counter() - began
            finite(record["loss"], name, step)
            metrics.write("train", step, **record, tokens=config.batch_size * config.length, seconds=seconds)
            bar.set_postfix(loss=f"{record['loss']:.4f}", margin=f"{record['margin']:.4f}", refresh=False)
            bar.update()
            if step % args.eval_every == 0 or step == config.steps:
                metrics.write("eval", step, **evaluate(program, state["parameters"], heldout_batches))


# ---- the run ---------------------------------------------------------------------------------------------------


def plot(runs: dict[str, Events], summary: Record, path: Path) -> None:
    """Writes margin and accuracy on held-out pairs, the difference that the head makes, and the memory of the step."""
    figure = Figure(figsize=(19, 4.5), layout="constrained")
    margin, accuracy, difference, memory = figure.subplots(1, 4)
    draw_curves(margin, runs, "eval", "margin")
    margin.set(title="Margin on held-out pairs", xlabel="step", ylabel="chosen less rejected reward")
    draw_curves(accuracy, runs, "eval", "accuracy")
    accuracy.set(title="Accuracy on held-out pairs", xlabel="step", ylabel="share of pairs with a positive margin")
    margin.legend()
    draw_difference(difference, runs)
    draw_memory(memory, summary)
    save_figure(figure, path)


def report(runs: dict[str, Events], summary: Record) -> str:
    """What was learned, and what the head makes of the step's memory."""
    before = {head: events["eval"][0] for head, events in runs.items()}
    table = summary_table(
        summary,
        [
            LAST_LOSS,
            heldout_row("held-out loss", "loss", "{:.6f}"),
            heldout_row("held-out margin", "margin", "{:.6f}"),
            heldout_row("held-out accuracy", "accuracy", "{:.4f}"),
        ],
    )
    first, last = next(iter(before.values())), next(iter(summary["heads"].values()))["heldout"]
    parts = [
        curve_table(runs, "Margin on held-out pairs", "eval", "margin", digits=6),
        curve_table(runs, "Accuracy on held-out pairs", "eval", "accuracy", digits=4),
        table,
        f"On {last['pairs']} held-out pairs the margin went from {first['margin']:.4f} to {last['margin']:.4f}, the "
        f"accuracy from {first['accuracy']:.4f} to {last['accuracy']:.4f}.",
    ]
    if "comparison" in summary:
        dtype = summary["dtype"]
        tolerance = TOLERANCE_FACTOR[summary["loss"]] * CURVE_TOLERANCE[dtype]
        parts.append(verdict(summary["comparison"], dtype, tolerance))
    return "\n\n".join(["", *parts])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line; a bad argument ends the program with a message."""
    parser = argparse.ArgumentParser(prog="preference", description=(__doc__ or "").partition("\n")[0])
    add_corpus_options(parser)
    add_model_options(parser)
    add_training_options(parser, HEADS)
    group = parser.add_argument_group("preferences", "A batch's sequences are pairs: half of them are the text's own.")
    add = group.add_argument
    add("--loss", choices=list(BETA), default="orpo", help="of a pair (%(default)s)")
    default = ", ".join(f"{loss}: {beta}" for loss, beta in BETA.items())
    add("--beta", type=NUMBER, metavar="X", help=f"weight of the preference ({default})")
    add(
        "--prompt-length",
        type=COUNT,
        default=16,
        metavar="N",
        help="tokens of --length before the pair's two ways part",
    )
    add("--corruption", type=NUMBER, default=0.15, metavar="X", help="share of tokens replaced (%(default)s)")
    add("--pretraining-steps", type=COUNT, default=100, metavar="N", help="on the text as it is (%(default)s)")
    add("--pretraining-learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")
    group = add_folder_options(parser, Path("runs/preference"))
    add = group.add_argument
    add("--eval-every", type=COUNT, default=10, metavar="N", help="steps between evaluations (%(default)s)")
    add("--eval-batches", type=COUNT, default=16, metavar="N", help="held-out batches each, at most (%(default)s)")
    parser.set_defaults(max_bytes=4_000_000, vocab_size=8192, steps=50, batch_size=32, length=48, learning_rate=2e-3)
    args = parser.parse_args(argv)
    args.beta = BETA[args.loss] if args.beta is None else args.beta
    check_options(parser, args, "pretraining_steps")
    if args.batch_size % 2:
        parser.error(f"--batch-size {args.batch_size} must be even: its sequences are pairs")
    if args.prompt_length > args.length:
        parser.error(f"--prompt-length {args.prompt_length} leaves nothing of --length {args.length} to complete")
    if args.corruption > 1:
        parser.error(f"--corruption {args.corruption}: must be at most 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Corpus, pretraining, training with each head, report."""
    began = time.perf_counter()
    corpus = corpus_of(args)
    end = corpus.end_of_text
    model_config = ModelConfig(
        corpus.vocab_size, args.hidden_size, args.layers, args.heads, args.tie_embeddings, args.dtype
    )
    config, pretraining = TrainingConfig.of(args), pretraining_config(args)
    names = ("loss", "beta", "prompt_length", "corruption", "pretraining_steps", "pretraining_learning_rate")
    settings = {
        "corpus": corpus.digest,
        **asdict(model_config),
        **asdict(config),
        **{name: getattr(args, name) for name in names},
    }
    # Everything that can be refused is refused before the folder is touched.
    text = Batches(corpus.train, config.batch_size, config.length, config.seed)
    graphdef, parameters = nnx.split(LanguageModel(model_config, nnx.Rngs(config.seed)))
    options = {"implementation": args.implementation, "chunk_size": args.chunk_size}
    text_shape = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)
    pretraining_step = trace_step(
        lambda model, tokens: (jliger_loss(model, tokens, end, **options), None),
        graphdef,
        pretraining.optimizer(),
        parameters,
        text_shape,
    )
    programs = {
        head: build_program(
            Preference(args.loss, Head(head, **options), args.beta, args.prompt_length, end),
            config,
            graphdef,
            parameters,
        )
        for head in (HEADS if args.head == "both" else (args.head,))
    }
    check_folder(args.out, settings, resume=None, overwrite=args.overwrite)
    begin_folder(args.out, settings, (PRETRAINING, *HEADS, TOKENIZER, SUMMARY, PLOT))
    corpus.tokenizer.save(str(args.out / TOKENIZER))
    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), JAX {jax.__version__}")

    pretrained = pretrain(pretraining_step, parameters, text, args)
    pairs = Pairs(args.prompt_length, args.corruption, end, corpus.train)
    num_pairs = config.batch_size // 2
    random = np.random.default_rng([config.seed, 2])
    windows = heldout_batches(corpus.heldout, num_pairs, config.length, args.eval_batches)
    heldout = [pairs(window, random) for window in windows]
    for head, program in programs.items():
        # Other windows than the pretraining's order begins with.
        order = Batches(corpus.train, num_pairs, config.length, config.seed + 1)
        train(program, args.out / head, pretrained, pairs.endless(order, config.seed), heldout, args)
    runs = {head: read_metrics(args.out / head / METRICS) for head in programs}
    summary = {
        "device": device.device_kind,
        "jax": jax.__version__,
        **settings,
        "heldout_before": {head: events["eval"][0] for head, events in runs.items()},
        **summarize(runs),
    }
    write_json(args.out / SUMMARY, summary)
    plot(runs, summary, args.out / PLOT)
    print(report(runs, summary))
    print(f"{time.perf_counter() - began:.0f} s in all; metrics, {SUMMARY} and {PLOT} are in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    run_program("preference", run, parse_args(argv), "--overwrite begins anew")


if __name__ == "__main__":
    main()
