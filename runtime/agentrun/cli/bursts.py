"""``agentrun bursts``: what memory control sees and does, as it happens."""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from agentrun.cli.query import short
from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import HostError, UsageError

_HEAD = f"{'TIME':<13}{'CALL':<8}{'TENANT':<12}{'WHAT':<12}{'MEMORY':>9}{'LIMIT':>9}{'OVER':>9}{'REACTION':>10}  TOOL"


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Options of ``agentrun bursts``."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many")
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))


def run(args: argparse.Namespace) -> int:
    """Print until interrupted, or the daemon ends."""
    if args.count is not None and args.count < 1:
        raise UsageError("count: not a positive number")
    left = args.count
    try:
        for news in follow(args.socket, {"op": "bursts"}):
            print(json.dumps(news) if args.json else _line(news), flush=True)
            if news["event"] not in ("listening", "mode") and left is not None and (left := left - 1) == 0:
                return 0
    except KeyboardInterrupt:
        return 0
    print("agentrun: the daemon ended the connection", file=sys.stderr)
    return 125


def follow(path: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send a request and yield its replies for as long as the daemon sends any.

    Raises:
        HostError: no daemon answers at ``path``.
        UsageError: it refused the request.
    """
    body = msgspec.msgpack.encode({"v": 1, **request})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
            sock.sendall(struct.pack("<I", len(body)) + body)
        except OSError as error:
            raise HostError(f"no daemon at {path}: {error.strerror}") from error
        with sock.makefile("rb") as stream:
            while len(head := stream.read(4)) == 4:
                answer = msgspec.msgpack.decode(stream.read(struct.unpack("<I", head)[0]))
                if answer["op"] == "error":
                    raise UsageError(answer["message"])
                yield answer["data"]


def _line(news: dict[str, Any]) -> str:
    if news["event"] == "listening":  # what happens from here on is told
        return f"memory is held by: {news['mode']}\n{_HEAD}"
    when = datetime.fromtimestamp(news["time"]).astimezone()
    if news["event"] == "mode":
        return f"{when:%H:%M:%S}.{when.microsecond // 1000:03d} memory is held by: {news['mode']}"
    what = news["rung"] if news["event"] == "step" else news["event"]
    reaction = news.get("reaction")
    tool = " ".join(news["argv"]).replace("\n", " ") if news["argv"] else news.get("comm", "")
    text = f"{when:%H:%M:%S}.{when.microsecond // 1000:03d} {short(news['call'], 7):<8}{news['tenant']:<12}{what:<12}"
    text += "".join(f"{'' if news.get(key) is None else brief(news[key]):>9}" for key in ("usage", "limit", "overshoot"))
    text += f"{'' if reaction is None else f'{reaction * 1e6:.0f} us':>10}  {tool[:60]}"
    return text + (f"  ({news['reason']})" if news.get("reason") else "")


def brief(size: float) -> str:
    """Bytes in at most seven characters, with one digit behind the point."""
    for unit in ("", "K", "M", "G"):
        if abs(size) < 1024:
            return f"{size:.0f}{unit}" if size == int(size) else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"
