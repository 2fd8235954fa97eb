# SPDX-License-Identifier: Apache-2.0
"""The real zygote over a bare socket, with the test in the daemon's place, and plans to spoil."""

import array
import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agentrun.policy import DEFAULT
from agentrun.rootfs import RootFs, open_host_root
from agentrun.shape import plan_shape, shape_of
from agentrun_shim.native import slot_program
from agentrun_shim.plan import (
    DONE_SIZE,
    EVENT_SIZE,
    Done,
    Event,
    Kind,
    RunFlag,
    SlotFlag,
    pack_run,
    pack_slot,
    unpack_done,
    unpack_event,
)
from agentrun_shim.seccomp import default_filter

MAPS = [(False, 0, 300_000, 65536), (True, 0, 300_000, 65536)]
PATIENCE = 10.0
"""Seconds after which something that did not answer is said to hang."""


class Gone(Exception):
    """The zygote has closed its socket."""


class RawZygote:
    """A zygote without a plan yet."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        life, self.life = os.pipe2(os.O_CLOEXEC)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (theirs.fileno(), life)]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
        ]
        self.pid = os.posix_spawn(slot_program(), ["agentrun-zygote"], {}, file_actions=actions)
        theirs.close()
        for fd in (life, *high):
            os.close(fd)
        self.status: int | None = None

    def ask(self, message: bytes, fds: Sequence[int] = ()) -> tuple[Done, list[int]]:
        """One datagram, one answer, and the descriptors that came with it."""
        try:
            socket.send_fds(self.sock, [message], array.array("i", fds))
            data, received, flags, _ = socket.recv_fds(self.sock, DONE_SIZE + 1, 8)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone from None
        if not data:
            raise Gone
        assert not flags & socket.MSG_CTRUNC
        return unpack_done(data), received

    def shape(self, fds: Sequence[int], message: bytes) -> Done:
        done, received = self.ask(message, fds)
        assert received == []
        return done

    def descriptors(self) -> list[str]:
        return sorted(os.listdir(f"/proc/{self.pid}/fd"), key=int)

    @property
    def alive(self) -> bool:
        return self.status is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> int:
        """Its wait status, once it has ended by itself."""
        if self.status is None:
            fd = os.pidfd_open(self.pid)
            try:
                assert ready(fd), "the zygote lives on"
            finally:
                os.close(fd)
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def close(self) -> None:
        self.sock.close()
        os.close(self.life)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class RawSlot:
    """init and runner, from an answer; ``control`` is our end of the runner's socket."""

    def __init__(self, done: Done, pidfds: list[int], control: socket.socket) -> None:
        self.done, self.pidfds, self.control = done, pidfds, control
        control.settimeout(PATIENCE)

    def event(self) -> Event | None:
        """The runner's next event; None at its end."""
        data = b""
        while len(data) < EVENT_SIZE:
            try:
                piece = self.control.recv(EVENT_SIZE - len(data))
            except ConnectionResetError:
                return None
            if not piece:
                assert data == b""
                return None
            data += piece
        return unpack_event(data)

    def dispose(self) -> list[int]:
        """Kill and collect both; their exit statuses, the runner's first (a signal is negative)."""
        try:
            return collect(self.pidfds)
        finally:
            self.control.close()  # after it: a runner that waits would end by itself


def collect(pidfds: list[int], *, kill: bool = True) -> list[int]:
    """End and reap clones by their pidfds, the runner before init, as init's exit waits for its namespace to be reaped."""
    statuses = []
    for pidfd in reversed(pidfds):
        if kill:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert ready(pidfd), "a killed clone does not die"
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        statuses.append(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        os.close(pidfd)
    return statuses


def ready(fd: int) -> bool:
    """Readable within PATIENCE."""
    return bool(select.select([fd], [], [], PATIENCE)[0])


def children() -> set[int]:
    """Pids of this process's children, zombies too."""
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


@contextlib.contextmanager
def host_plan() -> Iterator[tuple[bytes, RootFs]]:
    """The default policy's plan, and mounts for one zygote."""
    root = open_host_root()
    try:
        yield plan_shape(shape_of(DEFAULT), root, default_filter(), notify=False), root
    finally:
        root.close()


def ready_zygote() -> RawZygote:
    with host_plan() as (plan, root):
        zygote = RawZygote()
        done = zygote.shape(root.fds, plan)
    assert done.error == 0, done
    return zygote


def clone(zygote: RawZygote, leaf: int = -1, flags: int = 0) -> RawSlot:
    """A correct slot, READY."""
    ours, theirs = socket.socketpair()
    fds = [theirs.fileno()] if leaf < 0 else [theirs.fileno(), leaf]
    done, received = zygote.ask(pack_slot(SlotFlag(flags if leaf < 0 else flags | SlotFlag.LEAF), MAPS, len(fds)), fds)
    theirs.close()
    slot = RawSlot(done, received, ours)
    assert done.error == 0, done
    event = slot.event()
    assert event is not None
    assert event.kind is Kind.READY, event
    return slot


SHELL = [b"/bin/sh", b"-c", b"echo EXECUTED; exit 7"]


def good_run(argv=SHELL, env=(b"A=1", b"B=2"), flags=0, attach=b"", cwd=b"/", nfds=3) -> bytes:
    return pack_run(argv, env, cwd=cwd, flags=RunFlag(flags), umask=0o22, nproc=0, attach=attach, nfds=nfds)


def send_run(slot, message: bytes, fds: int = 3) -> bytes:
    """Send and say that nothing follows; returns what the tool wrote."""
    read, write = os.pipe()
    try:
        socket.send_fds(slot.control, [message], [write] * fds)
        slot.control.shutdown(socket.SHUT_WR)
    except BrokenPipeError:
        pass  # refused at the header: the body may not have been taken
    finally:
        os.close(write)
    with open(read, "rb") as out:
        return out.read()


@pytest.fixture
def nothing_left():
    """No child and no descriptor more after a test than before it."""
    before, open_before = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.fixture
def fragile(nothing_left):
    """A zygote with the default policy's shape; nothing is asked of it at the end."""
    zygote = ready_zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def zygote(fragile):
    """The same; at the end it is alive, holds nothing and still makes a correct slot."""
    yield fragile
    assert fragile.alive
    assert settled(fragile) == ["0", "1", "2", "3", "4"]
    slot = clone(fragile)
    assert send_run(slot, good_run()) == b"EXECUTED\n"
    assert [slot.event().kind, slot.event()] == [Kind.STARTED, None]
    assert slot.dispose() == [7, -9]


def settled(zygote: RawZygote) -> list[str]:
    """The zygote's descriptors between two messages: it closes what came with one after it has answered it."""
    assert zygote.ask(b"?")[0].error == errno.EPROTO
    return zygote.descriptors()
