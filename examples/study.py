"""Training steps of a whole model, each operation by jliger or by plain XLA: time, memory, and what offloading adds.

    python examples/study.py --model 0.6b --rms-norm --flce --batch 8        # one configuration
    python examples/study.py --model 0.6b --compare --batch 1 4 8 --each 8   # none and all; at 8 each one alone
    python examples/study.py --model 8b --all --remat --offload optimizer --parameters bfloat16

Each run adds its records to a results file, each with its command, and draws the plots beside it again. What is in the
file already is measured only if `--again` says so, and replaced. docs/study.md says what was found.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import options
import study_plot
from llama import parameter_count
from measuring import Records, in_words, measured, rates
from options import COUNT, DTYPES, NUMBER
from runs import DeviceMemoryError, Record, RunError, run_program, write_json
from study_model import KERNELS, OFFLOADS, SHAPES, Setup, step_of
from study_trace import milliseconds_by_kind
from sweeps import KEPT, command_of, parts_of, read_results, run_child
from tqdm import tqdm
from training import compile_step, device_memory, device_memory_errors

# All but the tiled MLP, which is for sequences that do not fit otherwise.
ALL = tuple(name for name in KERNELS if name != "tiled_mlp")


def setups_of(args: argparse.Namespace) -> Iterator[Setup]:
    chosen = tuple(name for name in KERNELS if getattr(args, name))
    setup = Setup(
        args.model,
        chosen,
        args.remat,
        length=args.length,
        parameters=args.parameters,
        dtype=args.dtype,
        learning_rate=args.learning_rate,
    )
    offloads = [tuple(name for name in OFFLOADS if name in each) for each in args.offload or [()]]
    for batch, offload in product(sorted(args.batch), offloads):
        for kernels in ((), ALL) if args.compare else (chosen,):
            yield replace(setup, batch=batch, kernels=kernels, offload=offload)
    for batch in sorted(args.each):
        for name in KERNELS:
            yield replace(setup, batch=batch, kernels=(name,))


def key_of(record: Record) -> str:
    """What a record is of."""
    return json.dumps({name: record[name] for name in asdict(Setup("tiny"))})


# ---- the process that measures ---------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> None:
    """Measures every configuration in this process, by batch and memory: a peak can't be reset.

    Where a batch does not fit, larger ones with the same operations are not tried.
    """
    setups = [
        Setup(**{name: tuple(value) if isinstance(value, list) else value for name, value in each.items()})
        for each in json.loads(args.setups)
    ]
    records, refused = Records(args.records), set()
    for batch in sorted({setup.batch for setup in setups}):
        tried = [setup for setup in setups if setup.batch == batch and (setup.kernels, setup.offload) not in refused]
        with ThreadPoolExecutor(args.compilers) as pool:
            prepared = list(pool.map(prepare, tried))
        # XLA tries kernels while it compiles. Where memory was too little for several such trials, one may do.
        prepared = [prepare(each[0]) if each[1] is None else each for each in prepared]
        for setup, step, compiled in sorted(prepared, key=needed):
            about = {**asdict(setup), "parameter_count": parameter_count(setup.config)}
            record = records.add(about, partial(measure, args, setup, step, compiled))
            if record["out_of_memory"]:
                refused.add((setup.kernels, setup.offload))
            print(f"{name_of(record)}: {in_words(record)}", flush=True)


def prepare(setup: Setup) -> Any:
    """A configuration with its step and the compiled program; in their place None and an error, if it does not fit."""
    try:
        step = step_of(setup)
        return setup, step, compile_step(step.traced)
    except DeviceMemoryError as error:
        return setup, None, error


def needed(prepared: Any) -> float:
    """Bytes of a device, about: the program's and those of the state that is no argument of it."""
    _, step, compiled = prepared
    return float("inf") if step is None else compiled.memory["total"] + step.beside


def measure(args: argparse.Namespace, setup: Setup, step: Any, compiled: Any) -> Record:
    if step is None:
        raise compiled
    tokens, losses, state = setup.tokens(), [], None
    before = device_memory("peak_bytes_in_use")

    def run() -> Any:
        nonlocal state
        state = step.begin() if state is None else state
        state, loss = step.step(compiled.step, state, tokens)
        losses.append(loss)
        bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
        bar.update()
        return state

    with tqdm(total=1 + args.steps, desc=name_of(asdict(setup)), unit="step", disable=args.no_progress) as bar:
        record = measured(compiled, run, args.steps, args.timed_seconds)
        if record["peak_bytes"] == before:
            # XLA needed more when it tried kernels.
            record["peak_bytes"] = None
        if args.traces is not None and setup.batch in (args.trace_batch or [setup.batch]):
            folder = args.traces / name_of(asdict(setup)).replace(", ", "-").replace(" ", "")
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.save_device_memory_profile(str(folder / "memory.prof"))
            with device_memory_errors():
                record["milliseconds_by_kind"] = milliseconds_by_kind(run, folder)
    speed = rates(setup.config, (setup.batch, setup.length), record["milliseconds"] / 1e3)
    host = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.sharding.memory_kind == "pinned_host")
    return {**record, **speed, "host_bytes": host, "losses": [float(loss) for loss in losses]}


# ---- the process that starts it --------------------------------------------------------------------------------


def name_of(record: Record) -> str:
    """A configuration in a few words."""
    kernels = set(record["kernels"])
    named = "none" if not kernels else "all" if kernels == set(ALL) else "+".join(record["kernels"])
    words = [record["model"], named, "remat" if record["is_remat"] else ""]
    words += [f"offload {'+'.join(record['offload'])}"] if record["offload"] else []
    return ", ".join([*filter(None, words), f"batch {record['batch']}"])


def child(args: argparse.Namespace, group: Sequence[Record]) -> Record | None:
    """What a process measures of some configurations."""
    traces = [] if args.traces is None else ["--traces", args.traces, "--trace-batch", *args.trace_batch]
    own = ["--steps", args.steps, "--timed-seconds", args.timed_seconds, "--compilers", args.compilers, *traces]
    own += ["--no-progress"] if args.no_progress else []
    return run_child(
        name_of(group[0]) + (f" and {len(group) - 1} more" if len(group) > 1 else ""),
        "study.py",
        [*own, "--setups", json.dumps(group), "--records"],
        args.timeout,
        # With the memory in one piece, what has been freed is there for the next configuration.
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": f"{args.host_gib}"},
    )


def run(args: argparse.Namespace, command: str) -> None:
    if args.records is not None:
        measure_all(args)
        return
    out: Path = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_results(out, asdict(Setup("tiny")))["records"] if out.exists() else []
    records = {key_of(record): record for record in earlier}
    setups = {key_of(asdict(setup)): asdict(setup) for setup in setups_of(args)}
    groups = [[setup for key, setup in setups.items() if args.again or key not in records]]
    if args.separate:
        groups = [[setup] for setup in groups[0]]
    for found in parts_of(partial(child, args, group) for group in groups if group):
        environment = {**found["environment"], "command": command}
        records |= {key_of(record): {**record, "environment": environment} for record in found["records"]}
        write_json(out, {"records": list(records.values())})
    if not records:
        raise RunError("nothing was measured")
    study_plot.plot(list(records.values()), out)
    print(f"written: {out}, and plots beside it")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser_of("study", __doc__)
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="tiny", help="sizes of the model (%(default)s)")
    for name in KERNELS:
        add(f"--{name.replace('_', '-')}", action="store_true", help=f"jliger's {name}")
    add("--all", action="store_true", help=f"{', '.join(ALL)}")
    add("--compare", action="store_true", help="none and all of these, whatever is switched on")
    add("--each", type=COUNT, nargs="*", default=[], metavar="N", help="each alone, at batches of N sequences")
    add("--batch", type=COUNT, nargs="*", default=[1], metavar="N", help="sequences (1)")
    add("--length", type=COUNT, default=2048, metavar="N", help="tokens a sequence (%(default)s)")
    add("--remat", action="store_true", help="keep each layer's input alone, and compute the layer again")
    add(
        "--offload",
        choices=OFFLOADS,
        nargs="+",
        action="append",
        default=[],
        help="what lies in host memory; given several times, each of them is a configuration",
    )
    add("--parameters", choices=DTYPES, default="float32", help="dtype of parameters (%(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the arithmetic (%(default)s)")
    add("--learning-rate", type=NUMBER, default=3e-4, metavar="X", help="of AdamW (%(default)s)")
    add("--steps", type=COUNT, default=8, metavar="N", help="timed, after one (%(default)s)")
    add("--timed-seconds", type=NUMBER, default=20.0, metavar="X", help="no more of them after this time (%(default)s)")
    add("--again", action="store_true", help="measure what the results file has, too, and replace it")
    add("--separate", action="store_true", help="a process for each configuration, not one for all of them")
    add("--compilers", type=COUNT, default=4, metavar="N", help="programs compiled at once (%(default)s)")
    add("--timeout", type=NUMBER, default=900.0, metavar="S", help="seconds of a process (%(default)s)")
    add("--host-gib", type=COUNT, default=80, metavar="N", help="host memory to offload to, at most (%(default)s)")
    add("--traces", type=Path, metavar="FOLDER", help="keep a memory profile and a trace of each configuration there")
    add("--trace-batch", type=COUNT, nargs="*", default=[], metavar="N", help="of these batches alone (default: all)")
    add("--out", type=Path, default=Path("results/study.json"), help="results; plots beside (%(default)s)")
    add("--no-progress", action="store_true", help="draw no progress bars")
    for name in ("setups", "records"):
        add(f"--{name}", type=Path if name == "records" else str, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ALL if args.all else ():
        setattr(args, name, True)
    if args.tiled_mlp and args.swiglu:
        parser.error("--tiled-mlp replaces --swiglu: use one of them")
    if any("activations" in each for each in args.offload) and not args.remat:
        parser.error("--offload activations needs --remat: without it, a layer keeps more than its input")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    run_program("study", partial(run, command=command_of("study", argv)), parse_args(argv), KEPT)


if __name__ == "__main__":
    main()
