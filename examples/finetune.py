"""Fine-tunes a checkpoint from a Hugging Face folder, wholly or by LoRA, with jliger or with full logits.

    python examples/finetune.py --model DIR --data FILE.json
    python examples/finetune.py --model DIR --data FILE.json --lora-rank 16 --mesh fsdp=2

Llama 3, Qwen2, Qwen3, Gemma and Gemma 2. The result is a folder that `transformers` (or PEFT) loads. docs/finetune.md
has the options and says what a run leaves behind.
"""

# Said before the imports, which take a while.
import loading  # noqa: F401, I001

import argparse
import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import decoder
import exporting
import jax
import numpy as np
import optax
import options
import pretrained
import reporting
import runs
from corpus import Batches
from decoder import DecoderConfig, Tree
from instructions import ModelTokenizer, eval_batches, pack, read_dataset, split
from jax.sharding import Mesh
from options import COUNT, COUNT_OR_ZERO, DTYPES, NUMBER, NUMBER_OR_ZERO
from runs import Record, RunError, say
from train_sharded import check_model, find_devices, make_mesh, mesh_axes
from training import Training, device_memory, train
from tuning import Tuning, leaf_count

EXPORT = "model"
EXPORTS = ("merged", "adapter", "none")
# Of a full fine-tune and of adapters.
LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4
LEFT_OUT = "left_out.txt"
DEFAULT_OUT = "runs/finetune"


def schedule_of(args: argparse.Namespace) -> optax.Schedule:
    """A linear warmup from 0, then a cosine decay to a tenth."""
    high = args.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, high, args.warmup_steps, args.steps, high / 10)


def optimizer_of(args: argparse.Namespace, tuning: Tuning) -> optax.GradientTransformation:
    """AdamW after clipping; norms and biases do not decay."""
    decays = jax.tree.map(lambda leaf: leaf.is_matrix, tuning.trained())
    adamw = optax.adamw(schedule_of(args), weight_decay=args.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(args.clip), adamw)


def evaluation(tuning: Tuning, batches: Sequence[np.ndarray], base: tuple[Tree, ...]) -> Callable[[Tree], Record]:
    """A function of what is trained: mean loss and perplexity over the held-out examples."""
    sums = jax.jit(tuning.loss)

    def evaluate(trained: Tree) -> Record:
        if not batches:
            return {}
        results = [sums(trained, tuning.on_devices(batch), *base) for batch in batches]
        loss, tokens = np.sum([[float(loss), float(weight)] for loss, weight in results], axis=0)
        mean = loss / max(tokens, 1)
        # JSON has no number beyond float64.
        return {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": int(tokens)}

    return evaluate


@dataclass(frozen=True)
class Data:
    """Rows to train on (`instructions.pack`), held-out batches of such rows, and the records that were left out."""

    rows: np.ndarray
    heldout: list[np.ndarray]
    problems: list[str]

    @classmethod
    def read(cls, args: argparse.Namespace, vocab_size: int) -> "Data":
        dataset = read_dataset(args.data, ModelTokenizer(args.model), args.length)
        say(f"data: {dataset.in_words()}")
        examples = split(dataset, args.eval_fraction, args.seed)
        rows, heldout = (pack(part, args.length, args.packing) for part in examples)
        largest = max(int(part[:, :2].max(initial=0)) for part in (rows, heldout))
        if largest >= vocab_size:
            raise RunError(
                f"the tokenizer gives the id {largest}, and config.json has vocab_size {vocab_size}; resize the "
                "checkpoint's embedding and head for the tokens that were added"
            )
        filled = np.mean(rows[:, 2] > 0)
        say(f"data: {len(rows)} rows of {args.length} to train on, {filled:.0%} full; {len(heldout)} rows held out")
        return cls(rows, eval_batches(heldout, args.batch_size, args.eval_batches), dataset.problems)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.rows.tobytes()).hexdigest()[:16]


def tuning_of(args: argparse.Namespace, config: DecoderConfig, mesh: Mesh | None) -> Tuning:
    return Tuning(
        config=config,
        head=args.head,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        groups=tuple(args.lora_targets),
        dtype=args.param_dtype,
        is_packed=args.packing,
        mesh=mesh,
        head_options={"implementation": args.implementation, "chunk_size": args.chunk_size},
    )


def settings_of(args: argparse.Namespace, config: DecoderConfig, data: Data) -> Record:
    """What shapes the curve. The mesh and the microbatches only change the rounding, and may change."""
    names = ("head", "dtype", "param_dtype", "steps", "batch_size", "length", "packing", "learning_rate", "clip")
    names += ("warmup_steps", "weight_decay", "seed", "lora_rank", "lora_alpha", "lora_targets")
    sizes = {key: value for key, value in asdict(config).items() if key != "windows"}
    own = {name: getattr(args, name) for name in names}
    return {"model": str(args.model), "data": data.digest, **sizes, **own}


def training_of(args: argparse.Namespace, tuning: Tuning, data: Data) -> Training:
    """The training. A full fine-tune reads the checkpoint when it begins, one of adapters reads it in any case."""
    load = partial(pretrained.load, args.model, tuning.config, tuning.dtype, tuning.sharding)
    base = (load(),) if tuning.rank else ()
    initial = partial(tuning.initial_adapters, args.seed) if tuning.rank else load
    program = tuning.program(optimizer_of(args, tuning), initial, args.batch_size, args.length, args.accumulate)
    batches = Batches(data.rows, args.batch_size, args.seed)

    def figures(results: Sequence[Any], batch: jax.Array, seconds: float) -> Record:
        return {"counted": float(results[-1].weight), "tokens_per_second": args.batch_size * args.length / seconds}

    return Training(
        args.head,
        args.out,
        program,
        lambda step, trained: tuning.on_devices(batches[step - 1]),
        evaluation(tuning, data.heldout, base),
        figures,
        given=base,
        about={"parameters": decoder.parameter_count(tuning.config), "trained": leaf_count(tuning.trained())},
    )


def export(args: argparse.Namespace, tuning: Tuning, trained: Tree, base: tuple[Tree, ...]) -> None:
    folder = args.out / EXPORT
    shutil.rmtree(folder, ignore_errors=True)
    if args.export == "adapter":
        exporting.export_adapter(folder, args.model, tuning.config, trained, tuning.rank, tuning.alpha)
    elif tuning.rank:
        exporting.export_model(folder, args.model, tuning.config, base[0], trained, tuning.scale)
    else:
        exporting.export_model(folder, args.model, tuning.config, trained)
    say(f"the model is in {folder}")


def report(args: argparse.Namespace, settings: Record) -> None:
    """Prints the last figures; writes the summary and the plot."""
    events = {args.head: runs.read_metrics(args.out)}
    summary = reporting.summarize(events, settings)
    summary["heads"][args.head]["peak_bytes"] = device_memory("peak_bytes_in_use")
    heldout = {f"held-out {name}": reporting.number(f"heldout/{name}", ".4f") for name in ("loss", "perplexity")}
    panels = [
        reporting.curves_panel(events, "Loss", "loss", ("train", "eval"), "nats per token"),
        reporting.curves_panel(events, "Speed", "tokens_per_second", ylabel="tokens per second"),
    ]
    reporting.report(args.out, summary, panels, [reporting.summary_table(summary, reporting.LAST_LOSS | heldout)])


def check_mesh(args: argparse.Namespace, config: DecoderConfig, mesh: Mesh) -> None:
    check_model(config, mesh.shape, "the model")
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if args.batch_size % (share := args.accumulate * data * fsdp):
        raise RunError(
            f"--batch-size {args.batch_size} must be a multiple of {share}: --accumulate {args.accumulate} times "
            f"data={data} times fsdp={fsdp}"
        )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a checkpoint folder as Hugging Face has it")
    add("--data", type=Path, required=True, metavar="FILE", help="JSON or JSON lines: instructions, messages or texts")
    add("--dtype", choices=DTYPES, help="of the arithmetic (default: bfloat16, on a CPU float32)")
    add("--param-dtype", choices=DTYPES, help="of the parameters (default: float32; under adapters as --dtype)")
    add("--no-packing", dest="packing", action="store_false", help="one example per row")
    add("--eval-fraction", type=NUMBER_OR_ZERO, default=0.05, metavar="X", help="of the examples (%(default)s)")


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora-rank", type=COUNT_OR_ZERO, default=0, metavar="R", help="of adapters; 0: train all (%(default)s)")
    add("--lora-alpha", type=NUMBER, metavar="X", help="products are multiplied by X/R (default: 2R)")
    add("--lora-targets", choices=list(adapters.GROUPS), nargs="+", help="(attention mlp)")

    add = parser.add_argument_group("training").add_argument
    options.add_head_options(add, choices=decoder.HEAD_NAMES)
    add("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="rows per step, over all devices (%(default)s)")
    add("--length", type=COUNT, default=512, metavar="N", help="tokens per row (%(default)s)")
    add("--accumulate", type=COUNT, default=1, metavar="K", help="microbatches per step (%(default)s)")
    rates = f"{LEARNING_RATE}, for adapters {LORA_LEARNING_RATE}"
    add("--learning-rate", type=NUMBER, metavar="X", help=f"the highest, after warmup (default: {rates})")
    add("--warmup-steps", type=COUNT_OR_ZERO, metavar="N", help="(default: a tenth of the steps, at most 10)")
    add("--weight-decay", type=NUMBER_OR_ZERO, default=0.0, metavar="X", help="of AdamW (%(default)s)")
    add("--clip", type=NUMBER, default=1.0, metavar="X", help="the largest norm of the gradient (%(default)s)")
    options.add_eval_options(add, every=50, batches=50)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("finetune", __doc__)
    add_model_options(parser)
    add_tuning_options(parser)
    add = parser.add_argument_group("devices").add_argument
    add("--mesh", type=mesh_axes, metavar="AXES", help="as in data=2,fsdp=2,tensor=1 (default: all devices on fsdp)")
    add("--devices", type=COUNT, metavar="N", help="simulate N devices on this machine's CPU")
    add = options.add_run_options(parser, DEFAULT_OUT, checkpoint_every=100)
    add("--stop-at", type=COUNT, metavar="STEP", help="stop here, with the schedule of all --steps")
    add("--export", choices=EXPORTS, default="merged", help="what is written at the end (%(default)s)")
    args = parser.parse_args(argv)
    options.check(parser, args)
    of_adapters = {"--export adapter": args.export == "adapter", "--lora-alpha": args.lora_alpha is not None}
    of_adapters["--lora-targets"] = args.lora_targets is not None
    for name, is_given in of_adapters.items():
        if is_given and not args.lora_rank:
            parser.error(f"{name} goes with --lora-rank")
    if args.batch_size % args.accumulate:
        parser.error(f"--batch-size {args.batch_size} must be a multiple of --accumulate {args.accumulate}")
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    args.lora_targets = args.lora_targets or ["attention", "mlp"]
    args.learning_rate = args.learning_rate or (LORA_LEARNING_RATE if args.lora_rank else LEARNING_RATE)
    return args


def run(args: argparse.Namespace) -> None:
    find_devices(argparse.Namespace(devices=args.devices, coordinator=None))
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    args.param_dtype = args.param_dtype or (args.dtype if args.lora_rank else "float32")
    config = pretrained.read_config(args.model, args.dtype)
    mesh = make_mesh(args.mesh) if jax.device_count() > 1 or args.mesh else None
    if mesh is not None:
        check_mesh(args, config, mesh)
    # Before the data is read, which may take minutes.
    runs.check_folder(args.out, {}, resume=args.resume, overwrite=args.overwrite)
    data = Data.read(args, config.vocab_size)
    settings = settings_of(args, config, data)
    # Before an earlier run is removed.
    pretrained.check(args.model, config)
    runs.open_folder(args, settings, (runs.METRICS, runs.CHECKPOINTS, EXPORT, LEFT_OUT))
    if data.problems:
        (args.out / LEFT_OUT).write_text("\n".join(data.problems) + "\n", encoding="utf-8")
    tuning = tuning_of(args, config, mesh)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        training = training_of(args, tuning, data)
        about = ", ".join(f"{name}={size}" for name, size in mesh.shape.items()) if mesh is not None else "one device"
        say(f"model: {training.about['parameters']:,} parameters, {training.about['trained']:,} trained; {about}")
        last = args.steps if args.stop_at is None else args.stop_at
        train([training], args, last)
        if last < args.steps:
            say(f"Stopped at step {last} of {args.steps}; --resume continues.")
        elif args.export != "none":
            export(args, tuning, training.state["parameters"], training.given)
    report(args, settings)


def main(argv: Sequence[str] | None = None) -> None:
    runs.run_program("finetune", run, parse_args(argv), "--resume continues from the latest checkpoint")


if __name__ == "__main__":
    main()
