"""One of the processes of a benchmark: it measures everything once, and writes what it has after each shape."""

import argparse
from typing import Any

import jax
from tqdm import tqdm

from jliger.bench import distillation, head, logprobs, measure, mesh, report
from jliger.bench.measure import Record
from jliger.bench.problem import Problem
from jliger.bench.timing import Effort


def run(arguments: argparse.Namespace) -> None:
    effort = Effort()
    problems = _problems(arguments)
    if arguments.first_call is not None:
        _first_call(arguments, problems)
        return
    found: Record = {"environment": report.environment(), "records": []}
    if problems:
        programs = measure.Programs([problem for _, problem in problems])
        bandwidth = None
        if jax.default_backend() == "gpu":
            bandwidth = measure.copy_bandwidth(effort)
            found["copy_gb_per_second"] = bandwidth / 1e9
        with tqdm(total=sum(len(p.methods) + len(p.peers) for _, p in problems), unit="method") as progress:
            for what, problem in problems:
                progress.set_description(f"{what} {problem.shape}")
                found["records"] += measure.measure(what, problem, programs, bandwidth, effort, progress)
                report.write_json(arguments.part, found)
    if "mesh" in arguments.what:
        for count, arrangement in tqdm(mesh.plan(), unit="arrangement"):
            found["records"].append(mesh.measure(count, arrangement, mesh.per_device(), effort))
            report.write_json(arguments.part, found)


def _problems(arguments: argparse.Namespace) -> list[tuple[str, Problem]]:
    """What is measured, with the benchmark that it belongs to."""
    found: list[tuple[str, Problem]] = []
    for what in arguments.what:
        if what == "head":
            options: dict[str, Any] = {"with_peers": arguments.peers, "quick": arguments.quick, "only": arguments.only}
            found += [(what, problem) for problem in head.problems(**options)]
        elif what == "logprobs":
            found += [(what, problem) for problem in logprobs.problems()]
        elif what == "distillation":
            found += [(what, problem) for problem in distillation.problems()]
    return found


def _first_call(arguments: argparse.Namespace, problems: list[tuple[str, Problem]]) -> None:
    what, problem = problems[0]
    records = [
        {"what": what, "shape": str(problem.shape), "name": m.name, "first_call": measure.first_call(problem, m)}
        for m in problem.methods
        if m.name == arguments.first_call
    ]
    report.write_json(arguments.part, {"environment": report.environment(), "records": records})
