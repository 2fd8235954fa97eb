"""``agentrun top``: the calls that run, with what they use and how they stand with their memory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from agentrun.cli.bursts import brief
from agentrun.cli.query import ask, short
from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import UsageError

_HEAD = (
    f"{'ID':<8}{'TENANT':<12}{'SECONDS':>8}{'MEMORY':>9}{'HIGH':>8}{'MAX':>8}{'CREDIT':>8}  {'RUNG':<10}"
    f"{'CPU':>8}{'CPU%':>6}{'PSI c/m':>10}  COMMAND"
)
_CLEAR = "\033[H\033[J"


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun top``."""
    parser.add_argument("interval", nargs="?", type=float, default=1.0, help="seconds between two looks (1)")
    parser.add_argument("count", nargs="?", type=int, help="looks, then end; without it, until interrupted")
    parser.add_argument("-j", "--json", action="store_true", help="one JSON object for each look")
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))


def run(args: argparse.Namespace) -> int:
    """Look again and again."""
    if not 0 < args.interval < 1e6:
        raise UsageError("interval: not a positive number of seconds")
    if args.count is not None and args.count < 1:
        raise UsageError("count: not a positive number")
    screen = sys.stdout.isatty() and not args.json
    before: dict[str, float] = {}
    looks = 0
    try:
        while True:
            data = ask(args.socket, {"op": "top"})
            if args.json:
                print(json.dumps(data), flush=True)
            else:
                print((_CLEAR if screen else "") + _text(data, before, args.interval), flush=True)
            before = {row["call"]: row["cpu"] for row in data["calls"] + data["containers"]}
            looks += 1
            if args.count is not None and looks >= args.count:
                return 0
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0


def _text(data: dict[str, Any], before: dict[str, float], interval: float) -> str:
    memory = data["memory"]
    lines = [
        f"{len(data['calls'])} calls, {len(data['containers'])} containers; memory is held by: {memory['mode']}"
        + (f" ({memory['hook']}, {memory['lost']} events lost)" if memory["hook"] else ""),
        _HEAD,
    ]
    for row in sorted(data["calls"] + data["containers"], key=lambda row: -(row["memory"] or 0)):
        share = (row["cpu"] - before[row["call"]]) / interval * 100 if row["call"] in before else None
        credit = "" if row["credit"] is None else f"{row['credit']:.1f}s"
        pressure = "/".join("-" if value is None else f"{value:.0f}" for value in (row["psi_cpu"], row["psi_memory"]))
        lines.append(
            f"{short(row['call'], 7):<8}{row['tenant']:<12}{row['seconds']:>8.1f}{_size(row['memory']):>9}{_size(row['high']):>8}"
            f"{_size(row['max']):>8}{credit:>8}  {row['rung'] or '':<10}{row['cpu']:>7.1f}s"
            f"{'' if share is None else f'{share:.0f}':>6}{pressure:>10}  {' '.join(row['argv'])[:50]}"
        )
    return "\n".join(lines)


def _size(value: int | None) -> str:
    return "-" if value is None else brief(value)
