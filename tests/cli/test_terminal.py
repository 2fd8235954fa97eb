# SPDX-License-Identifier: Apache-2.0
"""A terminal of the tool's own, behind the caller's."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import pytest

from tests.support import CLIENT, PATIENCE, eventually

pytestmark = pytest.mark.host


class Terminal:
    """A client on a pseudo-terminal, and the person before it."""

    def __init__(self, daemon, *command: str, columns: int = 101, rows: int = 43) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.seen = b""
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.client = subprocess.Popen(
            ["setsid", "--ctty", "--wait", CLIENT, "exec", *command], stdin=slave, stdout=slave, stderr=slave,
            env=daemon.env | {"TERM": "xterm-test"},
        )  # fmt: skip

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def read_until(self, text: bytes) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self) -> int:
        """The exit status; what was on the screen is in ``seen``. The terminal is as it was."""
        code = self.client.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self.before
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        return code


@pytest.fixture
def terminal(daemon):
    with contextlib.ExitStack() as stack:

        def start(*command, **options):
            made = Terminal(daemon, *command, **options)
            stack.callback(os.close, made.master)
            stack.callback(os.close, made.slave)
            stack.callback(made.client.wait)
            stack.callback(made.client.kill)
            return made

        yield start


def test_the_tool_has_a_terminal(terminal):
    it = terminal("--", "sh", "-c", "tty; test -t 0 -a -t 1 -a -t 2 && echo all; : > /dev/tty && echo controlling; echo $TERM")
    assert it.end() == 0
    assert it.seen == b"/dev/pts/0\r\nall\r\ncontrolling\r\nxterm-test\r\n"


def test_the_size_of_the_window_and_its_change(terminal):
    it = terminal("--", "sh", "-c", "stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.02; done")
    assert it.read_until(b"ready\r\n") == b"43 101\r\n"
    it.resize(77, 21)
    assert it.end() == 5
    assert it.seen == b"21 77\r\n"


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_a_key_sends_a_signal_to_the_tool(terminal, key, number):
    it = terminal("--", "sh", "-c", f"trap 'echo got; exit 7' {number.value}; echo ready; while :; do sleep 0.02; done")
    it.read_until(b"ready\r\n")
    it.type(key)
    assert it.end() == 7
    assert b"got\r\n" in it.seen


def test_job_control(terminal):
    """Ctrl-C ends the job in the foreground, not the shell that started it; Ctrl-Z stops it."""
    it = terminal("--env", "PS1=prompt> ", "--", "bash", "--norc", "--noprofile", "-i")
    it.read_until(b"prompt> ")
    job = b"sh -c 'printf sta%s\\\\n rted; exec sleep 60'\n"
    it.type(job)
    it.read_until(b"started\r\n")
    it.type(b"\x03")
    it.read_until(b"prompt> ")
    it.type(b"echo code $?\n")
    it.read_until(b"code 130\r\n")
    it.type(job)
    it.read_until(b"started\r\n")
    it.type(b"\x1a")
    it.read_until(b"Stopped")
    it.type(b"kill %1; exit 4\n")
    it.type(b"exit 4\n")
    assert it.end() == 4


def test_what_is_typed_is_echoed_once_and_read(terminal):
    it = terminal("--", "sh", "-c", "echo ready; read x; echo got $x")
    it.read_until(b"ready\r\n")
    it.type(b"word\n")
    assert it.end() == 0
    assert it.seen == b"word\r\ngot word\r\n"


def test_the_end_of_input_key(terminal):
    it = terminal("--", "sh", "-c", "echo ready; wc -c")
    it.read_until(b"ready\r\n")
    it.type(b"abc\n\x04")
    assert it.end() == 0
    assert it.seen.endswith(b"4\r\n")


def test_much_output_arrives_whole(terminal):
    it = terminal("--", "sh", "-c", "seq 20000; echo end")
    text = it.read_until(b"end\r\n")
    assert text.split() == [b"%d" % n for n in range(1, 20001)]
    assert it.end() == 0


def test_no_tty_is_an_option(terminal):
    it = terminal("--no-tty", "--", "sh", "-c", "cat /dev/tty >/dev/null 2>&1 </dev/null || echo none")
    assert it.end() == 0
    assert it.seen.endswith(b"none\r\n")


def test_a_terminal_that_hangs_up_ends_the_call(terminal, daemon):
    it = terminal("--", "sh", "-c", "echo ready; sleep 300")
    it.read_until(b"ready\r\n")
    it.client.kill()  # setsid --wait, the session's leader: its death hangs up the terminal
    eventually(lambda: not daemon.calls())
