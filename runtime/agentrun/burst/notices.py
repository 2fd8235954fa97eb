"""The memory controller's own notices: memory.events of a leaf changes when its memory.high or memory.max is reached."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

import trio


class Notices:
    """Listens to the leaves it is told of. trio's own wait returns at once on kernfs files; EPOLLPRI in an epoll does not."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._heard: dict[int, Callable[[], None]] = {}

    def heed(self, leaf_fd: int, heard: Callable[[], None]) -> int:
        """Call ``heard`` on every change from now on; returns what ``ignore`` wants. -1: the leaf is going."""
        try:
            fd = os.open("memory.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf_fd)
        except OSError:
            return -1
        os.pread(fd, 4096, 0)
        self._heard[fd] = heard
        self._epoll.register(fd, select.EPOLLPRI)
        return fd

    def ignore(self, fd: int) -> None:
        """Listen to it no more."""
        if self._heard.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            os.close(fd)

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0):
                with contextlib.suppress(OSError):
                    os.pread(fd, 4096, 0)  # or it would tell for ever
                if (heard := self._heard.get(fd)) is not None:
                    heard()

    def close(self) -> None:
        """Nobody listens any more."""
        for fd in tuple(self._heard):
            self.ignore(fd)
        self._epoll.close()
