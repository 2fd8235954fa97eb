"""The picture: latency as bars and as distributions, and throughput. Without matplotlib there is none, and that is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.latency import Latency
from bench.machine import Machine
from bench.throughput import Throughput

_OURS, _THEIRS, _NONE = "#c8553d", "#7d8ca3", "#444444"


def plot(path: Path, machine: Machine, latency: Sequence[Latency], throughput: Sequence[Throughput]) -> str:
    """Write the PNG; returns why not, or ""."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted((row for row in latency if row.summary), key=lambda row: row.summary.p50 if row.summary else 0)
    figure, axes = pyplot.subplots(1, 3 if throughput else 2, figsize=(19 if throughput else 13, 5.5), layout="constrained")
    _bars(axes[0], rows)
    _distributions(axes[1], rows)
    if throughput:
        _rates(axes[2], throughput)
    quiet = "quiet" if machine.quiet else "NOT QUIET: others used it too"
    figure.suptitle(f"/bin/true, Linux {machine.kernel}, {machine.processors} processors, {quiet}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return ""


def _colour(name: str) -> str:
    if name.startswith("agentrun"):
        return _OURS
    return _NONE if name in ("posix_spawn", "subprocess.run") else _THEIRS


def _bars(axis: Any, rows: Sequence[Latency]) -> None:
    for at, row in enumerate(reversed(rows)):
        assert row.summary is not None
        axis.barh(at, row.summary.p50, color=_colour(row.name), height=0.65)
        axis.plot([row.summary.p50, row.summary.p99], [at, at], color="black", linewidth=1)
        axis.plot([row.summary.p99], [at], "|", color="black", markersize=8)
        axis.text(row.summary.p99 * 1.1, at, f"{row.summary.p50:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axis.set_xscale("log")
    axis.set_xlim(right=max((row.summary.p99 for row in rows if row.summary), default=1) * 3)
    axis.set_xlabel("ms, p50 (bar) to p99 (line)")
    axis.set_title("latency, one call at a time")


def _distributions(axis: Any, rows: Sequence[Latency]) -> None:
    for number, row in enumerate(rows):
        good = sorted(sample for sample in row.samples if sample is not None)
        shares = [(at + 1) / len(good) for at in range(len(good))]
        ours = row.name.startswith("agentrun")
        axis.plot(
            good, shares, label=row.name, color=f"C{number % 10}", linewidth=2.2 if ours else 1.2, linestyle="-" if ours else "--"
        )
    axis.set_xscale("log")
    axis.set_xlabel("ms")
    axis.set_ylabel("share of calls")
    axis.set_title("the same, every call")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _rates(axis: Any, rows: Sequence[Throughput]) -> None:
    workers = sorted({row.workers for row in rows})
    names = sorted({row.name for row in rows}, key=lambda name: -max(row.rate or 0 for row in rows if row.name == name))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        mine = {row.workers: row for row in rows if row.name == name and row.rates}
        places = [at + number * width for at, count in enumerate(workers) if count in mine]
        heights = [mine[count].rate or 0 for count in workers if count in mine]
        spans = [
            [height - min(mine[count].rates) for height, count in zip(heights, mine, strict=True)],
            [max(mine[count].rates) - height for height, count in zip(heights, mine, strict=True)],
        ]
        axis.bar(places, heights, width * 0.92, yerr=spans, label=name, color=f"C{number}", error_kw={"linewidth": 0.8})
    axis.set_xticks([at + 0.4 - width / 2 for at in range(len(workers))], [str(count) for count in workers])
    axis.set_yscale("log")
    axis.set_xlabel("workers")
    axis.set_ylabel("calls per second")
    axis.set_title("throughput, closed loop (median, min to max)")
    axis.legend(fontsize=8)
