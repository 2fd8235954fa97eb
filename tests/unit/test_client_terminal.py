# SPDX-License-Identifier: Apache-2.0
"""The native client between two terminals: the caller's, and the one the tool has."""

import os
import pty
import select
import signal
import socket
import subprocess
import termios
import time
import tty
from pathlib import Path

import pytest

from tests.unit.client_support import WENT_AWAY, needs_client

pytestmark = needs_client


class Terminals:
    """The caller's terminal, with the client on it, and the tool's, whose master side the client gets."""

    def __init__(self, start, daemon, *args, **env):
        self.screen, self.caller = pty.openpty()
        termios.tcsetwinsize(self.caller, (33, 101))
        self.cooked = termios.tcgetattr(self.caller)
        self.tool = -1
        self.client = start(*args, "vi", stdin=self.caller, stdout=self.caller, stderr=self.caller, env=env)
        self.call = daemon.accept()

    def connect(self):
        master, self.tool = pty.openpty()
        tty.setraw(self.tool)
        console = socket.socket(fileno=self.call.fds.pop("console"))
        socket.send_fds(console, [b"x"], [master])
        console.close()
        os.close(master)
        os.write(self.tool, b"ready")
        assert self.read(self.screen, 5) == b"ready"  # from here on the caller's terminal is raw

    def close(self, *names: str):
        for name in names:
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    @staticmethod
    def read(fd: int, count: int) -> bytes:
        data = b""
        while len(data) < count and select.select([fd], [], [], 20)[0]:
            data += os.read(fd, count - len(data))
        return data

    def ticks(self) -> int:
        """Processor time the client has used, in hundredths of a second."""
        return sum(map(int, Path(f"/proc/{self.client.pid}/stat").read_text().split()[13:15]))

    def is_cooked(self) -> bool:
        return termios.tcgetattr(self.caller) == self.cooked


@pytest.fixture
def terminals(start, daemon):
    made = []

    def make(*args, **env):
        made.append(Terminals(start, daemon, *args, **env))
        return made[-1]

    yield make
    for t in made:
        t.close("screen", "caller", "tool")


def test_terminal_relays_both_ways(terminals):
    t = terminals(TERM="vt220")
    assert (t.call.request.fds, t.call.request.env) == (["console"], [b"TERM=vt220"])
    assert t.is_cooked()
    t.connect()
    assert termios.tcgetwinsize(t.tool) == (33, 101)
    assert not termios.tcgetattr(t.caller)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    os.write(t.screen, b"\x03ls\r\x1a\x04")  # keys are keys, not signals of ours
    assert t.read(t.tool, 6) == b"\x03ls\r\x1a\x04"
    termios.tcsetwinsize(t.caller, (10, 20))
    t.client.send_signal(signal.SIGWINCH)
    os.write(t.screen, b"!")
    assert t.read(t.tool, 1) == b"!"
    while termios.tcgetwinsize(t.tool) != (10, 20):
        assert t.client.poll() is None
    t.client.send_signal(signal.SIGTERM)
    assert t.call.read_message()["signal"] == signal.SIGTERM
    t.close("tool")
    t.call.answer(op="result", exit=9, json=b"{}")
    assert t.client.wait(20) == 9
    assert t.is_cooked()


def fill(fd: int, data: bytes) -> bytes:
    """Write until nobody takes more, and return what was written."""
    os.set_blocking(fd, False)
    written, refused = b"", 0
    while refused < 50:
        try:
            written += data[: os.write(fd, data)]
            refused = 0
        except BlockingIOError:
            refused += 1
            time.sleep(0.002)
    return written


@pytest.mark.parametrize("closed_first", [True, False])
def test_output_is_drained_after_the_answer(terminals, closed_first):
    t = terminals()
    t.connect()
    fill(t.screen, b"keys")
    data = fill(t.tool, bytes(range(251)) * 16)  # both terminals and the client are full, both ways
    t.client.send_signal(signal.SIGUSR1)
    assert t.call.read_message()["signal"] == signal.SIGUSR1
    if closed_first:
        t.close("tool")
    t.call.answer(op="result", exit=0, json=b"{}")
    ticks = t.ticks()
    with pytest.raises(subprocess.TimeoutExpired):  # longer than the client bears silence
        t.client.wait(0.8)
    assert t.ticks() - ticks < 20  # of 80: it waits, it does not spin
    assert t.read(t.screen, len(data)) == data
    assert t.client.wait(20) == 0
    assert t.is_cooked()


def test_a_tool_that_reads_no_keys_blocks_nothing(terminals):
    t = terminals()
    t.connect()
    typed = fill(t.screen, b"0123456789" * 50 + b"k")
    ticks = t.ticks()
    os.write(t.tool, b"output")
    assert t.read(t.screen, 6) == b"output"
    time.sleep(0.3)
    assert t.ticks() - ticks < 8  # of 30
    assert t.read(t.tool, len(typed)) == typed
    t.close("tool")
    t.call.answer(op="result", exit=0, json=b"{}")
    assert t.client.wait(20) == 0


@pytest.mark.parametrize("end", ["daemon", "alarm", "error"])
def test_terminal_is_restored_whatever_happens(terminals, end):
    t = terminals()
    t.connect()
    if end == "alarm":
        t.client.send_signal(signal.SIGALRM)
    elif end == "error":
        t.close("tool")
        t.call.answer(op="error", exit=125, message="broken")
    else:
        t.call.close()
    assert t.client.wait(20) == (128 + signal.SIGALRM if end == "alarm" else 125)
    assert t.is_cooked()
    expected = {"daemon": WENT_AWAY, "alarm": "", "error": "agentrun: broken\n"}[end].replace("\n", "\r\n").encode()
    assert t.read(t.screen, len(expected)) == expected


def test_console_that_is_never_made(terminals):
    t = terminals("--env", "TERM=x", TERM="vt220")
    assert t.call.request.env == [b"TERM=x"]
    t.call.answer(op="result", exit=6, json=b"{}")
    assert t.client.wait(0.4) == 6
    assert t.is_cooked()


def test_hang_up_of_the_callers_terminal(terminals):
    t = terminals()
    t.connect()
    t.close("caller", "screen")
    os.write(t.tool, b"nobody sees this" * 4096)  # and still it does not block
    t.close("tool")
    t.call.answer(op="result", exit=5, json=b"{}")
    assert t.client.wait(20) == 5


@pytest.mark.parametrize("option", ["--no-tty", "--json"])
def test_no_terminal_when_told(terminals, option):
    assert "console" not in terminals(option, TERM="x").call.request.fds
