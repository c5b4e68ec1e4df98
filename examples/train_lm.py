"""Trains a small language model twice, with full logits and with jliger, and shows both side by side.

    python examples/train_lm.py

The text is the running Python's own library and documentation, through a byte-level BPE trained on the spot. The two
trainings share model, seed and data, and advance in turn, a step each. Their loss curves agree to rounding; their steps
take different time and memory. docs/train_lm.md has the options and says what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import options
import reporting
import runs
from corpus import Batches, Corpus, heldout_batches, windows
from language_model import CURVE_TOLERANCE, HEADS, Evaluation, Head, language_model_loss
from llama import LlamaConfig
from options import COUNT
from training import Program, Training, TrainingConfig, build_program, next_of, train


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("train_lm", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    options.add_training_options(parser)
    add = options.add_run_options(parser, "runs/train_lm", checkpoint_every=50)
    options.add_eval_options(add, 25, 8)
    add("--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps")
    args = parser.parse_args(argv)
    options.check_all(parser, args)
    return args


def program_of(head: Head, config: LlamaConfig, training: TrainingConfig, end_of_text: int) -> Program:
    """The training step with one head."""
    loss_fn = language_model_loss(head, config, end_of_text)
    return build_program(
        loss_fn, partial(training.initial_parameters, config), training.optimizer(config), training.tokens()
    )


def training_of(
    head: Head, config: LlamaConfig, training: TrainingConfig, corpus: Corpus, args: argparse.Namespace
) -> Training:
    """The training with one head on the corpus."""
    batches = Batches(windows(corpus.train, training.length), training.batch_size, training.seed)
    heldout = heldout_batches(corpus.heldout, training.batch_size, training.length, args.eval_batches)
    return Training(
        head.name,
        args.out / head.name,
        program_of(head, config, training, corpus.end_of_text),
        next_of(batches),
        Evaluation(config, head, heldout, corpus.end_of_text),
    )


def run(args: argparse.Namespace) -> None:
    """Corpus, training with both heads, report."""
    corpus = options.corpus_of(args)
    config, training = options.model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    # What shapes the curve: a run is only resumed with the same values.
    settings = {"corpus": corpus.digest, **asdict(config), **asdict(training)}
    # Whatever can be refused is refused before the folder is changed.
    trainings = [training_of(head, config, training, corpus, args) for head in options.heads_of(args)]
    runs.open_folder(args, settings, HEADS, corpus.tokenizer)
    last = args.steps if args.stop_at is None else args.stop_at
    train(trainings, args, last)
    events = runs.read_heads(args.out)
    summary = reporting.summarize(events, settings)
    parts = [reporting.curve_table(events), reporting.summary_table(summary)]
    if "comparison" in summary:
        parts.append(reporting.verdict(summary["comparison"], args.dtype, CURVE_TOLERANCE[args.dtype]))
    if last < args.steps:
        parts.append(f"Stopped at step {last} of {args.steps}; --resume continues.")
    losses = reporting.curves_panel(events, "Loss", "loss", ("train", "eval"), "cross entropy (nats per token)")
    reporting.report(args.out, summary, [losses, *reporting.comparison_panels(events, summary)], parts)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("train_lm", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
