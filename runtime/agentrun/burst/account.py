"""The memory controller's account of a cgroup: what it uses, and what of that is page cache the kernel can drop."""

from __future__ import annotations

from collections.abc import Mapping

from agentrun.cgroup.files import read_file
from agentrun.cgroup.stats import parse_number
from agentrun.units import MIB

STALE = 0.25
"""Seconds for which what was page cache is taken to be it still, while usage stands still: at a limit the kernel swaps the one
for the other."""


class Account:
    """One cgroup's. memory.stat takes the kernel many times what memory.current does, so it is not read at every look."""

    __slots__ = ("_cache", "_dirfd", "_known", "_when")

    def __init__(self, dirfd: int) -> None:
        self._dirfd = dirfd
        self._when = float("-inf")
        self._known = self._cache = 0

    def look(self, now: float) -> tuple[int, int] | None:
        """Bytes it has now, and those of them that the kernel can drop; None without a memory controller.

        ``now``: of a clock in seconds.
        """
        usage = usage_of(self._dirfd)
        if usage is None:
            return None
        if abs(usage - self._known) >= MIB or now - self._when > STALE:
            self._cache, self._known, self._when = reclaimable(self._dirfd), usage, now
        return usage, min(self._cache, usage)


def usage_of(dirfd: int) -> int | None:
    """memory.current of a cgroup, bytes; None without a memory controller."""
    return parse_number(read_file(dirfd, "memory.current"))


def reclaimable(dirfd: int) -> int:
    """Bytes of a cgroup's page cache, which the kernel drops or writes back: memory.stat's file, less tmpfs and locked pages."""
    stat = _stat(dirfd)
    return max(0, stat.get(b"file", 0) - stat.get(b"shmem", 0) - stat.get(b"unevictable", 0))


def _stat(dirfd: int) -> Mapping[bytes, int]:
    words = (read_file(dirfd, "memory.stat") or b"").split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))
