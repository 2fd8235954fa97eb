"""The probes process from the daemon's side: start it, take what it hands over, start it again when it dies.

Nothing a tool call does waits for it. While it is away its programs are detached, and whoever listens knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import trio

_log = logging.getLogger("agentrun")
_PAUSE_LEAST, _PAUSE_MOST = 0.05, 5.0
"""Seconds before a dead process is replaced; doubled while it does not live."""
_STEADY = 10.0
"""Seconds after which one is taken to live."""

Handler = Callable[[dict[str, Any], Mapping[str, int]], None]


class Link:
    """One probes process at a time. ``on_message`` gets what it says, with descriptors to keep; ``on_lost`` that it is gone."""

    def __init__(self, options: Mapping[str, object], on_message: Handler, on_lost: Callable[[str], None]) -> None:
        self._options = json.dumps(dict(options))
        self._on_message, self._on_lost = on_message, on_lost
        self.ready = trio.Event()
        """The first one has attached what it can, or has failed."""
        self.done = trio.Event()
        """And all else it was asked for."""
        self.pid = 0
        """Of the one that runs; 0 between two."""
        self.starts = 0
        self.memory = 0
        """Bytes it takes."""
        self._pause = _PAUSE_LEAST

    async def run(self) -> None:
        """Keep one running until cancelled."""
        async with trio.open_nursery() as nursery:
            await self._keep(nursery)

    async def _keep(self, nursery: trio.Nursery) -> None:
        while True:
            begun = trio.current_time()
            reason = await self._once(nursery)
            self.ready.set()
            self.done.set()
            if reason is None:
                return  # it said that it can do nothing here
            lived = trio.current_time() - begun
            self._pause = _PAUSE_LEAST if lived > _STEADY else min(_PAUSE_MOST, self._pause * 2)
            _log.warning("the probes process %s; starting another in %.1f s", reason, self._pause)
            await trio.sleep(self._pause)

    def hurry(self) -> None:
        """Forget that it died before: replace it soon if it does again."""
        self._pause = _PAUSE_LEAST

    async def _once(self, nursery: trio.Nursery) -> str | None:
        """One process from start to end: how it ended, or None if there is no sense in another."""
        try:
            sock, pid, pidfd = _spawn(self._options)
        except OSError as error:
            _log.error("starting the probes process: %s", error.strerror)
            self._on_lost(f"it could not be started: {error.strerror}")
            return None
        self.starts += 1
        self.pid = pid
        held = False
        try:
            while True:
                await trio.lowlevel.wait_readable(sock)
                try:
                    data, fds, _, _ = socket.recv_fds(sock, 65536, 32)
                except BlockingIOError:
                    continue
                except ConnectionResetError:
                    data, fds = b"", []
                if not data:
                    return "died"
                message = json.loads(data)
                self._take(message, fds)
                held = held or message["kind"] not in ("failed", "ready", "done")
                if message["kind"] == "done" and not held:
                    return None
        finally:
            self.pid = 0
            sock.close()
            nursery.start_soon(_collect, pid, pidfd)
            if held:
                self._on_lost("the probes process ended")

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        self.memory = message["memory"]
        if message["kind"] in ("ready", "done"):
            (self.ready if message["kind"] == "ready" else self.done).set()
        else:
            self._on_message(message, dict(zip(message["maps"], fds, strict=True)))


async def _collect(pid: int, pidfd: int) -> None:
    """See one to its end. The kernel takes seconds to detach fifty tracepoints, and the next one is not to wait for that."""
    with trio.CancelScope(shield=True):
        with trio.move_on_after(10) as late:
            await trio.lowlevel.wait_readable(pidfd)
        if late.cancelled_caught:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    os.close(pidfd)


def _spawn(options: str) -> tuple[socket.socket, int, int]:
    """Start one: its socket, pid and pidfd.

    Raises:
        OSError: it could not be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        high = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 16)
        try:
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, high, 3),
            ]
            names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR")
            env = {name: os.environ[name] for name in names if name in os.environ}
            argv = [sys.executable, "-P", "-m", "agentrun.probes", "3", options]
            pid = os.posix_spawn(sys.executable, argv, env, file_actions=actions)
        finally:
            os.close(high)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return ours, pid, os.pidfd_open(pid)
