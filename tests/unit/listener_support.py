# SPDX-License-Identifier: Apache-2.0
"""A process under a filter whose listener is ours."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from agentrun_shim.seccomp import compile_profile
from agentrun_shim.seccomp_profile import Profile
from tests.unit.seccomp_support import LOAD_AND_LISTEN


class Child:
    """The process, before it does anything; `listener` is its filter's."""

    def __init__(self, process: subprocess.Popen[str], channel: socket.socket, listener: int) -> None:
        self.process, self.channel, self.listener = process, channel, listener

    def go(self) -> None:
        """Let it evaluate its expression."""
        self.channel.send(b"x")

    def result(self) -> Any:
        """What the expression came to."""
        out, error = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, error
        return json.loads(out)


@contextlib.contextmanager
def child(profile: Profile, expression: str) -> Iterator[Child]:
    """A process that will evaluate `expression`, where call(nr, ...) is a system call, and print it as JSON."""
    program = compile_profile(profile, notify=True)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        argv = [sys.executable, "-I", "-S", "-c", LOAD_AND_LISTEN, program.hex(), str(theirs.fileno()), expression]
        process = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=True
        )
        try:
            theirs.close()
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            assert fds, process.communicate(timeout=10)[1]
            yield Child(process, ours, fds[0])
        finally:
            process.kill()
            process.communicate()


def readable(fd: int, seconds: float = 10) -> bool:
    """Wait until a listener has a call for us; false if it hangs up."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    events = poll.poll(seconds * 1000)
    assert events, "nothing came"
    return bool(events[0][1] & select.POLLIN)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
