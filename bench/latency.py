"""Sequential latency: one call at a time, every contender once per round, in an order drawn anew for each round.

Before each call the background work of every agentrun contender has ended, and the machine then had ``GAP`` seconds for the
kernel's own (namespaces are torn down by kernel threads, whoever made them). Neither is timed. Ratios are medians of the ratios
within each round, so that a slow moment of the machine cancels out. A garbage collection of the benchmark's own process is
deferred to the gaps.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence

import msgspec
import trio

from bench.contender import CallError, Contender
from bench.numbers import Report, Samples, Summary, cell, ratio, summarize
from bench.peers import BWRAP

GAP = 0.002
_WARM_ROUNDS = 3


class Latency(msgspec.Struct, kw_only=True):
    """One contender's row."""

    name: str
    note: str
    summary: Summary | None
    times_spawn: float | None = None
    times_bwrap: float | None = None
    samples: Samples = []
    errors: list[str] = []


async def measure_latency(contenders: Sequence[Contender], rounds: int, seed: int) -> list[Latency]:
    """Call every contender once per round; the first rounds are not counted."""
    rows = {contender.name: Latency(name=contender.name, note=contender.note, summary=None) for contender in contenders}
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(-_WARM_ROUNDS, rounds):
            shuffle(order)
            for contender in order:
                await _settle(contenders)
                row = rows[contender.name]
                try:
                    sample = round(await contender.call_alone() * 1e3, 4)
                except CallError as error:
                    row.errors.append(str(error))
                    sample = None
                if number >= 0:
                    row.samples.append(sample)
    finally:
        gc.enable()
    spawn = rows["posix_spawn"].samples
    bwrap = rows[BWRAP].samples if BWRAP in rows else None
    for row in rows.values():
        row.summary = summarize(row.samples)
        row.times_spawn = ratio(row.samples, spawn)
        row.times_bwrap = ratio(row.samples, bwrap) if bwrap else None
    return list(rows.values())


async def _settle(contenders: Sequence[Contender]) -> None:
    for contender in contenders:
        await contender.settle()
    gc.collect(0)
    await trio.sleep(GAP)


def print_latency(rows: Sequence[Latency], report: Report) -> None:
    """The table, fastest first."""
    table = []
    for row in sorted(rows, key=lambda row: row.summary.p50 if row.summary else float("inf")):
        summary = row.summary
        if summary is None:
            table.append([row.name, "0", str(len(row.samples)), *["-"] * 7])
            continue
        quantiles = [cell(value) for value in (summary.min, summary.p50, summary.p95, summary.p99, summary.max)]
        times = [cell(row.times_spawn), cell(row.times_bwrap)]
        table.append([row.name, str(summary.count), str(summary.failed), *quantiles, *times])
    report.table(["ms", "n", "fail", "min", "p50", "p95", "p99", "max", "x spawn", "x bwrap"], table)
    for row in rows:
        if row.errors:
            report.say(f"NOTE {row.name} failed {len(row.errors)} times, first: {row.errors[0]}")
