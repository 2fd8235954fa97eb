# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.replay``: draw triples, boot guests that replay them under each arm, and say what came of it."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from bench import ROOT
from bench.machine import describe
from bench.numbers import Report
from bench.replay import figures, guest, tasks
from bench.replay.arms import ARMS
from tests.vm import kernels, run

PER_RUN = 75.0
"""Seconds that a guest may take for one triple under one arm; it takes about 5, or 55 where one hangs until its deadline."""
BOOT = 60.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description="Replay recorded tasks, three under one budget.")
    parser.add_argument("--triples", type=int, default=20, metavar="N", help="one HIGH and two LOW tasks each (20)")
    parser.add_argument("--arm", choices=ARMS, action="append", help="only this one; repeatable")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces", metavar="DIR", help="the recordings")
    parser.add_argument("--kernel", default="6.12", help="of the guest (6.12)")
    parser.add_argument("--speed", type=float, default=20.0, metavar="X", help="recorded seconds in one of the guest's (20)")
    parser.add_argument("--demand", type=float, default=360.0, metavar="MB", help="what three want together at most (360)")
    parser.add_argument("--batch", type=int, default=5, metavar="N", help="triples for each boot of a guest (5)")
    parser.add_argument("--guests", type=int, default=1, metavar="N", help="at the same time, a processor for each (1)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw and of the intervals (1)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR", help="for results (bench/out)")
    options = parser.parse_args(arguments)
    if min(options.triples, options.batch, options.guests, options.speed, options.demand) <= 0:
        parser.error("counts and sizes are above 0")
    if not (options.traces / "agent_tasks.jsonl").exists():
        parser.error(f"--traces: no agent_tasks.jsonl in {options.traces}")
    return options


class Lines(io.BytesIO):
    """A guest's output: each line is a run, told about as it comes."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report
        self._rest = b""
        self.runs: list[guest.Run] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]  # bytes is all that comes
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            done = msgspec.json.decode(line, type=guest.Run)
            self.runs.append(done)
            self._report.say(f"  triple {done.triple:2} {done.arm:9} {done.took:6.1f} s  {done.error or _ends(done)}")
        return len(data)


def _ends(done: guest.Run) -> str:
    return ", ".join(f"{one.name} {one.how if one.seconds is None else f'{one.seconds:.2f} s'}" for one in done.tenants)


def run_batch(number: int, batch: guest.Batch, program: Path, options: argparse.Namespace, report: Report) -> list[guest.Run]:
    """What a guest said about its triples; if it is lost, what it said before."""
    spec = program.with_name(f"batch-{number}.json")
    spec.write_bytes(msgspec.json.encode(batch))
    lines, errors = Lines(report), io.BytesIO()
    timeout = BOOT + PER_RUN * len(batch.triples) * (len(batch.arms) + 1)
    command = [sys.executable, "-m", guest.__name__, str(spec), str(program)]
    try:
        status = run.run(options.kernel, command, timeout=timeout, cwd=ROOT, visible=[spec.parent], stdout=lines, stderr=errors)
    except (run.LostVM, run.TimedOut) as error:
        report.say(f"LOST batch {number}: {error}")
    else:
        if status:
            report.say(f"LOST batch {number}: exit status {status}: {errors.getvalue().decode(errors='replace')}")
    return lines.runs


def replay(options: argparse.Namespace, scratch: Path, report: Report) -> None:
    """All of it."""
    machine = describe()
    arms = options.arm or list(ARMS)
    pool = tasks.interesting(options.traces / "agent_tasks.jsonl")
    triples, put_back = tasks.draw(pool, options.triples, options.seed, options.demand, options.speed)
    report.say(f"# agentrun bench.replay, {machine.started}")
    report.say(f"{len(triples)} triples of {len(pool)} tasks that rise by {tasks.LEAST_RISE:g} MB or more, seed {options.seed};")
    report.say(f"{put_back} draws were put back because no order of things could have saved all three")
    report.say(f"guest: Linux {options.kernel}, one emulated processor, no swap; {options.guests} at a time")
    report.say(
        f"{tasks.BEFORE + tasks.AFTER:g} recorded seconds around each peak at {options.speed:g} x, demand {options.demand:g} MB, "
        f"budget {triples[0].budget_mb} MB ({tasks.OVER} x)"
    )
    program = scratch / guest.PROGRAM
    source = Path(__file__).with_name("allocate.c")
    subprocess.run(["cc", "-O2", "-static", "-Wall", "-Wextra", "-o", str(program), str(source)], check=True)
    kernels.ensure(options.kernel)
    batches = [guest.Batch(options.speed, arms, triples[at : at + options.batch]) for at in range(0, len(triples), options.batch)]
    began = time.monotonic()
    with ThreadPoolExecutor(options.guests) as executor:
        futures = [executor.submit(run_batch, at, batch, program, options, report) for at, batch in enumerate(batches)]
        runs = [one for future in futures for one in future.result()]
    for arm in arms:
        if errors := {one.error for one in runs if one.arm == arm and one.error}:
            report.say(f"LEFT OUT {arm}: {'; '.join(sorted(errors))}")
    report.heading(f"{len({one.triple for one in runs})} triples, {time.monotonic() - began:.0f} s; [95 % intervals]")
    found = figures.rows(runs, arms, options.seed)
    figures.print_rows(found, report)
    versus = figures.against(runs, arms, options.seed)
    figures.print_against(versus, report)
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = {name: str(value) for name, value in vars(options).items()}
    result = {"machine": machine, "options": arguments, "triples": triples, "rows": found, "against": versus, "runs": runs}
    (options.out / "replay.json").write_bytes(msgspec.json.encode(result) + b"\n")
    report.say(f"written: {options.out}/replay.json, replay.txt")
    report.write(options.out / "replay.txt")


def main() -> int:
    """Returns 0 if it could measure, whatever it measured."""
    options = parse_arguments()
    scratch = (options.out / "replay").resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    replay(options, scratch, Report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
