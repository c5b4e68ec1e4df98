"""Trains Medusa heads on a decoder in two stages, and decodes held-out text with them.

    python examples/medusa.py
    python examples/medusa.py --model Llama-3.2-1B --stages 1
    python examples/medusa.py --devices 4 --mesh fsdp=4

A decoder is trained from scratch, or read from a Hugging Face folder. For each number of heads, stage 1 trains the
heads and stage 2 everything, with full logits and with jliger side by side. Before and after, greedy speculative
decoding continues held-out text: the more guesses are right, the fewer passes it takes. docs/medusa.md
explains what the program prints and what a run leaves behind.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import loading  # noqa: F401
import numpy as np
import optax
import options
import pretrained
import reporting
import runs
from corpus import Batches, encode, heldout_batches, read_documents, split_heldout, windows
from decoder import DecoderConfig, Tree
from instructions import ModelTokenizer
from jax.sharding import PartitionSpec as P
from language_model import CURVE_TOLERANCE
from llama import BATCH, placed
from matplotlib.axes import Axes
from options import COUNT, NUMBER
from reporting import COLORS, MIB, TITLES, number
from runs import Record, say
from speculation import Medusa
from train_sharded import check_model, find_devices, make_mesh, mesh_axes
from training import Training, begun_with, build_program, state_shardings, train

BACKBONE = "backbone"


@dataclass(frozen=True)
class Text:
    """Tokens to train on, and held-out ones: in batches to be predicted, and prompts to be continued."""

    train: np.ndarray
    batches: Sequence[np.ndarray]
    prompts: np.ndarray
    end: int


def share_of(args: argparse.Namespace) -> int:
    """How many devices share a batch."""
    return 1 if args.mesh is None else args.mesh["data"] * args.mesh["fsdp"]


def text_of(args: argparse.Namespace) -> tuple[Text, DecoderConfig]:
    """The text, in the tokens of the checkpoint or of the corpus's own tokenizer, and the decoder's sizes."""
    if args.model is not None:
        config, tokenizer = pretrained.read_config(args.model, args.dtype), ModelTokenizer(args.model)
        pretrained.check(args.model, config)
        end = tokenizer.end
        parts = split_heldout(read_documents(args.corpus, args.max_bytes), args.heldout_fraction)
        learned, heldout = (encode(tokenizer.tokenizer, part, end) for part in parts)
    else:
        corpus = options.corpus_of(args)
        sizes = options.model_of(args, corpus.vocab_size)
        names = ("vocab_size", "hidden_size", "mlp_size", "layers", "heads", "kv_heads", "tie_embeddings", "dtype")
        shared = {name: getattr(sizes, name) for name in names}
        config = DecoderConfig(**shared, head_size=sizes.hidden_size // sizes.heads)
        learned, heldout, end = corpus.train, corpus.heldout, corpus.end_of_text
    batches = heldout_batches(heldout, args.batch_size, args.length, args.eval_batches)
    rows = windows(heldout, args.prompt_length)[:, :-1]
    # As many for each device.
    count = min(len(rows), args.prompts) // share_of(args) * share_of(args)
    prompts = rows[np.linspace(0, len(rows), count, endpoint=False).astype(int)]
    return Text(learned, batches, prompts, end), config


def optimizer_of(learning_rate: float, steps: int, warmup: int) -> optax.GradientTransformation:
    """AdamW after clipping; its epsilon keeps it from making whole steps of gradients that are rounding errors."""
    low = learning_rate / 10
    schedule = optax.warmup_cosine_decay_schedule(low, learning_rate, warmup, steps, low)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, eps=1e-6, weight_decay=0.0))


def training_of(
    args: argparse.Namespace,
    text: Text,
    folder: Path,
    loss_fn: Callable[..., Any],
    create: Callable[[], Tree],
    stage: str,
    *given: Tree,
    specs: Tree,
) -> Training:
    """The training of a stage, whose steps and learning rate are options; `specs` shard what is trained on a mesh."""
    steps, rate = (getattr(args, f"{stage}_{name}") for name in ("steps", "learning_rate"))
    optimizer, rows = optimizer_of(rate, steps, min(10, steps // 10)), placed(P(BATCH))
    tokens = jax.ShapeDtypeStruct((args.batch_size, args.length + 1), jnp.int32, sharding=rows)
    program = build_program(loss_fn, create, optimizer, tokens, *given, shardings=state_shardings(optimizer, specs))
    program = begun_with(create, program, optimizer)
    batches = Batches(windows(text.train, args.length), args.batch_size, args.seed)
    return Training(
        folder.name, folder, program, lambda step, params: jax.device_put(batches[step - 1], rows), given=given
    )


def backbone_specs(config: DecoderConfig) -> Tree:
    return jax.tree.map(lambda leaf: leaf.spec, decoder.parameters(config))


def backbone_of(args: argparse.Namespace, text: Text, config: DecoderConfig) -> Tree:
    """The decoder's parameters: those of the checkpoint, or trained from scratch."""
    if args.model is not None:
        sharding = pretrained.on_one_device if args.mesh is None else placed
        return pretrained.load(args.model, config, args.param_dtype, sharding)
    specs, model = backbone_specs(config), Medusa(config, 1, options.jliger_head(args), text.end)
    create = partial(decoder.initial_parameters, config, jax.random.key(args.seed))
    create = jax.jit(create, out_shardings=jax.tree.map(placed, specs))
    training = training_of(args, text, args.out / BACKBONE, model.backbone_loss, create, BACKBONE, specs=specs)
    train([training], args, args.backbone_steps)
    return training.state["parameters"]


def evaluate(model: Medusa, text: Text, length: int, params: Tree) -> Record:
    """Tokens per pass of speculative decoding, and each head's loss and accuracy on held-out text."""
    parts = [jax.tree.map(np.asarray, model.metrics(params, batch)) for batch in text.batches]
    weight = np.sum([part.weight for part in parts], axis=0)
    loss = np.sum([part.cross_entropy for part in parts], axis=0) / weight
    accuracy = np.sum([part.accuracy * part.weight for part in parts], axis=0) / weight
    tokens, found, passes = model.speculate(params, text.prompts, length)
    kinds = [len(set(row)) for row in np.asarray(tokens)[:, text.prompts.shape[1] :]]
    return {
        "acceptance_length": float(np.sum(found) / np.sum(passes)),
        "distinct_tokens": float(np.mean(kinds)),
        "loss": loss.tolist(),
        "accuracy": accuracy.tolist(),
    }


def train_heads(args: argparse.Namespace, text: Text, model: Medusa, backbone: Tree) -> tuple[list[Record], ...]:
    """Records of the stages' steps, and evaluations before and after them, for one number of heads."""
    specs = {"heads": model.specs(jax.eval_shape(model.initial_parameters, backbone))}
    specs["backbone"] = backbone_specs(model.config)
    create = jax.jit(model.initial_parameters, out_shardings=jax.tree.map(placed, specs["heads"]))
    records, evaluations, begun = [], [], create(backbone)

    def judge(after: str, params: Tree) -> None:
        evaluations.append({"heads": model.count, "after": after, **evaluate(model, text, args.new_tokens, params)})
        accepted = evaluations[-1]["acceptance_length"]
        say(f"{model.count} heads, {after}: {accepted:.3f} tokens a pass of speculative decoding")

    judge("no training", {"backbone": backbone, "heads": begun})
    for stage in args.stages:
        trainings = []
        for head in options.heads_of(args):
            one = replace(model, head=head)
            # The loss of stage 1 is a function of the heads, that of stage 2 of everything.
            loss_fn, state, own, given = one.stage_1, begun, specs["heads"], (backbone,)
            if stage == 2:
                loss_fn, state, own, given = one.stage_2, {"backbone": backbone, "heads": begun}, specs, ()
            create = partial(jax.tree.map, jnp.copy, state)
            folder = args.out / f"{model.count}_heads" / f"stage_{stage}" / head.name
            trainings.append(training_of(args, text, folder, loss_fn, create, f"stage_{stage}", *given, specs=own))
        train(trainings, args, getattr(args, f"stage_{stage}_steps"))
        records += [record_of(args, model.count, stage, training) for training in trainings]
        last = trainings[-1].state["parameters"]
        backbone, begun = (backbone, last) if stage == 1 else (last["backbone"], last["heads"])
        judge(f"stage {stage}", {"backbone": backbone, "heads": begun})
    return records, evaluations


def record_of(args: argparse.Namespace, count: int, stage: int, training: Training) -> Record:
    events = runs.read_metrics(training.folder)
    figures = reporting.figures_of(events)
    speed = args.batch_size * args.length / figures["step_seconds"]
    losses = [record["loss"] for _, record in sorted(events["train"].items())]
    about = {"heads": count, "stage": stage, "head": training.name, "tokens_per_second": speed, "losses": losses}
    return {**about, **{key: value for key, value in figures.items() if key != "heldout"}}


def compared(records: Sequence[Record]) -> list[Record]:
    """The records, jliger's with what it saves of the memory of full logits, and how far the losses are apart."""
    rows = []
    for record in records:
        key = (record["heads"], record["stage"])
        full = [each for each in records if (each["heads"], each["stage"], each["head"]) == (*key, "full")]
        if record["head"] == "jliger" and full:
            used, others = (each["memory_bytes"]["temporary"] for each in (record, full[0]))
            apart = [abs(a - b) / abs(b) for a, b in zip(record["losses"], full[0]["losses"], strict=True)]
            faster = record["tokens_per_second"] / full[0]["tokens_per_second"] - 1
            record = {**record, "saved": 1 - used / others, "apart": max(apart), "faster": faster}
        rows.append(record)
    return rows


def report_of(summary: Record) -> list[str]:
    def of_heads(record: Record) -> str:
        return " ".join(f"{accuracy:.3f}" for accuracy in record["accuracy"][1:])

    decoding = {
        "heads, after": lambda record: f"{record['heads']}, {record['after']}",
        "tokens a pass": number("acceptance_length", ".3f"),
        "distinct tokens": number("distinct_tokens", ".1f"),
        "decoder's loss": lambda record: f"{record['loss'][0]:.4f}",
        "its accuracy": lambda record: f"{record['accuracy'][0]:.3f}",
        "accuracy of each head": of_heads,
    }
    steps = {
        "heads, stage, logits": lambda record: f"{record['heads']}, {record['stage']}, {TITLES[record['head']]}",
        "steps": number("steps"),
        "last loss": number("train_loss", ".4f"),
        "ms a step": number("step_seconds", ".1f", 1e-3),
        "tokens/s": number("tokens_per_second", ",.0f"),
        "temporary MiB": number("memory_bytes/temporary", ",.1f", MIB),
        "total MiB": number("memory_bytes/total", ",.1f", MIB),
        "temporary saved": number("saved", ".1%"),
        "more tokens/s": number("faster", "+.1%"),
        "losses apart": number("apart", ".0e"),
    }
    tolerance = CURVE_TOLERANCE[summary["dtype"]]
    worst = max((record["apart"] for record in summary["records"] if "apart" in record), default=None)
    verdict = (
        ""
        if worst is None
        else (
            f"\nFrom the same start the losses differ by at most {worst:.1e} of the loss: "
            f"{'the same curves' if worst <= tolerance else 'NOT the same curves'} (bound: {tolerance:.0e})."
        )
    )
    return [
        "Held-out text: greedy speculative decoding, and predictions of the text itself\n"
        + reporting.table_of(summary["evaluations"], decoding),
        "Training steps\n" + reporting.table_of(summary["records"], steps) + verdict,
    ]


def acceptance(summary: Record, axes: Axes) -> None:
    for count in dict.fromkeys(each["heads"] for each in summary["evaluations"]):
        own = [each for each in summary["evaluations"] if each["heads"] == count]
        lengths = [each["acceptance_length"] for each in own]
        axes.plot([each["after"] for each in own], lengths, "o-", label=f"{count} heads")
    axes.set(title="Greedy speculative decoding", xlabel="after", ylabel="tokens a pass")
    axes.legend()


def bars(summary: Record, figure: Callable[[Record], float], title: str, axes: Axes) -> None:
    for record in summary["records"]:
        label = f"{record['heads']} heads\nstage {record['stage']}\n{TITLES[record['head']]}"
        axes.bar_label(axes.bar(label, figure(record), color=COLORS[record["head"]]), fmt="%.0f")
    axes.tick_params(axis="x", labelsize=6)
    axes.set(title=title)


def run(args: argparse.Namespace) -> None:
    find_devices(argparse.Namespace(devices=args.devices, coordinator=None))
    text, config = text_of(args)
    if args.mesh is not None:
        check_model(config, args.mesh, "the decoder")
    with nullcontext() if args.mesh is None else jax.set_mesh(make_mesh(args.mesh)):
        run_stages(args, text, config)


def run_stages(args: argparse.Namespace, text: Text, config: DecoderConfig) -> None:
    names = ("batch_size", "length", "backbone_steps", "stage_1_steps", "stage_2_steps", "seed", "decay", "weight")
    settings = {**asdict(config), **{name: getattr(args, name) for name in names}, "model": str(args.model or "")}
    runs.open_folder(args, settings, (BACKBONE, *(f"{count}_heads" for count in range(1, 17))))
    backbone, records, evaluations = backbone_of(args, text, config), [], []
    for count in args.medusa_heads:
        model = Medusa(config, count, options.jliger_head(args), text.end, args.decay, args.weight)
        more = train_heads(args, text, model, backbone)
        records, evaluations = records + more[0], evaluations + more[1]
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "prompts": len(text.prompts)}
    summary = {**about, **settings, "records": compared(records), "evaluations": evaluations}
    panels = [
        partial(acceptance, summary),
        partial(bars, summary, lambda each: each["memory_bytes"]["temporary"] / MIB, "temporary memory of a step, MiB"),
        partial(bars, summary, lambda each: each["tokens_per_second"], "tokens per second"),
    ]
    reporting.report(args.out, summary, panels, report_of(summary))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("medusa", __doc__)
    add = options.add_run_options(parser, "runs/medusa")
    add("--eval-batches", type=COUNT, default=8, metavar="N", help="at most so many held-out ones (%(default)s)")
    add("--prompts", type=COUNT, default=64, metavar="N", help="of held-out text, to be continued (%(default)s)")
    add("--prompt-length", type=COUNT, default=32, metavar="N", help="tokens of a prompt (%(default)s)")
    add("--new-tokens", type=COUNT, default=32, metavar="N", help="tokens after each prompt (%(default)s)")
    options.add_corpus_options(parser)
    add = options.add_model_options(parser, "of a decoder trained from scratch")
    add("--model", type=Path, metavar="DIR", help="a Hugging Face folder to read the decoder from instead")
    add("--param-dtype", choices=options.DTYPES, default="float32", help="of its parameters (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    options.add_head_options(add)
    add("--medusa-heads", type=COUNT, nargs="+", default=[3, 5], metavar="K", help="heads (3 5)")
    add("--stages", type=int, choices=(1, 2), nargs="+", default=[1, 2], help="1: the heads, 2: everything (1 2)")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="sequences per step (%(default)s)")
    add("--length", type=COUNT, default=64, metavar="N", help="tokens per sequence (%(default)s)")
    for stage, steps, rate in ((BACKBONE, 300, 3e-3), ("stage-1", 60, 2e-3), ("stage-2", 60, 5e-4)):
        add(f"--{stage}-steps", type=COUNT, default=steps, metavar="N", help="optimizer steps (%(default)s)")
        add(f"--{stage}-learning-rate", type=NUMBER, default=rate, metavar="X", help="the highest (%(default)s)")
    add("--decay", type=NUMBER, default=0.8, metavar="X", help="head i's loss has weight X^i (%(default)s)")
    add("--weight", type=NUMBER, default=0.2, metavar="X", help="of the heads' loss in stage 2 (%(default)s)")
    add = parser.add_argument_group("devices").add_argument
    add("--mesh", type=mesh_axes, metavar="AXES", help="of all devices, as in fsdp=4 (default: one device)")
    add("--devices", type=COUNT, metavar="N", help="simulate N devices on this machine's CPU")
    parser.set_defaults(vocab_size=4096)
    args = parser.parse_args(argv)
    options.check(parser, args)
    for name in ("batch_size", "prompts"):
        if getattr(args, name) % share_of(args):
            number_of = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{number_of}: {share_of(args)} devices of --mesh can't share it")
    if max(args.medusa_heads) > 16:
        parser.error(f"--medusa-heads {max(args.medusa_heads)}: at most 16")
    if args.devices is not None and args.mesh is None:
        parser.error(f"--devices {args.devices} goes with --mesh, such as fsdp={args.devices}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("medusa", run, parse_args(argv))


if __name__ == "__main__":
    main()
