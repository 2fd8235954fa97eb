"""``python -m bench``: everything, in order, and what came of it in tables, JSON and a picture."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import trio

from agentrun import AgentrunError, ExecutorConfig, open_executor
from bench.contender import Contender, SubprocessRun, plain_spawn
from bench.idle import Idle, measure_idle, print_idle
from bench.latency import Latency, measure_latency, print_latency
from bench.lifecycle import find_lifecycles
from bench.machine import describe, more_descriptors, wait_quiet
from bench.numbers import Report
from bench.peers import BWRAP, CRUN, Peers, find_peers, install, no_leftovers
from bench.plot import plot
from bench.subjects import LIBRARY, LIBRARY_COLD, LIBRARY_NULL, Library, open_client
from bench.targets import evaluate, print_targets
from bench.throughput import Throughput, measure_throughput, print_throughput
from bench.view import enter_view

PARTS = ("latency", "throughput", "idle")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure agentrun beside what it replaces.")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not for figures")
    parser.add_argument("--calls", type=int, metavar="N", help="sequential calls of each contender (300; --quick: 40)")
    parser.add_argument("--slots", type=int, default=500, metavar="N", help="idle slots (500)")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="for results (bench/out)")
    parser.add_argument("--install", action="store_true", help="first install the peers that are missing, with apt-get")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the random order")
    options = parser.parse_args(arguments)
    if options.calls is not None and options.calls < 2:
        parser.error("--calls: at least 2")
    if options.slots < 2:
        parser.error("--slots: at least 2")
    return options


async def run(options: argparse.Namespace, scratch: Path, report: Report, view: str) -> None:
    """Measure what was asked for and write it down."""
    machine = describe()
    report.say(f"# agentrun bench, {machine.started}{' (quick: not for figures)' if options.quick else ''}")
    report.say(f"Linux {machine.kernel}, {machine.processors} x {machine.model}, {machine.memory_mb} MB, Python {machine.python}")
    if view:
        report.say(view)
    peers = find_peers(scratch, report)
    machine.versions = peers.versions
    report.say(f"peers: {', '.join(f'{name} {version}' for name, version in peers.versions.items()) or 'none'}")
    report.say(f"random seed {options.seed}")
    parts = options.only or PARTS
    latency: list[Latency] = []
    throughput: list[Throughput] = []
    idle: Idle | None = None
    steps: dict[str, float] = {}
    if "latency" in parts:
        report.heading("latency, one call at a time")
        report.say(await wait_quiet(machine, "latency"))
        latency, steps = await latency_part(options, scratch, peers, report)
    if "throughput" in parts:
        report.heading("throughput, closed loop")
        report.say(await wait_quiet(machine, "throughput"))
        throughput = await throughput_part(options, scratch, peers, report)
    if "idle" in parts:
        report.heading("idle sandboxes")
        report.say(await wait_quiet(machine, "idle"))
        try:
            idle = await measure_idle(options.slots, options.calls or (60 if options.quick else 300))
            print_idle(idle, report)
        except* AgentrunError as errors:
            report.say(f"LEFT OUT: {errors.exceptions[0]}")
    report.heading("targets")
    targets = evaluate(latency, throughput, idle)
    print_targets(targets, report)
    report.say()
    found = {
        "machine": machine, "quick": options.quick, "seed": options.seed, "view": view, "latency": latency,
        "library_steps_ms": steps, "throughput": throughput, "idle": idle, "targets": targets,
    }  # fmt: skip
    write(options.out, found, report, plot(options.out / "bench.png", machine, latency, throughput))


async def latency_part(
    options: argparse.Namespace, scratch: Path, peers: Peers, report: Report
) -> tuple[list[Latency], dict[str, float]]:
    """Everybody, one call at a time."""
    async with contextlib.AsyncExitStack() as stack:
        contenders: list[Contender] = [plain_spawn(), SubprocessRun(), *peers.programs]
        libraries: list[Library] = []
        try:
            warm = await stack.enter_async_context(open_executor())
            cold = await stack.enter_async_context(open_executor(ExecutorConfig(pool_least=0, pool_most=0)))
            await warm.warm_up(count=2)
            libraries = [
                Library(warm, note="warm; stdout and stderr captured"),
                Library(warm, LIBRARY_NULL, capture=False, note="warm; the tool writes to /dev/null, as the peers' does"),
                Library(cold, LIBRARY_COLD, note="no pool: the sandbox is built within the call"),
            ]
            contenders += libraries
        except AgentrunError as error:
            report.say(f"LEFT OUT agentrun library: {error}")
        client = await stack.enter_async_context(open_client(scratch, report))
        if client is not None:
            contenders.append(client)
        contenders += await find_lifecycles(scratch, report)
        rows = await measure_latency(contenders, options.calls or (40 if options.quick else 300), options.seed)
        print_latency(rows, report)
        for library in libraries:
            for remark in library.remarks(cold_expected=library.name == LIBRARY_COLD):
                report.say(f"NOTE {remark}")
        steps = {step: round(median(values), 4) for step, values in libraries[0].steps.items() if values} if libraries else {}
        if steps:
            report.say(f"{LIBRARY}, ms since the call, p50: " + ", ".join(f"{step} {at:.3f}" for step, at in steps.items()))
        for row in rows:
            if row.note:
                report.say(f"  {row.name}: {row.note}")
        return rows, steps


async def throughput_part(options: argparse.Namespace, scratch: Path, peers: Peers, report: Report) -> list[Throughput]:
    """Those that can be compared, with 1, 8 and 32 workers."""
    async with contextlib.AsyncExitStack() as stack:
        contenders: list[Contender] = [plain_spawn()]
        contenders += [program for program in peers.programs if program.name in (BWRAP, CRUN)]
        stack.enter_context(more_descriptors(8192))
        libraries: list[Library] = []
        try:
            libraries.append(Library(await stack.enter_async_context(open_executor())))
            contenders += libraries
        except AgentrunError as error:
            report.say(f"LEFT OUT agentrun library: {error}")
        client = await stack.enter_async_context(open_client(scratch, report))
        if client is not None:
            contenders.append(client)
        rounds, window = (2, 0.8) if options.quick else (5, 2.0)
        rows = await measure_throughput(contenders, (1, 8, 32), rounds, window, options.seed)
        print_throughput(rows, report, BWRAP)
        for remark in [remark for library in libraries for remark in library.remarks()]:
            report.say(f"NOTE {remark}")
        return rows


def write(out: Path, found: dict[str, Any], report: Report, no_plot: str) -> None:
    """bench.json, bench.txt and bench.png."""
    out.mkdir(parents=True, exist_ok=True)
    if no_plot:
        report.say(no_plot)
    report.say(f"written: {out}/bench.json, bench.txt{'' if no_plot else ', bench.png'}")
    (out / "bench.json").write_bytes(msgspec.json.encode(found) + b"\n")
    report.write(out / "bench.txt")


def main() -> int:
    """Returns 0 if it could measure, whatever it measured."""
    options = parse_arguments()
    report = Report()
    if options.install and "AGENTRUN_BENCH_VIEW" not in os.environ:
        install(report)
    view = enter_view(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    with no_leftovers(), tempfile.TemporaryDirectory(prefix="agentrun-bench-", ignore_cleanup_errors=True) as scratch:
        trio.run(run, options, Path(scratch), report, view)
    return 0


if __name__ == "__main__":
    sys.exit(main())
