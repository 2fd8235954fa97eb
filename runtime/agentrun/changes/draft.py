"""A change set while its call runs: where overlay writes to, and at the end the comparison with the original."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from agentrun.changes.beneath import DIRECTORY, FILE, opened, sync_file_system, walk
from agentrun.changes.model import ChangeSet, count, encode
from agentrun.changes.mount import clone_quietly
from agentrun.changes.nodes import counts
from agentrun.changes.scan import scan
from agentrun.changes.store import Store, remove_deep
from agentrun.errors import HostError
from agentrun.image.locks import sync_directory
from agentrun.types import Changes

_TICK = 0.0005
_MANY = 32
"""From so many entries on, the whole file system is synced once instead of each of them."""


class Draft:
    """What will be a change set, or nothing. Everything here takes the disk's time: call it in a thread."""

    def __init__(self, store: Store, workspace: int, workspace_path: str) -> None:
        """Begin one for the directory ``workspace``, a descriptor which stays the caller's.

        Raises:
            HostError: there is no room for it.
        """
        self._store, self._workspace, self._workspace_path = store, workspace, workspace_path
        self._since = 0
        self._sealed = False
        try:
            self.id, self._path, self._lock = store.begin()
        except OSError as error:
            raise HostError(f"change store {store.root}: {error.strerror} ({error.filename})") from error
        self.fd = -1
        """Of its directory, with ``upper`` and ``work``."""
        try:
            for name in ("upper", "work"):
                (self._path / name).mkdir(0o700)
            self.fd = os.open(self._path, DIRECTORY)
            self._dress_upper()
        except OSError as error:
            self.close()
            raise HostError(f"change store {store.root}: {error.strerror} ({error.filename})") from error

    def _dress_upper(self) -> None:
        """Overlay shows the upper directory's own attributes as those of the workspace."""
        base = clone_quietly(self._workspace)
        try:
            dress_like(self._path / "upper", base)
        finally:
            os.close(base)

    def start(self) -> None:
        """Take the time: what is changed in the original from now on, the tool may or may not have seen."""
        self._since = stamp(self.fd)

    def seal(self, call: str, argv: Sequence[bytes], caller: tuple[int, int]) -> Changes | None:
        """The call has ended: keep what it changed, if it changed anything.

        Raises:
            HostError: it cannot be compared with the original, or kept. What the tool did is lost then.
        """
        try:
            return self._seal(call, tuple(argv), caller)
        except OSError as error:
            where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            raise HostError(f"workspace {self._workspace_path}: its changes cannot be kept: {error.strerror}{where}") from error

    def _seal(self, call: str, argv: tuple[bytes, ...], caller: tuple[int, int]) -> Changes | None:
        upper, base = os.open(self._path / "upper", DIRECTORY), clone_quietly(self._workspace)
        try:
            changes = scan([upper], base, since=self._since)
            if not changes:
                return None
            entries, inode = list(walk(upper, b"")), os.fstat(base).st_ino
            size = sum(512 * found.st_blocks for _, found in entries)
            _sync(upper, entries)  # before there is a manifest, which says that all of it is there
        finally:
            os.close(base)
            os.close(upper)
        remove_deep(self._path / "work")
        whole = ChangeSet(
            id=self.id, workspace=self._workspace_path, inode=inode, uid=caller[0], gid=caller[1], created=time.time(), call=call,
            argv=argv, size=size, changes=changes,
        )  # fmt: skip
        _write(self._path / "manifest", encode(whole))
        sync_directory(self._store.root)
        self._sealed = True
        return Changes(id=self.id, bytes=size, **count(changes))

    def close(self) -> None:
        """Let go of it. What was not sealed is removed.

        Raises:
            HostError: it could not be; the next who uses the store tries again.
        """
        try:
            if not self._sealed:
                self._store.remove(self._path)
        finally:
            for fd in (self.fd, self._lock):
                if fd >= 0:
                    os.close(fd)
            self.fd = self._lock = -1


def dress_like(directory: Path, other: int) -> None:
    """Give a directory the owner, mode, times and extended attributes of another, a descriptor."""
    fd, with_rights = os.open(directory, DIRECTORY), os.open(f"/proc/self/fd/{other}", DIRECTORY & ~os.O_NOFOLLOW)
    try:
        found = os.fstat(with_rights)
        os.chown(fd, found.st_uid, found.st_gid)
        for name in os.listxattr(with_rights):
            if counts(name):
                os.setxattr(fd, name, os.getxattr(with_rights, name))
        os.chmod(fd, found.st_mode & 0o7777)
        os.utime(fd, ns=(found.st_mtime_ns, found.st_mtime_ns))
    finally:
        os.close(with_rights)
        os.close(fd)


def stamp(fd: int) -> int:
    """A moment, in the time that files are stamped with: what was changed before has an earlier time of change than this, and
    what is changed afterwards has not.

    The kernel stamps with the time of its last tick, some milliseconds, unless a file's time has been read since it was last
    changed (Linux 6.13). So there the second stamp is later at once, and elsewhere at the next tick.
    """
    os.utime(fd)
    first = os.fstat(fd).st_ctime_ns
    while True:
        os.utime(fd)
        if (now := os.fstat(fd).st_ctime_ns) > first:
            return now
        time.sleep(_TICK)


def _sync(upper: int, entries: Sequence[tuple[bytes, os.stat_result]]) -> None:
    """Have what is kept on the disk: all of it at once where that is cheaper, though others' files are written then as well."""
    if len(entries) >= _MANY:
        sync_file_system(upper)
        return
    for path, found in entries:
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            with opened(upper, path, FILE) as fd:
                os.fsync(fd)
    os.fsync(upper)


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    new.rename(path)
    sync_directory(path.parent)
