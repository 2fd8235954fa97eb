"""``agentrun lat``: how long each phase of a sandbox takes, the way BCC's runqlat prints it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from agentrun.cli.query import ask
from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import HostError, UsageError
from agentrun.histogram import Histogram, draw, merge, since
from agentrun.latency import PHASES, Report


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun lat``."""
    parser.add_argument("interval", nargs="?", type=float, help="seconds between outputs; each has what came since the last")
    parser.add_argument("count", nargs="?", type=int, help="outputs, then end")
    parser.add_argument("-m", "--milliseconds", action="store_true", help="in milliseconds instead of microseconds")
    parser.add_argument("-j", "--json", action="store_true", help="one JSON object for each output")
    parser.add_argument("-s", "--shapes", action="store_true", help="each shape of sandboxes for itself")
    parser.add_argument("-p", "--phase", action="append", metavar="NAME", help=f"only this; repeatable: {', '.join(PHASES)}")
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))


def run(args: argparse.Namespace) -> int:
    """Ask and print, once or every interval."""
    if unknown := set(args.phase or ()) - set(PHASES):
        raise UsageError(f"phase: there is no {', '.join(sorted(unknown))} (there are {', '.join(PHASES)})")
    if args.interval is not None and not 0 < args.interval < 1e6:
        raise UsageError("interval: not a positive number of seconds")
    if args.count is not None and args.count < 1:
        raise UsageError("count: not a positive number")
    report = _fetch(args.socket)
    if not report.recording and not report.histograms:
        raise HostError("the daemon records no phases: its probes process does not run (agentrun doctor says why)")
    if args.interval is None:
        _show(report, args)
        return 0
    number = 0
    while args.count is None or number < args.count:
        try:
            time.sleep(args.interval)
        except KeyboardInterrupt:
            return 0
        before, report = report, _fetch(args.socket)
        new = since(report.histograms, before.histograms)
        # A daemon that was started again counts from nothing.
        calls, lost = report.calls - before.calls, report.lost - before.lost
        if calls < 0 or lost < 0:
            calls, lost = report.calls, report.lost
        _show(msgspec.structs.replace(report, histograms=new, calls=calls, lost=lost), args)
        number += 1
    return 0


def _fetch(path: str) -> Report:
    return msgspec.convert(ask(path, {"op": "latency"}), Report)


def _show(report: Report, args: argparse.Namespace) -> None:
    wanted = [one for one in report.histograms if not args.phase or one.phase in args.phase]
    now = datetime.now().astimezone()
    if args.json:
        document = {"time": now.isoformat(timespec="milliseconds"), **msgspec.to_builtins(report)}
        document["histograms"] = msgspec.to_builtins(wanted)
        print(msgspec.json.encode(document).decode())
    else:
        if args.interval is not None:
            print(f"{now:%H:%M:%S}")
        for line in text(wanted, shapes=args.shapes, milliseconds=args.milliseconds):
            print(line)
        print(f"{report.calls} sandboxes, {report.lost} events lost{'' if report.recording else '; nothing is recorded now'}\n")
    sys.stdout.flush()


def text(histograms: Sequence[Histogram], *, shapes: bool, milliseconds: bool) -> Iterator[str]:
    """Each phase: a title with its percentiles, then the histogram."""
    groups: dict[tuple[str, str, str], list[Histogram]] = {}
    for one in histograms:
        groups.setdefault((one.phase, one.kind, one.shape if shapes else ""), []).append(one)
    for phase, kind, shape in sorted(groups, key=lambda name: (PHASES.index(name[0]), name[1:])):
        whole = merge(groups[phase, kind, shape], shape, kind)
        unit, scale = ("ms", 1e3) if milliseconds else ("us", 1e6)
        marks = ", ".join(f"{name} {(value or 0) * scale:.{3 if milliseconds else 1}f}" for name, value in _marks(whole))
        yield f"{phase}, {kind}{f', {shape}' if shape else ''}: {whole.count} times, {marks} {unit}"
        yield from draw(whole.buckets, milliseconds=milliseconds)
        yield ""


def _marks(histogram: Histogram) -> list[tuple[str, float | None]]:
    return [("p50", histogram.p50), ("p95", histogram.p95), ("p99", histogram.p99)]
