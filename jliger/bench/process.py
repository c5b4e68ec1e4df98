"""A measuring process of a benchmark: it measures everything once, and writes its results after each shape."""

import argparse
from typing import Any

import jax
from tqdm import tqdm

from jliger.bench import chunk_sizes, distillation, float8, head, logprobs, measure, mesh, operations, report, top_k
from jliger.bench.measure import Record
from jliger.bench.problem import Problem
from jliger.bench.timing import Effort


def run(arguments: argparse.Namespace) -> None:
    effort = Effort()
    result: Record = {"environment": report.environment(), "records": []}

    def keep(what: str, shape: object, records: list[Record]) -> None:
        result["records"] += [{"what": what, "shape": str(shape), **record} for record in records]
        report.write_json(arguments.part, result)

    if problems := _problems(arguments):
        first_calls = arguments.first_calls and not {"head", "float8"}.isdisjoint(arguments.what)
        programs = measure.Programs([problem for _, problem in problems], time_first_calls=first_calls)
        bandwidth = None
        if jax.default_backend() == "gpu":
            bandwidth = measure.copy_bandwidth(effort)
            result["copy_gb_per_second"] = bandwidth / 1e9
        with tqdm(total=sum(len(p.methods) + len(p.peers) for _, p in problems), unit="method") as progress:
            for what, problem in problems:
                progress.set_description(f"{what} {problem.shape}")
                # Each call of these does its work several times.
                own = Effort(seconds=0.05) if what == "operations" else effort
                keep(what, problem.shape, measure.measure_methods(problem, programs, bandwidth, own, progress))
            for what, problem in problems:
                progress.set_description(f"{what} {problem.shape}, PyTorch")
                keep(what, problem.shape, measure.measure_peers(problem, programs, effort, progress))
    if "mesh" in arguments.what:
        for count, arrangement in tqdm(mesh.plan(), unit="arrangement"):
            record = mesh.measure(count, arrangement, mesh.per_device(), effort)
            keep("mesh", record["shape"], [record])


def _problems(arguments: argparse.Namespace) -> list[tuple[str, Problem]]:
    """The problems to measure, each with the name of its benchmark."""
    result: list[tuple[str, Problem]] = []
    for what in arguments.what:
        if what == "head":
            options: dict[str, Any] = {"with_peers": arguments.peers, "quick": arguments.quick, "only": arguments.only}
            result += [(what, problem) for problem in head.problems(**options)]
        elif what == "chunk_sizes":
            result += [(what, problem) for problem in chunk_sizes.problems(with_peers=arguments.peers)]
        elif what == "logprobs":
            result += [(what, problem) for problem in logprobs.problems()]
        elif what == "operations":
            result += [(what, problem) for problem in operations.problems(quick=arguments.quick)]
        elif what == "distillation":
            result += [(what, problem) for problem in distillation.problems()]
        elif what == "top_k":
            result += [(what, problem) for problem in top_k.problems()]
        elif what == "float8":
            result += [(what, problem) for problem in float8.problems(quick=arguments.quick)]
    return result
