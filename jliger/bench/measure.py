"""The measurements of one process: compiles all programs first, then times methods and floors alternately."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jliger.bench import timing
from jliger.bench.problem import Bound, Floor, Method, Problem
from jliger.bench.timing import Effort, Timed

Record = dict[str, Any]
GROUP = 8  # methods that are timed alternately with each other and with the floor
MIB = 2**20


class Programs:
    """The compiled programs of problems, by problem and name.

    They are traced and lowered one after the other, and compiled in parallel: XLA's compiler releases Python's GIL.

    Attributes:
      first_calls: the seconds of each stage of a first call, for the methods that are timed.
    """

    def __init__(self, problems: Sequence[Problem], *, time_first_calls: bool = False, threads: int = 12):
        self.first_calls: dict[tuple[str, str], dict[str, float]] = {}
        self._compiled: dict[tuple[str, str], jax.stages.Compiled | None] = {}
        if time_first_calls:
            self._time_first_calls(problems[0])
        jobs: dict[tuple[str, str], tuple[jax.stages.Lowered, dict[str, Any]]] = {}
        futures: dict[tuple[str, str], Future[jax.stages.Compiled]] = {}
        with ThreadPoolExecutor(threads) as pool:
            for problem in tqdm(problems, desc="tracing", unit="shape"):
                for name, function, shapes, flags in _programs(problem):
                    if (key := (str(problem.shape), name)) not in self._compiled.keys() | futures.keys():
                        jobs[key] = (jax.jit(function).lower(*shapes), flags)
                        futures[key] = pool.submit(_compile, *jobs[key])
            for key in tqdm(futures, desc="compiling", unit="program"):
                if futures[key].exception() is None:
                    self._compiled[key] = futures[key].result()
        for key in futures.keys() - self._compiled.keys():
            try:  # again, alone: autotuning in parallel may have run out of memory
                self._compiled[key] = _compile(*jobs[key])
            except RuntimeError as error:
                tqdm.write(f"{key}: {str(error)[:300]}")
                self._compiled[key] = None

    def get(self, problem: Problem, name: str) -> jax.stages.Compiled | None:
        """The compiled program, or None if it could not be compiled."""
        return self._compiled[str(problem.shape), name]

    def _time_first_calls(self, problem: Problem) -> None:
        """Times tracing, lowering, compiling and autotuning of each method, in a process that has just started.

        The time of autotuning is the difference between compilation with and without it.
        """
        _compile(jax.jit(jnp.dot).lower(jnp.ones((512, 512)), jnp.ones((512, 512))), {})  # loads XLA's libraries
        for method in tqdm([m for m in problem.methods if m.first_call], desc="first calls", unit="method"):
            shapes = jax.eval_shape(functools.partial(problem.operands, method.kernel_dtype))
            at = [time.perf_counter()]
            traced = jax.jit(method.function).trace(*shapes)
            at.append(time.perf_counter())
            lowered = traced.lower()
            at.append(time.perf_counter())
            compiled = _compile(lowered, dict(method.flags))
            at.append(time.perf_counter())
            if jax.default_backend() == "gpu":
                _compile(lowered, {**method.flags, "xla_gpu_autotune_level": 0})
            at.append(time.perf_counter())
            trace, lower, compile_all, untuned = (end - start for start, end in itertools.pairwise(at))
            untuned = min(compile_all, untuned)
            key = (str(problem.shape), method.name)
            self._compiled[key] = compiled
            stages = {"trace": trace, "lower": lower, "compile": untuned, "autotune": compile_all - untuned}
            self.first_calls[key] = {**stages, "all": trace + lower + compile_all}


def _programs(problem: Problem) -> Iterator[tuple[str, Callable[..., Any], Sequence[Any], dict[str, Any]]]:
    """The name, function, argument shapes and flags of every program of a problem."""
    for dtype in dict.fromkeys(method.kernel_dtype for method in problem.methods):
        yield _operands_of(dtype), functools.partial(problem.operands, dtype), (), {}
    for floor in problem.floors:
        yield _operands_of(floor.name), floor.operands, (), {}
        yield floor.name, floor.function, jax.eval_shape(floor.operands), {}
    for method in problem.methods:
        shapes = jax.eval_shape(functools.partial(problem.operands, method.kernel_dtype))
        yield method.name, method.function, shapes, dict(method.flags)


def _compile(lowered: jax.stages.Lowered, flags: dict[str, Any]) -> jax.stages.Compiled:
    return lowered.compile(compiler_options=flags or None)


def copy_bandwidth(effort: Effort, megabytes: int = 1024) -> float:
    """The bandwidth of a large copy: bytes read and written per second."""
    array = jax.random.normal(jax.random.key(0), (megabytes // 2, MIB), jnp.bfloat16)
    copy = functools.partial(jax.jit(jnp.negative), array)
    jax.block_until_ready(copy())
    return 2 * array.nbytes / timing.median(timing.time_in_turn({"copy": Timed(copy)}, effort)["copy"])


def measure_methods(
    problem: Problem, programs: Programs, bandwidth: float | None, effort: Effort, progress: "tqdm[Any]"
) -> list[Record]:
    """A record of each floor and each method of a problem."""
    floors = {floor.name: floor for floor in problem.floors}
    calls = _Calls(problem, programs)
    records: dict[str, Record] = {}
    for group in _groups(problem.methods):
        things = {m.name: thing for m in group if (thing := calls.of_method(m)) is not None}
        wanted = [name for name in floors if any(name in _floors_of(method) for method in group)]
        times = _time_what_fits(problem, {**calls.of_floors(wanted), **things} if things else {}, effort)
        _keep_floors(records, floors, times)
        for method in group:
            if method.name in records:
                continue
            progress.update()
            record: Record = {"name": method.name, "extra_mib": calls.extra_mib(method), **method.about}
            if method.flags:
                record["flags"] = _shown(method.flags)
            if stages := programs.first_calls.get((str(problem.shape), method.name)):
                record["first_call"] = stages
            if method.name in times:
                record |= speed(times, floors, bandwidth, method.name, method.floor, method.bound)
                if method.baseline in times:
                    baseline, own = (timing.median(times[name]) for name in (method.baseline, method.name))
                    record |= {"baseline": method.baseline, "of_baseline": baseline / own}
                if method.repeats > 1:
                    record |= _of_one(record, method.repeats)
            records[method.name] = record
    return list(records.values())


def measure_peers(problem: Problem, programs: Programs, effort: Effort, progress: "tqdm[Any]") -> list[Record]:
    """A record of each peer of a problem."""
    floors = {floor.name: floor for floor in problem.floors}
    calls = _Calls(problem, programs)
    records: list[Record] = []
    for peers in _chunks(problem.peers, GROUP):
        prepared = {peer.name: peer.prepare() for peer in peers}
        starts = {name: timing.first_call(thing) for name, (thing, _) in prepared.items()}
        wanted = [name for name in floors if any(name == peer.floor for peer in peers)]
        things = {name: thing for name, (thing, _) in prepared.items()}
        times = _time_what_fits(problem, {**calls.of_floors(wanted), **things}, effort)
        for peer in peers:
            progress.update()
            if peer.name in times:
                about: Record = {"name": peer.name, "first_call": {"all": starts[peer.name]}}
                about["extra_mib"] = prepared[peer.name][1]() / MIB
                records.append(about | speed(times, floors, None, peer.name, peer.floor, None))
    return records


def speed(
    times: Mapping[str, list[float]],
    floors: Mapping[str, Floor],
    bandwidth: float | None,
    name: str,
    floor: str | None,
    bound: Bound | None,
) -> Record:
    """The speed of one method, from its bursts and those of the floors that were timed alternately with it.

    Values that depend on a floor that did not fit, or on a bandwidth of None, are left out.
    """
    own = timing.median(times[name])
    medians = {key: timing.median(times[key]) * floors[key].times for key in floors if key in times}
    record: Record = {"milliseconds": own * 1e3, "bursts": [1e3 * seconds for seconds in times[name]]}
    if floor in medians:
        record |= {"floor": floor, "floor_milliseconds": 1e3 * medians[floor], "of_floor": medians[floor] / own}
    if bound is not None and bandwidth is not None and medians.keys() >= set(bound.floors):
        least = bound.seconds(medians, bandwidth)
        record |= {"bound_milliseconds": 1e3 * least, "of_bound": least / own}
    return record


def _of_one(record: Record, repeats: int) -> Record:
    """The times in a record, of one repetition."""
    times = {name: record[name] / repeats for name in ("milliseconds", "bound_milliseconds") if name in record}
    return {**times, "bursts": [burst / repeats for burst in record["bursts"]]}


class _Calls:
    """The compiled programs of a problem with their operands, which are made once."""

    def __init__(self, problem: Problem, programs: Programs):
        self._problem, self._programs = problem, programs
        self._operands: dict[str, Any] = {}

    def of_floors(self, names: Sequence[str]) -> dict[str, Timed]:
        return {name: thing for name in names if (thing := self._timed(name, name)) is not None}

    def of_method(self, method: Method) -> Timed | None:
        """The call of a method; None if it could not be compiled, or is not to be run."""
        return None if method.memory_only else self._timed(method.name, method.kernel_dtype)

    def extra_mib(self, method: Method) -> float | None:
        """The memory of a program beyond its arguments and results, as XLA reports it."""
        compiled = self._programs.get(self._problem, method.name)
        analysis = None if compiled is None else compiled.memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes / MIB

    def _timed(self, name: str, operands: str) -> Timed | None:
        compiled = self._programs.get(self._problem, name)
        make = self._programs.get(self._problem, _operands_of(operands))
        if compiled is None or make is None:
            return None
        if operands not in self._operands:
            self._operands[operands] = make()
        return Timed(functools.partial(compiled, *self._operands[operands]))


def _time_what_fits(problem: Problem, things: Mapping[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Alternating bursts of the calls that fit in the device's memory."""
    fitting: dict[str, Timed] = {}
    for name, thing in things.items():
        try:
            timing.first_call(thing)
        except RuntimeError as error:
            tqdm.write(f"{problem.shape}, {name}: {str(error)[:200]}")
        else:
            fitting[name] = thing
    return timing.time_in_turn(fitting, effort)


def _keep_floors(records: dict[str, Record], floors: Mapping[str, Floor], times: Mapping[str, list[float]]) -> None:
    """Adds records of floors, from the first group that was timed with them."""
    for floor in floors.values():
        if floor.name in times and floor.name not in records:
            seconds = timing.median(times[floor.name]) * floor.times
            records[floor.name] = {
                "name": floor.name,
                "is_floor": True,
                "milliseconds": 1e3 * seconds,
                "bursts": [1e3 * burst * floor.times for burst in times[floor.name]],
                "tflops": floor.flops / seconds / 1e12,
            }


def _floors_of(method: Method) -> set[str]:
    return {*((method.floor,) if method.floor else ()), *(method.bound.floors if method.bound else ())}


def _groups(methods: Sequence[Method]) -> Iterator[list[Method]]:
    """Groups of methods with the same floor, with their baselines."""
    by_name = {method.name: method for method in methods}
    for floor in dict.fromkeys(method.floor for method in methods):
        for chunk in _chunks([method for method in methods if method.floor == floor], GROUP):
            missing = {m.baseline for m in chunk if m.baseline} - {m.name for m in chunk}
            yield [*(by_name[name] for name in sorted(missing) if name in by_name), *chunk]


def _chunks[Item](items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _operands_of(name: str) -> str:
    return f"operands of {name}"


def _shown(flags: Mapping[str, Any]) -> str:
    return " ".join(f"--{name}={str(value).lower() if value is False else value}" for name, value in flags.items())
