"""``agentrun doctor``."""

from __future__ import annotations

import argparse
import os
import sys

import msgspec
import trio

from agentrun.config import DEFAULT_SOCKET
from agentrun.doctor import examine

_MARK = {"works": "ok  ", "degraded": "part", "missing": "no  "}


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))


def run(args: argparse.Namespace) -> int:
    """Probe and print; 0 if tool calls can run here, 1 if not."""
    report = trio.run(examine, args.socket)
    if args.json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return 0 if report.usable else 1
    for finding in report.findings:
        print(f"{_MARK[finding.state]}  {finding.feature:<24} {finding.detail}")
        if finding.fix and finding.state != "works":
            print(f"      {'':<24} → {finding.fix}")
    print("tool calls can run here" if report.usable else "tool calls cannot run here")
    return 0 if report.usable else 1
