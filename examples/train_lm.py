"""Trains a small language model twice, with full logits and with jliger, and shows both side by side.

    python examples/train_lm.py

The text is the running Python's own library and documentation, through a byte-level BPE trained on the spot. The two
trainings share model, seed and data, and alternate, one step each. Their loss curves agree to rounding; their steps
take different time and memory. docs/train_lm.md has the options and says what a run leaves behind.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import loading  # noqa: F401
import options
import reporting
import runs
from corpus import heldout_batches
from language_model import CURVE_TOLERANCE, HEADS, evaluation, language_model_loss
from options import COUNT
from training import TrainingConfig, text_training, train


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("train_lm", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser)
    options.add_training_options(parser)
    add = options.add_run_options(parser, "runs/train_lm", checkpoint_every=50)
    options.add_eval_options(add, 25, 8)
    add("--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps")
    parser.set_defaults(learning_rate=2e-3)
    args = parser.parse_args(argv)
    options.check(parser, args)
    return args


def run(args: argparse.Namespace) -> None:
    corpus = options.corpus_of(args)
    config, learning = options.model_of(args, corpus.vocab_size), TrainingConfig.of(args)
    # What shapes the curve: a run is only resumed with the same values.
    settings = {"corpus": corpus.digest, **asdict(config), **asdict(learning)}
    # Whatever can be refused is refused before the folder is changed.
    end, heldout = corpus.end_of_text, heldout_batches(corpus.heldout, args.batch_size, args.length, args.eval_batches)
    trainings = []
    for head in options.heads_of(args):
        loss_fn, evaluate = language_model_loss(head, config, end), evaluation(config, head, heldout, end)
        folder = args.out / head.name
        training = text_training(head.name, folder, loss_fn, config, learning, corpus.train, evaluate=evaluate)
        trainings.append(training)
    runs.open_folder(args, settings, HEADS, corpus.tokenizer)
    last = args.steps if args.stop_at is None else args.stop_at
    train(trainings, args, last)
    events = runs.read_heads(args.out)
    summary = reporting.summarize(events, settings)
    parts = [reporting.curve_table(events), *reporting.summary_parts(summary, CURVE_TOLERANCE[args.dtype])]
    if last < args.steps:
        parts.append(f"Stopped at step {last} of {args.steps}; --resume continues.")
    losses = reporting.curves_panel(events, "Loss", "loss", ("train", "eval"), "cross entropy (nats per token)")
    reporting.report(args.out, summary, [losses, *reporting.comparison_panels(events, summary)], parts)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("train_lm", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
