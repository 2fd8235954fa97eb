"""``python -m bench.overhead``: what the programs in the kernel cost those who do nothing wrong.

Blocks with the probes process and without it take turns, because its programs see the whole machine. In each block every
workload runs in the same way: short calls one after another, and programs that only take memory, or do work and take it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
import trio

from agentrun import Executor, ExecutorConfig, Limits, Policy, open_executor
from bench.machine import describe, wait_quiet
from bench.numbers import Report, cell, quantile
from tests.hog import compile_hog

SHORT = "short calls"
PYTHON = "/usr/bin/python3"
LISTS = "for _ in range(12): x = [str(i) for i in range(200_000)]; del x"
RUNS = 3
"""Of each program in a block, of which the median counts: the first to touch memory that a virtual machine has given back waits
for its host."""
POLICY = Policy(name="overhead", limits=Limits(memory_high=3 << 30, memory_max=None), best_effort=True)
"""A steady budget nobody reaches: every page is counted and judged."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a workload: seconds, of the caller's clock for short calls, else of processors in the call's account."""

    workload: str
    probes: bool
    block: int
    seconds: float


def workloads(hog: Path) -> Mapping[str, list[str]]:
    """The programs that take memory."""
    return {
        "page faults and nothing else (touch 1 GB)": [str(hog), "anon", "1024"],
        "memory written whole (read 1 GB)": [str(hog), "read", "1024"],
        "Python, lists of strings": [PYTHON, "-c", LISTS],
        "sort of 2 MB": ["sh", "-c", "seq 300000 | sort -R -S 200M > /dev/null"],
        "64 processes": ["sh", "-c", "i=0; while [ $i -lt 64 ]; do /bin/true; i=$((i+1)); done"],
    }


async def one_block(executor: Executor, hog: Path, block: int, probes: bool, calls: int, order: random.Random) -> list[Sample]:
    """Everything once, and the short calls."""
    await executor.memory.wait_ready(everything=True)
    await executor.warm_up(POLICY, count=2)
    samples = []
    programs = list(workloads(hog).items()) * RUNS
    order.shuffle(programs)
    for name, argv in programs:
        result = await executor.run(argv, policy=POLICY, timeout=120)
        assert result.ok, result
        samples.append(Sample(workload=name, probes=probes, block=block, seconds=result.usage.cpu_user + result.usage.cpu_system))
    for _ in range(calls):
        begun = perf_counter()
        await executor.run(["/bin/true"], policy=POLICY)
        samples.append(Sample(workload=SHORT, probes=probes, block=block, seconds=perf_counter() - begun))
        await trio.sleep(0.002)  # as calls come: the slot is refilled, and not at the next one's cost
    return samples


async def measure(blocks: int, calls: int, report: Report, seed: int) -> list[Sample]:
    """Blocks with and without, by turns; which comes first is drawn."""
    machine = describe()
    report.say(f"# overhead, {machine.started}: Linux {machine.kernel}, {machine.processors} x {machine.model}")
    report.say(f"{blocks} pairs of blocks, {calls} short calls in each; seed {seed}")
    report.say(await wait_quiet(machine, "overhead"))
    order = random.Random(seed)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="agentrun-overhead-", dir="/opt") as name:
        directory = Path(name)
        directory.chmod(0o755)
        hog = compile_hog(directory)
        for block in range(blocks):
            for probes in order.sample((True, False), 2):
                async with open_executor(ExecutorConfig(probes=probes)) as executor:
                    samples += await one_block(executor, hog, block, probes, calls, order)
    return samples


def print_samples(samples: Sequence[Sample], report: Report) -> None:
    """A row for each workload: medians of blocks, and the median of the ratios within the pairs with its interquartile range."""
    values: dict[tuple[str, bool], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        values[sample.workload, sample.probes][sample.block].append(sample.seconds)
    rows = []
    for name in dict.fromkeys(sample.workload for sample in samples):
        off, on = ({block: median(found) for block, found in values[name, probes].items()} for probes in (False, True))
        ratios = sorted(on[block] / off[block] for block in off)
        low, middle, high = ((quantile(ratios, share) - 1) * 100 for share in (0.25, 0.5, 0.75))
        rows.append([
            name, str(sum(len(found) for found in values[name, True].values())),
            cell(median(off.values()) * 1e3, 3), cell(median(on.values()) * 1e3, 3),
            f"{middle:+.1f} %", f"{low:+.1f} to {high:+.1f} %",
        ])  # fmt: skip
    report.say()
    report.table(["workload", "n", "off ms", "on ms", "overhead", "quartiles"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead")
    parser.add_argument("--blocks", type=int, default=20, help="with and without each (20)")
    parser.add_argument("--calls", type=int, default=250, help="short calls in each block (250: with 20 blocks 10,000 in all)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    report = Report()
    samples = trio.run(measure, options.blocks, options.calls, report, options.seed)
    print_samples(samples, report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_bytes(msgspec.json.encode(samples))
    report.write(options.out / "overhead.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
