"""The targets: what the project promises, beside what was measured. A benchmark is not a test: a FAIL does not fail the run."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.idle import Idle
from bench.latency import Latency
from bench.lifecycle import OURS
from bench.numbers import Report
from bench.peers import BWRAP
from bench.subjects import EXEC, LIBRARY
from bench.throughput import Throughput

WORKERS = 8
"""The number of workers the throughput target is about."""


class Target(msgspec.Struct, frozen=True):
    """One line."""

    text: str
    measured: str
    verdict: str
    """``PASS``, ``FAIL``, or ``SKIP`` where something needed was not measured."""


def evaluate(latency: Sequence[Latency], throughput: Sequence[Throughput], idle: Idle | None) -> list[Target]:
    """Every target, measured or not."""
    rows = {row.name: row for row in latency if row.summary is not None}
    library, client, bwrap, spawn = (rows.get(name) for name in (LIBRARY, EXEC, BWRAP, "posix_spawn"))
    targets = [
        _most(
            "agentrun library p50 <= 1.6 x posix_spawn", 1.6,
            library.times_spawn if library else None, 1.0 if spawn else None, "x, median of the same rounds",
        ),
        _most(
            "agentrun library p99 <= 3 x bubblewrap p50", 3.0,
            library.summary.p99 if library and library.summary else None, bwrap.summary.p50 if bwrap and bwrap.summary else None,
        ),
        _most(
            "agentrun exec p50 <= 0.6 x bubblewrap p50", 0.6,
            client.summary.p50 if client and client.summary else None, bwrap.summary.p50 if bwrap and bwrap.summary else None,
        ),
    ]  # fmt: skip
    oci, runc = rows.get(OURS), rows.get("runc create+start+delete")
    targets.append(
        _most(
            f"{OURS} p50 < runc's", 1.0,
            oci.summary.p50 if oci and oci.summary else None, runc.summary.p50 if runc and runc.summary else None,
        )
    )  # fmt: skip
    rates = {row.name: row.rate for row in throughput if row.workers == WORKERS}
    ours, theirs = rates.get(LIBRARY), rates.get(BWRAP)
    text = f"agentrun library calls/s, {WORKERS} workers >= 1.5 x bubblewrap"
    if ours and theirs:
        verdict = "PASS" if ours >= 1.5 * theirs else "FAIL"
        targets.append(Target(text, f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.2f}", verdict))
    else:
        targets.append(Target(text, "not measured", "SKIP"))
    text = "an idle slot <= 0.5 MB"
    if idle is None:
        targets.append(Target(text, "not measured", "SKIP"))
    else:
        memory = idle.memory
        measured = f"{memory.worst / 1000:.3f} MB (MemAvailable {memory.available:.0f} kB, parts {memory.parts:.0f} kB)"
        targets.append(Target(text, measured, "PASS" if memory.worst <= 500 else "FAIL"))
    many = idle.slots if idle else 500
    text = f"dispatch p50 with {many} idle slots <= 1.1 x with 1"
    targets.append(_most(text, 1.1, idle.many.p50 if idle and idle.many else None, idle.one.p50 if idle and idle.one else None))
    return targets


def _most(text: str, bound: float, value: float | None, base: float | None, unit: str = "") -> Target:
    if value is None or not base:
        return Target(text, "not measured", "SKIP")
    times = value / base
    measured = f"{times:.2f} {unit}" if unit else f"{value:.2f} / {base:.2f} ms = {times:.2f}"
    return Target(text, measured, "PASS" if times <= bound else "FAIL")


def print_targets(targets: Sequence[Target], report: Report) -> None:
    """The table."""
    report.table(["target", "measured", "verdict"], [[one.text, one.measured, one.verdict] for one in targets])
