"""``agentrun status``, ``ps``, ``kill`` and ``stats``: one question to the daemon, one answer."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any

import msgspec

from agentrun.config import DEFAULT_SOCKET
from agentrun.errors import HostError, UsageError


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Options of the four verbs."""
    parser.add_argument("--socket", metavar="PATH", default=os.environ.get("AGENTRUN_SOCKET", DEFAULT_SOCKET))
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    if verb == "kill":
        parser.add_argument("id", help="the call, as `agentrun ps` names it")
        parser.add_argument("signal", nargs="?", help="only send this signal (a name or a number)")


def ask(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Send one request and return the reply's data.

    Raises:
        HostError: no daemon answers at ``path``.
        UsageError: it refused the request.
    """
    body = msgspec.msgpack.encode({"v": 1, **request})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
            sock.sendall(struct.pack("<I", len(body)) + body)
            answer = msgspec.msgpack.decode(_receive(sock))
        except (OSError, EOFError, struct.error) as error:
            reason = error.strerror if isinstance(error, OSError) else "it closed the connection"
            raise HostError(f"no daemon at {path}: {reason}") from error
    if answer["op"] == "error":
        raise UsageError(answer["message"])
    data: dict[str, Any] = answer["data"]
    return data


def _receive(sock: socket.socket) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + struct.unpack_from("<I", data)[0]:
        chunk = sock.recv(65536)
        if not chunk:
            raise EOFError
        data += chunk
    return data[4:]


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    request: dict[str, Any] = {"op": args.verb}
    if args.verb == "kill":
        request["id"] = args.id
        if args.signal is not None:
            request["signal"] = _signal_number(args.signal)
    data = ask(args.socket, request)
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        {"status": _print_status, "ps": _print_calls, "kill": _print_kill, "stats": _print_stats}[args.verb](data)
    return 0


def _signal_number(text: str) -> int:
    try:
        name = text.upper().removeprefix("SIG")
        return int(text) if text.isdigit() else signal.Signals[f"SIG{name}"].value
    except (KeyError, ValueError):
        raise UsageError(f"signal: there is no {text!r}") from None


def _print_status(data: dict[str, Any]) -> None:
    print(f"agentrund, pid {data['pid']}, up {time.time() - data['started']:.0f} s, {data['running']} calls running")
    print(f"cgroup {data['cgroup']}, controllers: {' '.join(data['controllers']) or 'none'}")


def _print_calls(data: dict[str, Any]) -> None:
    print(f"{'ID':<8}{'TENANT':<16}{'SECONDS':>9}  COMMAND")
    for call in data["calls"]:
        command = " ".join(call["argv"]).replace("\n", " ")
        print(f"{call['id']:<8}{call['tenant']:<16}{call['seconds']:>9.1f}  {command[:80]}")
    if data["containers"]:
        print(f"\n{'CONTAINER':<24}{'TENANT':<16}{'SECONDS':>9}  {'POLICY':<16}")
    for one in data["containers"]:
        state = f"killed: {one['killed']}" if one["killed"] else ", ".join(f"no {item['limit']}" for item in one["unenforced"])
        line = f"{short(one['id'], 22):<24}{one['tenant']:<16}{one['seconds']:>9.1f}  {one['policy']:<16}{state}"
        print(line.rstrip())


def short(name: str, most: int) -> str:
    """A container's id for a column: sixty-four hexadecimal digits are cut to twelve, as the engines do."""
    return name[:12] if len(name) == 64 else name[:most]


def _print_kill(data: dict[str, Any]) -> None:
    print(f"{data['id']}", file=sys.stderr)


def _print_stats(data: dict[str, Any]) -> None:
    # Who is not root is told of nothing but his own.
    print(*(f"{key} {data[key]}" for key in ("running", "queued", "completed", "refused", "stuck") if key in data), sep="  ")
    print(f"{'POOL':<24}" + "".join(f"{key:>10}" for key in _POOL))
    for name, pool in data["pools"].items():
        print(f"{name:<24}" + "".join(f"{pool[key]:>10}" for key in _POOL))


_POOL = ("idle", "building", "waiting", "leased", "target", "hits", "misses", "built", "failed")
