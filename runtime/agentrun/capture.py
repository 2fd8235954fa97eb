"""Bounded capture of a tool's output: the head and the tail are kept, the middle is counted."""

from __future__ import annotations

import os

_CHUNK = 65536


class Capture:
    """The read end of a pipe and what came out of it, at most ``bound`` bytes plus one line that says what is missing."""

    __slots__ = ("_bound", "_head", "_tail", "fd", "total")

    def __init__(self, fd: int, bound: int) -> None:
        """``fd`` must not block, and stays the caller's."""
        self.fd = fd
        self.total = 0
        """Bytes the tool wrote."""
        self._bound = bound
        self._head = bytearray()
        self._tail = bytearray()

    def drain(self) -> bool:
        """Read what is there now; True at the end of the stream."""
        for _ in range(16):  # a writer that never pauses must not keep the others from being read
            try:
                data = os.read(self.fd, _CHUNK)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._keep(data)
            if len(data) < 4096:
                return False
        return False

    def finish(self) -> None:
        """Take what is still in the pipe and stop reading; for when every writer is dead."""
        before = -1
        while self.total != before:
            before = self.total
            self.drain()

    def _keep(self, data: bytes) -> None:
        self.total += len(data)
        half = self._bound // 2
        room = half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 4 * half + _CHUNK:
                del self._tail[: len(self._tail) - (self._bound - half)]

    @property
    def truncated(self) -> bool:
        """More was written than is kept."""
        return self.total > self._bound

    def content(self) -> bytes:
        """What is kept; if something is missing, a line between head and tail says how much."""
        if not self.truncated:
            return bytes(self._head + self._tail)
        tail = bytes(self._tail[max(0, len(self._tail) - (self._bound - self._bound // 2)) :])
        cut = self.total - len(self._head) - len(tail)
        return bytes(self._head) + b"\n[agentrun: %d bytes cut]\n" % cut + tail
