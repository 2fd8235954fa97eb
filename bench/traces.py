"""What tool calls of real agent tasks need: the table behind the sizes in policies/, printed from recorded runs.

    python -m bench.traces [../shared/traces/agent_tasks.jsonl]

The recordings are not part of this repository. Each line of the file is a task: ``mem`` is [ms, MB] of its whole container,
the agent's own some 185 MB included, sampled about once a second; ``tools`` is [tool, class, start ms, end ms].

A call's *rise* is the highest sample within it above the last one before it. Calls that no sample falls into (they are short)
have none, and calls that overlap share theirs. The durations of one of the two models are inflated by its machine, so
durations are of the other's calls alone, which the agent cut off at 120 s. docs/policies.md draws the conclusions.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.numbers import Report, cell, quantile

TRUSTED = "haiku"
"""The model whose calls have durations of their own."""
LEVELS = (128, 256, 512, 1024, 2048)
"""MB of rise for which the second table says how long calls stay above."""
NAMES = {
    "test": "tests", "install": "package install", "build": "compile", "git": "git", "explore": "file exploration",
    "python": "python scripts", "other": "other shell", "builtin": "built-in (read, edit, grep)",
}  # fmt: skip


class Call(msgspec.Struct, frozen=True):
    """One recorded call: seconds, and MB where a sample fell into it."""

    kind: str
    seconds: float | None
    """None where the recording's durations are not to be trusted."""
    rise: float | None
    peak: float | None
    above: tuple[float, ...]
    """Seconds for which the rise was more than each of LEVELS."""


def read_tasks(path: Path) -> Iterator[Any]:
    """The lines of a file."""
    return map(json.loads, path.read_text().splitlines())


def read_calls(path: Path) -> Iterator[Call]:
    """Every call of every task in a file."""
    for task in read_tasks(path):
        times, sizes = [sample[0] for sample in task["mem"]], [sample[1] for sample in task["mem"]]
        for _, kind, start, end in task["tools"]:
            yield _call(kind, start, end, times, sizes, trusted=task["model"].startswith(TRUSTED))


def _call(kind: str, start: float, end: float, times: list[float], sizes: list[float], *, trusted: bool) -> Call:
    first, last = bisect_left(times, start), bisect_right(times, end)
    inside = sizes[first:last]
    seconds = (end - start) / 1000 if trusted else None
    if not inside or not first:
        return Call(kind, seconds, None, None, ())
    base = sizes[first - 1]
    # A sample stands for the time until the next one.
    spans = [(min(end, times[at + 1]) if at + 1 < len(times) else end) - times[at] for at in range(first, last)]
    above = (sum(span for span, size in zip(spans, inside, strict=True) if size - base > level) / 1000 for level in LEVELS)
    return Call(kind, seconds, max(inside) - base, max(inside), tuple(above))


def _three(values: list[float], digits: int) -> list[str]:
    ordered = sorted(values)
    if not ordered:
        return ["-"] * 3
    return [cell(quantile(ordered, 0.5), digits), cell(quantile(ordered, 0.95), digits), cell(ordered[-1], digits)]


def report(calls: list[Call], out: Report) -> None:
    """Print the two tables about calls."""
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        groups[call.kind].append(call)
    out.heading("What calls take")
    head = ["class", "calls", "s p50", "s p95", "s max", "sampled", "rise MB p50", "rise p95", "rise max", "peak MB"]
    rows = []
    for kind, name in NAMES.items():
        group = groups.pop(kind, [])
        rises = [call.rise for call in group if call.rise is not None]
        times = _three([call.seconds for call in group if call.seconds is not None], 2)
        peak = max((call.peak for call in group if call.peak is not None), default=None)
        rows.append([name, str(len(group)), *times, str(len(rises)), *_three(rises, 0), cell(peak, 0)])
    out.table(head, rows)
    for kind in groups:
        raise SystemExit(f"a class of calls that is not known: {kind}")
    out.heading("How long calls stay above a rise (calls, seconds p50 and max)")
    rows = []
    for number, level in enumerate(LEVELS):
        spans = sorted(call.above[number] for call in calls if call.above and call.kind != "builtin" and call.above[number])
        rows.append([f"{level} MB", str(len(spans)), *_three(spans, 0)[::2]])
    out.table(["rise above", "calls", "s p50", "s max"], rows)


def report_tasks(tasks: list[Any], out: Report) -> None:
    """Print what whole tasks reach, those among them of which no calls were recorded."""
    peaks = sorted(max(size for _, size in task["mem"]) for task in tasks)
    out.heading("What whole tasks reach, the agent included (MB)")
    out.table(["tasks", "p50", "p95", "max"], [[str(len(tasks)), *_three(peaks, 0)]])
    for task in tasks:
        if not task["tools"]:
            out.say(f"no calls are recorded of {task['run']}, peak {max(size for _, size in task['mem']):.0f} MB")


def main(arguments: list[str] | None = None) -> None:
    """Read the recordings and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.traces", description=(__doc__ or "").splitlines()[0])
    default = Path(__file__).parents[2] / "shared" / "traces" / "agent_tasks.jsonl"
    parser.add_argument("file", type=Path, nargs="?", default=default, help="recorded tasks (default: %(default)s)")
    path: Any = parser.parse_args(arguments).file
    try:
        tasks, calls = list(read_tasks(path)), list(read_calls(path))
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    out = Report()
    report(calls, out)
    report_tasks(tasks, out)


if __name__ == "__main__":
    main()
