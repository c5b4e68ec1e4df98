"""Distills a larger language model into a smaller one, and trains the same small one without a teacher.

    python examples/distill.py

The teacher learns from the whole text, the students from the beginning of it: one from the labels alone, one from
labels and teacher, with the same seed on the same batches. The latter is trained with full logits of both models and
with jliger, whose curves agree to rounding. docs/train_distill.md has the options and says what a run leaves behind.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import options
import reporting
import runs
from checkpoints import CheckpointError
from corpus import Corpus, heldout_batches
from language_model import CURVE_TOLERANCE, Head, evaluation, inputs_and_labels, language_model_loss
from llama import LlamaConfig, Tree, hidden_states, last_layer, parameter_count
from matplotlib.axes import Axes
from options import COUNT, NUMBER, NUMBER_OR_ZERO
from runs import Events, Record
from training import Training, TrainingConfig, text_training, train

import jliger

# Folders in the run's own; the distilled student's has one for each head.
TEACHER, ALONE, DISTILLED = "teacher", "alone", "distilled"
STUDENTS = {ALONE: "labels alone", DISTILLED: "with teacher"}
# Part of the cached teacher's key: raise it if the same settings would give another teacher.
CACHE_VERSION = 2


@dataclass(frozen=True)
class DistillationConfig:
    """A token's loss: `hard_weight · cross entropy + (1 − hard_weight) · temperature² · divergence`."""

    divergence: str
    beta: float
    temperature: float
    hard_weight: float


@dataclass(frozen=True)
class Distillation:
    """The loss of a student beside a teacher, with one head."""

    head: Head
    student: LlamaConfig
    teacher: LlamaConfig
    config: DistillationConfig
    end_of_text: int

    def __call__(self, params: Tree, tokens: jax.Array, teacher_params: Tree) -> tuple[jax.Array, jax.Array]:
        """The sum of the token losses, and the number of tokens."""
        inputs, labels, where = inputs_and_labels(tokens, self.end_of_text)
        kernel, layout = last_layer(self.student, params)
        teacher_kernel, teacher_layout = last_layer(self.teacher, teacher_params)
        # The reference has `[B, T, V]` logits of both models in memory.
        library = jliger.reference if self.head.name == "full" else jliger.losses
        config = self.config
        if config.divergence == "jsd":
            divergence = partial(library.fused_linear_jsd, beta=config.beta)
        else:
            divergence = partial(library.fused_linear_kl, direction=config.divergence)
        loss = divergence(
            hidden_states(self.student, params, inputs),
            kernel,
            hidden_states(self.teacher, teacher_params, inputs),
            teacher_kernel,
            temperature=config.temperature,
            labels=labels,
            hard_weight=config.hard_weight,
            # The square makes up for gradients that shrink with the temperature.
            soft_weight=(1 - config.hard_weight) * config.temperature**2,
            where=where,
            reduction="sum",
            student_kernel_layout=layout,
            teacher_kernel_layout=teacher_layout,
            **self.head.options(self.student),
        )
        return loss, jnp.sum(where)


def build_trainings(args: argparse.Namespace, corpus: Corpus) -> tuple[Training, Training, dict[str, Training]]:
    """Traces the teacher's training, the student's without it, and the student's with it, by head."""
    student, teacher = (options.model_of(args, corpus.vocab_size, prefix) for prefix in ("", "teacher_"))
    learning, end, jliger_head = TrainingConfig.of(args), corpus.end_of_text, options.jliger_head(args)
    teaching = replace(learning, steps=args.teacher_steps, learning_rate=args.teacher_learning_rate)
    heldout = heldout_batches(corpus.heldout, learning.batch_size, learning.length, args.eval_batches)
    # The cached teacher lies under a hash of everything that shapes it.
    key = json.dumps([CACHE_VERSION, corpus.digest, asdict(teacher), asdict(teaching)])
    folder = args.cache_dir / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    loss_fn, evaluate = language_model_loss(jliger_head, teacher, end), evaluation(teacher, jliger_head, heldout, end)
    of_teacher = text_training(TEACHER, folder, loss_fn, teacher, teaching, corpus.train, evaluate=evaluate)
    evaluate = evaluation(student, jliger_head, heldout, end)

    def of_student(name: str, folder: Path, loss_fn: Callable[..., Any], *given: Tree) -> Training:
        text = corpus.train[: args.student_tokens]
        return text_training(name, folder, loss_fn, student, learning, text, *given, evaluate=evaluate)

    alone = of_student(STUDENTS[ALONE], args.out / ALONE, language_model_loss(jliger_head, student, end))
    config = DistillationConfig(args.divergence, args.beta, args.temperature, args.hard_weight)
    given, distilled = of_teacher.program.abstract_state["parameters"], {}
    for head in options.heads_of(args):
        loss_fn, folder = Distillation(head, student, teacher, config, end), args.out / DISTILLED / head.name
        distilled[head.name] = of_student(f"{STUDENTS[DISTILLED]}, {head.name}", folder, loss_fn, given)
    return of_teacher, alone, distilled


def train_teacher(teacher: Training, args: argparse.Namespace) -> Tree:
    """The teacher's parameters, from the cache if it is there."""
    try:
        train([teacher], args, args.teacher_steps)
    except CheckpointError:
        shutil.rmtree(teacher.folder)
        train([teacher], args, args.teacher_steps)
    if teacher.start == args.teacher_steps:
        runs.say(f"teacher: from {teacher.folder}")
    return teacher.state["parameters"]


def report_of(students: Mapping[str, Events], heads: Mapping[str, Events], summary: Record) -> list[str]:
    """Who learned from what, what the student has of its teacher, and how much memory the step takes."""
    models = summary["models"]
    titles = {TEACHER: TEACHER} | {name: f"student, {title}" for name, title in STUDENTS.items()}
    columns = {"": lambda model: titles[model["name"]]}
    columns |= {name: reporting.number(name, ",") for name in ("parameters", "steps", "tokens_per_step", "tokens")}
    columns |= {f"held-out {name}": reporting.number(f"heldout/{name}", ".4f") for name in ("loss", "accuracy")}
    title, form = "The student's held-out loss, nats per token", {"digits": 4, "difference": "+.4f"}
    change = models[DISTILLED]["heldout"]["loss"] - models[ALONE]["heldout"]["loss"]
    return [
        reporting.table_of([{"name": name, **model} for name, model in models.items()], columns),
        reporting.curve_table(students, title, "eval", titles=STUDENTS, lines=11, **form),
        f"With the teacher the student's held-out loss is {'lower' if change < 0 else 'NOT lower'}: {change:+.4f} nats "
        "after the last step.",
        f"The training with the teacher, by last layer. {reporting.curve_table(heads)}",
        *reporting.summary_parts(summary, CURVE_TOLERANCE[summary["dtype"]]),
    ]


def students_panel(students: Mapping[str, Events], teacher: Record, axes: Axes) -> None:
    """The held-out curves of both students, and the teacher's last loss."""
    for (name, events), color in zip(students.items(), ("tab:gray", "tab:green"), strict=True):
        steps = sorted(events["eval"])
        axes.plot(steps, [events["eval"][step]["loss"] for step in steps], ".-", color=color, label=STUDENTS[name])
    label = f"the teacher, after its {teacher['steps']} steps"
    axes.axhline(teacher["heldout"]["loss"], color="black", linestyle=":", label=label)
    axes.set(title="Held-out loss", xlabel="step", ylabel="cross entropy (nats per token)")
    # Room for the legend below the teacher's line.
    axes.margins(y=0.4)
    axes.legend(loc="lower left")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("distill", __doc__)
    options.add_corpus_options(parser)
    options.add_model_options(parser, "The student's. The teacher has the same kind of last layer and the same dtype.")

    text = "Data, batches, warmup, weight decay and seed are the student's."
    add = parser.add_argument_group("teacher", text).add_argument
    add("--teacher-hidden-size", type=COUNT, default=128, metavar="N", help="size of a hidden state (%(default)s)")
    add("--teacher-layers", type=COUNT, default=2, metavar="N", help="layers (%(default)s)")
    add("--teacher-heads", type=COUNT, default=4, metavar="N", help="attention heads per layer (%(default)s)")
    add("--teacher-steps", type=COUNT, default=200, metavar="N", help="optimizer steps (%(default)s)")
    add("--teacher-learning-rate", type=NUMBER, default=3e-3, metavar="X", help="the highest (%(default)s)")

    add = parser.add_argument_group("distillation").add_argument
    add("--divergence", choices=["forward", "reverse", "jsd"], default="forward", help="from the teacher (%(default)s)")
    add("--beta", type=NUMBER, default=0.5, metavar="X", help="the teacher's share in jsd's mixture (%(default)s)")
    add("--temperature", type=NUMBER, default=1.0, metavar="X", help="of both models' logits (%(default)s)")
    add("--hard-weight", type=NUMBER_OR_ZERO, default=0.5, metavar="X", help="share of the labels (%(default)s)")
    add("--student-tokens", type=COUNT, default=49152, metavar="N", help="of the text, for the students (%(default)s)")

    # At this vocabulary, what fits the device would be the whole batch.
    options.add_training_options(parser, chunk_size=128)
    options.add_eval_options(options.add_run_options(parser, "runs/distill", checkpoint_every=50), 20, 4)
    # About two minutes on two CPU cores.
    parser.set_defaults(max_bytes=2_000_000, vocab_size=8192, hidden_size=32, heads=2, steps=100, learning_rate=1e-2)
    args = parser.parse_args(argv)
    options.check(parser, args, "teacher_steps")
    options.check_size(parser, args, "teacher-")
    if args.beta >= 1:
        parser.error(f"--beta {args.beta}: must be below 1; its limit there is --divergence reverse")
    if args.hard_weight > 1:
        parser.error(f"--hard-weight {args.hard_weight}: must be at most 1, which is labels alone")
    return args


def run(args: argparse.Namespace) -> None:
    corpus = options.corpus_of(args)
    # Whatever can be refused is refused before the folder is changed.
    teacher, alone, distilled = build_trainings(args, corpus)
    student = options.model_of(args, corpus.vocab_size)
    # What shapes the curves: a run is only resumed with the same values.
    names = ("student_tokens", "divergence", "beta", "temperature", "hard_weight")
    own = {name: value for name, value in vars(args).items() if name in names or name.startswith("teacher_")}
    settings = {"corpus": corpus.digest, **asdict(student), **asdict(TrainingConfig.of(args)), **own}
    runs.open_folder(args, settings, (ALONE, DISTILLED), corpus.tokenizer)
    params = train_teacher(teacher, args)
    for training in distilled.values():
        training.given = (params,)
    train([alone, *distilled.values()], args, args.steps)

    heads = runs.read_heads(args.out / DISTILLED)
    # Of two heads, the last one's student stands for both.
    students = {ALONE: runs.read_metrics(alone.folder), DISTILLED: heads[list(distilled)[-1]]}
    about = {"parameters": parameter_count(student), "steps": args.steps}
    about |= {"tokens_per_step": args.batch_size * args.length, "tokens": min(args.student_tokens, len(corpus.train))}
    models = {name: {**about, "heldout": events["eval"][args.steps]} for name, events in students.items()}
    about |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "steps": args.teacher_steps}
    models = {TEACHER: {**about, "tokens": len(corpus.train), "heldout": teacher.evaluate(params)}, **models}
    summary = {**reporting.summarize(heads, settings), "models": models}
    panels = [partial(students_panel, students, models[TEACHER]), *reporting.comparison_panels(heads, summary)]
    reporting.report(args.out, summary, panels, report_of(students, heads, summary))


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("distill", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
