"""Throughput: a closed loop. N workers, each of which makes its next call as soon as it has the answer to the last.

A contender's turn is ``WARM_IN`` seconds that are not counted and then a window; counted are the calls that *ended* within the
window, begun before it or not, so both edges are alike and neither a slow nor a fast contender gains from them. agentrun's
refilling and removing of sandboxes goes on meanwhile and is paid from the same processors; its warm sandboxes are used up within
the warm-in, and how long the removing takes after the window is reported as ``drain``. Turns are interleaved: each round has one
turn of every contender, in random order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from time import perf_counter

import msgspec
import trio

from bench.contender import CallError, Contender
from bench.numbers import Report, Summary, cell, summarize

WARM_IN = 0.4
_PAUSE = 0.05


class Throughput(msgspec.Struct, kw_only=True):
    """One contender at one number of workers."""

    name: str
    workers: int
    rates: list[float] = []
    """Calls per second, one per round."""
    drains: list[float] = []
    """Milliseconds from the last answer until the background work was done, one per round."""
    summary: Summary | None = None
    """Latency of the counted calls of all rounds."""
    failed: int = 0
    first_error: str = ""

    @property
    def rate(self) -> float | None:
        """The median round."""
        return median(self.rates) if self.rates else None


async def measure_throughput(
    contenders: Sequence[Contender], workers: Sequence[int], rounds: int, window: float, seed: int
) -> list[Throughput]:
    """Every contender at every number of workers, ``rounds`` times."""
    rows = {(one.name, count): Throughput(name=one.name, workers=count) for one in contenders for count in workers}
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in rows}
    draw = random.Random(seed)
    for _ in range(rounds):
        turns = [(one, count) for one in contenders for count in workers]
        draw.shuffle(turns)
        for contender, count in turns:
            key = (contender.name, count)
            samples[key] += await _turn(contender, rows[key], window)
    for key, row in rows.items():
        row.summary = summarize(samples[key], row.failed)
    return list(rows.values())


async def _turn(contender: Contender, row: Throughput, window: float) -> list[float]:
    """One turn; returns the latencies of the calls counted."""
    counted: list[float] = []
    opens = perf_counter() + WARM_IN
    closes = opens + window

    async def work() -> None:
        while perf_counter() < closes:
            try:
                elapsed = await contender.call_shared()
            except CallError as error:
                row.failed += 1
                row.first_error = row.first_error or str(error)
                await trio.sleep(0.001)  # whoever fails at once does not get to spin
                continue
            if opens <= perf_counter() < closes:
                counted.append(round(elapsed * 1e3, 3))

    async with trio.open_nursery() as nursery:
        for _ in range(row.workers):
            nursery.start_soon(work)
    row.rates.append(round(len(counted) / window, 1))
    ended = perf_counter()
    await contender.settle()
    row.drains.append(round((perf_counter() - ended) * 1e3, 1))
    await trio.sleep(_PAUSE)
    return counted


def print_throughput(rows: Sequence[Throughput], report: Report, base: str) -> None:
    """The table, by number of workers, and of those the most calls first."""
    table = []
    for row in sorted(rows, key=lambda row: (row.workers, -(row.rate or 0))):
        other = next((peer for peer in rows if peer.name == base and peer.workers == row.workers), None)
        times = row.rate / other.rate if row.rate and other and other.rate else None
        p50, p99 = (row.summary.p50, row.summary.p99) if row.summary else (None, None)
        spread = f"{cell(row.rate, 0)} ({cell(min(row.rates), 0)}-{cell(max(row.rates), 0)})"
        table.append(
            [row.name, str(row.workers), spread, cell(times), cell(p50), cell(p99), cell(max(row.drains), 0), str(row.failed)]
        )
    report.table(["", "workers", "calls/s median (min-max)", f"x {base}", "p50 ms", "p99 ms", "drain ms", "fail"], table)
    for row in rows:
        if row.first_error:
            report.say(f"NOTE {row.name}, {row.workers} workers: {row.failed} failed, first: {row.first_error}")
