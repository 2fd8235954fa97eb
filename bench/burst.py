"""``python -m bench.burst``: how far beyond its budget a writer gets, and how fast it is stopped, beside polling from user space.

Every round runs every way to use memory (tests/hog.c) under every method, in an order drawn anew. A hog wants eight times its
budget. What is measured is what it got: the larger of what it says itself and what its call's account says; and how long it went
on writing beyond.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from agentrun import Executor, ExecutorConfig, Limits, Policy, Result, open_executor
from bench.machine import describe, wait_quiet
from bench.numbers import Report, cell, quantile
from tests.hog import GROWING, Progress, available, compile_hog

MIB = 1 << 20
BUDGET = 64
TOTAL = 512
"""Megabytes."""
POLLS = {"poll 10 ms": 0.01, "poll 100 ms": 0.1}
"""What a watcher in user space does: add up the resident size of the call's processes, kill when it is above."""
METHODS = ("BPF kill", "BPF stop", *POLLS)
POLL_EVERY = 4
"""Polling takes its time: it is in one round of so many."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One hog under one method."""

    mode: str
    method: str
    stopped: bool
    overshoot: int
    """Bytes."""
    beyond: float
    """Seconds it went on writing above the budget, by its own clock; 0 if it never got there."""
    reaction: float | None
    """Seconds from what the kernel saw to what the governor did."""


class Bench:
    """Two executors: with the probes process, and without for those that poll."""

    def __init__(self, guarded: Executor, plain: Executor, hog: Path, directory: Path) -> None:
        self.guarded, self.plain, self.hog, self.directory = guarded, plain, hog, directory

    async def run(self, mode: str, method: str) -> Run:
        """Run a hog, and see how far it got."""
        with Progress(self.directory / "progress") as progress:
            os.chmod(progress.path, 0o666)
            argv = progress.argv(self.hog, mode, TOTAL, BUDGET)
            if method in POLLS:
                result = await self._polled(argv, POLLS[method])
            else:
                action = "kill" if method == "BPF kill" else "stop"
                limits = Limits(memory_high=BUDGET * MIB, memory_max=None, on_exhausted=action, freeze_seconds=0.02)  # type: ignore[arg-type]
                result = await self.guarded.run(
                    argv, policy=Policy(name=method, limits=limits), timeout=60, workspace=self._workspace
                )
            peak = max(progress.bytes, result.usage.memory_peak or 0)
            steps = [step for step in result.bursts if step.rung in ("killed", "frozen")]
            return Run(
                mode=mode, method=method, stopped=not result.ok, overshoot=max(0, peak - BUDGET * MIB),
                beyond=(progress.reaction_ns or 0) / 1e9, reaction=steps[0].reaction if steps else None,
            )  # fmt: skip

    @property
    def _workspace(self) -> str:
        return str(self.directory)

    async def _polled(self, argv: Sequence[str], period: float) -> Result:
        policy = Policy(name="polled", limits=Limits(memory_max=None), best_effort=True)
        async with (
            self.plain.start(argv, policy=policy, timeout=60, workspace=self._workspace) as call,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._poll, call.id, period)
            result = await call.wait()
            nursery.cancel_scope.cancel()
            return result

    async def _poll(self, name: str, period: float) -> None:
        await trio.sleep(random.random() * period)  # a watcher is somewhere in its period when a spike begins
        while (call := self.plain.calls().get(name)) is not None and call.slot is not None:
            if sum(map(resident, call.slot.leaf.pids())) > BUDGET * MIB:
                call.kill()
                return
            await trio.sleep(period)


def resident(pid: int) -> int:
    """Bytes a process has in memory; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


async def measure(rounds: int, modes: Sequence[str], report: Report, seed: int) -> list[Run]:
    """Every mode and method, ``rounds`` times."""
    machine = describe()
    report.say(f"# bursts, {machine.started}: Linux {machine.kernel}, {machine.processors} x {machine.model}")
    report.say(f"budget {BUDGET} MB, wanted {TOTAL} MB; {rounds} rounds, polling in every {POLL_EVERY}th; seed {seed}")
    report.say(await wait_quiet(machine, "bursts"))
    order = random.Random(seed)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="agentrun-burst-", dir="/opt") as name:
        directory = Path(name)
        directory.chmod(0o755)
        hog = compile_hog(directory)
        async with open_executor(ExecutorConfig(probes=True)) as guarded, open_executor() as plain:
            await guarded.memory.wait_ready()
            status = guarded.memory.status()
            report.say(
                f"memory is held by {status.mode}: {status.hook}, ready in {status.seconds} s, {status.memory / MIB:.0f} MB"
            )
            bench = Bench(guarded, plain, hog, directory)
            for number in range(rounds):
                pairs = [
                    (mode, method) for mode in modes for method in METHODS if method not in POLLS or number % POLL_EVERY == 0
                ]
                order.shuffle(pairs)
                for mode, method in pairs:
                    runs.append(await bench.run(mode, method))
            report.say(f"events lost: {guarded.memory.governor.lost}")
    return runs


def print_runs(runs: Sequence[Run], report: Report) -> None:
    """A row for each mode and method."""
    rows: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        rows[run.mode, run.method].append(run)
    report.say()
    head = ["memory", "method", "n", "stopped", "over MB p50", "p99", "max", "beyond ms p50", "p99", "reaction ms p50", "p99"]
    table = []
    for (mode, method), found in sorted(rows.items(), key=lambda item: (GROWING.index(item[0][0]), METHODS.index(item[0][1]))):
        over, beyond = sorted(run.overshoot / MIB for run in found), sorted(run.beyond * 1e3 for run in found)
        reaction = sorted(run.reaction * 1e3 for run in found if run.reaction is not None)
        table.append([
            mode, method, str(len(found)), str(sum(run.stopped for run in found)),
            cell(quantile(over, 0.5)), cell(quantile(over, 0.99)), cell(over[-1]),
            cell(quantile(beyond, 0.5)), cell(quantile(beyond, 0.99)),
            cell(quantile(reaction, 0.5) if reaction else None, 3), cell(quantile(reaction, 0.99) if reaction else None, 3),
        ])  # fmt: skip
    report.table(head, table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.burst", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200, help="of every mode and method (200)")
    parser.add_argument("--mode", action="append", choices=GROWING, help="only this; repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    report = Report()
    runs = trio.run(measure, options.rounds, available(options.mode or GROWING), report, options.seed)
    print_runs(runs, report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "burst.json").write_bytes(msgspec.json.encode(runs))
    report.write(options.out / "burst.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
