"""``exec`` when it was reached through Python: hand over to the native client, which is the only one that parses it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from agentrun.errors import HostError
from agentrun_shim import native


def add_arguments(parser: argparse.ArgumentParser, _verb: str) -> None:
    """Everything after ``exec`` is the native client's."""
    parser.add_argument("rest", nargs=argparse.REMAINDER)


def client_program() -> str:
    """The native client: beside this Python, or in the checkout.

    Raises:
        HostError: neither is there.
    """
    for path in (Path(sys.executable).with_name("agentrun"), native.DIRECTORY / "agentrun"):
        if path.exists():
            return str(path)
    raise HostError("the native client `agentrun` is not installed beside this Python")


def run(args: argparse.Namespace) -> int:
    """Become the native client."""
    program = client_program()
    os.execv(program, ["agentrun", "exec", *args.rest])
