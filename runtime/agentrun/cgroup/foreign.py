"""The cgroup of a container that another runtime made: read, written, frozen and killed like a leaf, never made or removed."""

from __future__ import annotations

import contextlib
import os

from agentrun.cgroup.files import read_file
from agentrun.cgroup.leaf import Leaf
from agentrun.cgroup.tree import level_of, place_of
from agentrun.errors import HostError, UsageError


class Foreign(Leaf):
    """A cgroup that is somebody else's."""

    __slots__ = ("level", "owner", "path")

    def __init__(self, cgroup: str, inode: int, name: str) -> None:
        """``cgroup`` is as /proc/PID/cgroup has it, ``inode`` that of its directory, ``name`` the container's.

        Raises:
            UsageError: there is no such cgroup, or it is another one by now, or the root.
        """
        path = place_of(cgroup)
        if path is None:
            raise UsageError(f"cgroup: {cgroup} is in no cgroup2 file system that the daemon sees")
        self._files, self._parent_fd = {}, -1
        self._built_user = self._built_system = 0.0
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise UsageError(f"cgroup: {path}: {error.strerror}") from error
        found = os.fstat(self.fd)
        self.path, self.name, self.where = path, name, str(path)
        self.id, self.owner, self.level = found.st_ino, found.st_uid, level_of(path)
        self.controllers = frozenset((read_file(self.fd, "cgroup.controllers") or b"").decode().split())
        kind = (read_file(self.fd, "cgroup.type") or b"").decode().strip()
        if self.level < 1:
            why = "the root"
        elif self.id != inode or self.is_gone():
            why = "another one than the one that was meant"
        elif kind in ("threaded", "domain invalid"):
            why = f"{kind}: cgroups(7) lets nobody kill or limit such a one as a whole"
        else:
            return
        self.close()
        raise UsageError(f"cgroup: {path} is {why}")

    def is_gone(self) -> bool:
        """It was removed; the descriptor still holds on to what is left."""
        try:
            return read_file(self.fd, "cgroup.events") is None
        except OSError:
            return False  # out of descriptors, say: it is asked again

    def contains(self, cgroup: str) -> bool:
        """A cgroup that /proc/PID/cgroup names so is this one, or below it."""
        place = place_of(cgroup)
        return place is not None and place.is_relative_to(self.path)

    def kill(self) -> None:
        """SIGKILL to everything in it. It may be gone: its runtime removes it when it likes."""
        with contextlib.suppress(HostError):
            super().kill()

    def thaw(self) -> None:
        """Let it go on, if it is there."""
        with contextlib.suppress(HostError):
            self.freeze(False)
