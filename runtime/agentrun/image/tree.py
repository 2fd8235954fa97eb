"""Writes one layer. Every name is looked up relative to a held directory, and no link is ever followed.

What has been written is known from a table, not asked of the disk: it decides what may replace what, and becomes the manifest.
The disk is the second line: each component is opened with O_NOFOLLOW | O_DIRECTORY, each file with O_EXCL.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

from agentrun.image.entries import Attributes, check_target
from agentrun.image.limits import ArchiveError, Budget, Limits
from agentrun.image.manifest import OPAQUE, Manifest, Record, finished, kind_name

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
Owner = tuple[int, int, int]
"""Mode, user and group."""
ROOTS: Final[Owner] = (0o755, 0, 0)


class Tree:
    """A layer that is being written, below an empty directory."""

    def __init__(self, root: int, limits: Limits, inherit: Callable[[bytes], Owner] = lambda _: ROOTS) -> None:
        """``root`` is a descriptor of the directory, and stays the caller's. ``inherit`` says what a directory is like that
        has entries in the layer but none of its own: as in the layers below.
        """
        self.budget = Budget(limits)
        self.implied: dict[bytes, Owner] = {}
        self._root = root
        self._inherit = inherit
        self._owners = os.geteuid() == 0  # anybody else can only make what is his own
        self._opaque = OPAQUE[0] if self._owners else OPAQUE[1]
        self._records: dict[bytes, Record] = {b"": Record("d", 0o755, *self._owner(0, 0))}
        self._children: dict[bytes, int] = {b"": 0}
        self._times: dict[bytes, int] = {b"": 0}
        self._stack: list[tuple[bytes, int]] = []

    def close(self) -> None:
        """Close what is held."""
        while self._stack:
            os.close(self._stack.pop()[1])

    def directory(self, parts: list[bytes], attributes: Attributes) -> None:
        """A directory; one that is there stays, with other attributes.

        Raises:
            ArchiveError: it cannot be there.
        """
        key = b"/".join(parts)
        if parts:
            self._make_directory(self._parent(parts), parts)
        self.implied.pop(key, None)
        old = self._records[key]
        opaque = {name: value for name, value in old.xattrs.items() if name == self._opaque}
        self._records[key] = self._record("d", attributes, xattrs={**attributes.xattrs, **opaque})
        self._times[key] = attributes.mtime

    def file(self, parts: list[bytes], attributes: Attributes, size: int, data: Iterator[tuple[int, bytes]]) -> None:
        """A file of so many bytes, with holes wherever ``data`` leaves some.

        Raises:
            ArchiveError: it cannot be there.
        """
        fd, record = self._new_file(parts, attributes, size)
        try:
            digest = hashlib.sha256()
            end = 0
            for at, chunk in data:
                _hash_zeros(digest.update, at - end)
                digest.update(chunk)
                if at != end:
                    os.lseek(fd, at, os.SEEK_SET)
                _write(fd, chunk)
                end = at + len(chunk)
            if end < size:
                os.truncate(fd, size)
                _hash_zeros(digest.update, size - end)
            record.content = digest.digest()
            self._dress(fd, record, attributes.mtime)
        finally:
            os.close(fd)

    def filled_file(self, parts: list[bytes], attributes: Attributes, fill: Callable[[int], bytes]) -> None:
        """A file whose content ``fill`` puts there by itself, given a descriptor; it gives the SHA-256 of it.

        Raises:
            ArchiveError: it cannot be there.
        """
        fd, record = self._new_file(parts, attributes, 0)
        try:
            record.content = fill(fd)
            record.size = os.fstat(fd).st_size
            self._dress(fd, record, attributes.mtime)
        finally:
            os.close(fd)

    def symlink(self, parts: list[bytes], attributes: Attributes, target: bytes) -> None:
        """A symbolic link. It may lead anywhere in the image, and be absolute; it may not climb above the image's root.

        Raises:
            ArchiveError: it does, or cannot be there.
        """
        key = b"/".join(parts)
        check_target(key, len(parts) - 1, target)
        parent = self._place(parts)
        os.symlink(target, parts[-1], dir_fd=parent)
        record = self._records[key] = self._record("l", attributes, content=target)
        record.mode = 0o777
        if self._owners:
            os.chown(parts[-1], record.uid, record.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(parts[-1], ns=(attributes.mtime, attributes.mtime), dir_fd=parent, follow_symlinks=False)

    def hard_link(self, parts: list[bytes], target: list[bytes]) -> None:
        """Another name for a file or a symbolic link of the same layer.

        Raises:
            ArchiveError: there is no such thing in the layer, or it cannot be there.
        """
        key, other = b"/".join(parts), b"/".join(target)
        record = self._records.get(other)
        if record is None or record.kind in ("d", "w"):
            kind = "nothing in this layer" if record is None else f"a {kind_name(record.kind)}"
            raise ArchiveError(key, f"is a hard link to {os.fsdecode(other)!r}, which is {kind}")
        if key == other:
            raise ArchiveError(key, "is a hard link to itself")
        parent = self._place(parts)
        directory = self._open(target[:-1])
        try:
            os.link(target[-1], parts[-1], src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(directory)
        self._records[key] = record

    def whiteout(self, parts: list[bytes]) -> None:
        """What layers below have there is not in the image. If this layer has something there, only that is.

        Raises:
            ArchiveError: it cannot be there.
        """
        key = b"/".join(parts)
        old = self._records.get(key)
        if old is not None:
            if old.kind == "d":
                self.opaque(parts)
            return
        os.mknod(parts[-1], stat.S_IFCHR, os.makedev(0, 0), dir_fd=self._place(parts))
        self._records[key] = Record("w")

    def opaque(self, parts: list[bytes]) -> None:
        """What layers below have in that directory is not in the image.

        Raises:
            ArchiveError: it cannot be there.
        """
        if parts:
            self._imply(self._parent(parts), parts)
        record = self._records[b"/".join(parts)]
        record.xattrs = {**record.xattrs, self._opaque: b"y"}

    def finish(self) -> Manifest:
        """Give the directories their attributes, which had to wait: what is written into one changes its time."""
        for key in sorted((key for key, record in self._records.items() if record.kind == "d"), reverse=True):
            fd = self._open(key.split(b"/") if key else [])
            try:
                self._dress(fd, self._records[key], self._times[key])
            finally:
                os.close(fd)
        self.close()
        return finished(self._records)

    def _owner(self, uid: int, gid: int) -> tuple[int, int]:
        return (uid, gid) if self._owners else (os.geteuid(), os.getegid())

    def _record(
        self, kind: str, attributes: Attributes, size: int = 0, content: bytes = b"", xattrs: dict[str, bytes] | None = None
    ) -> Record:
        return Record(kind, attributes.mode, *self._owner(attributes.uid, attributes.gid), size, content, xattrs or {})

    def _new_file(self, parts: list[bytes], attributes: Attributes, size: int) -> tuple[int, Record]:
        parent = self._place(parts)
        record = self._records[b"/".join(parts)] = self._record("f", attributes, size, xattrs=attributes.xattrs)
        return os.open(parts[-1], _NEW, 0o600, dir_fd=parent), record

    def _place(self, parts: list[bytes]) -> int:
        """Make room for something that is no directory; the directory that it goes to.

        What is there already goes, as an archive's later entry always replaces an earlier one: but not a directory with entries.
        """
        key = b"/".join(parts)
        if not parts:
            raise ArchiveError(b".", "is the root of the layer, and not a directory")
        parent = self._parent(parts)
        old = self._records.pop(key, None)
        if old is None:
            self._children[b"/".join(parts[:-1])] += 1
        elif old.kind != "d":
            os.unlink(parts[-1], dir_fd=parent)
        elif self._children.pop(key):
            raise ArchiveError(key, "is a directory with entries in it, and then, later in the archive, something else")
        else:
            self.implied.pop(key, None)
            os.rmdir(parts[-1], dir_fd=parent)
        return parent

    def _make_directory(self, parent: int, parts: list[bytes]) -> None:
        key = b"/".join(parts)
        old = self._records.get(key)
        if old is not None and old.kind == "d":
            return
        if old is None:
            self._children[b"/".join(parts[:-1])] += 1
        else:
            os.unlink(parts[-1], dir_fd=parent)
        os.mkdir(parts[-1], 0o700, dir_fd=parent)
        # A whiteout and then a directory: the directory, and nothing of what is below it.
        self._records[key] = Record("d", xattrs={self._opaque: b"y"} if old is not None and old.kind == "w" else {})
        self._children[key] = 0
        self._times[key] = 0

    def _imply(self, parent: int, parts: list[bytes]) -> None:
        """Have a directory of which the archive has not said what it is like, at least not yet."""
        key = b"/".join(parts)
        old = self._records.get(key)
        if old is not None and old.kind == "d":
            return
        if old is not None and old.kind != "w":
            raise ArchiveError(key, f"is a {kind_name(old.kind)} of this layer, and other entries are below it")
        self.budget.take_entry(key, 0)
        self._make_directory(parent, parts)
        self.implied[key] = mode, uid, gid = self._inherit(key)
        record = self._records[key]
        record.mode, (record.uid, record.gid) = mode, self._owner(uid, gid)

    def _parent(self, parts: list[bytes]) -> int:
        """The directory that an entry goes to, made if it has to be. It stays open: the next entry mostly goes there as well."""
        same = 0
        while same < min(len(self._stack), len(parts) - 1) and self._stack[same][0] == parts[same]:
            same += 1
        while len(self._stack) > same:
            os.close(self._stack.pop()[1])
        for depth in range(same, len(parts) - 1):
            above = self._stack[-1][1] if self._stack else self._root
            try:
                self._imply(above, parts[: depth + 1])
            except ArchiveError as error:
                raise ArchiveError(b"/".join(parts), f"is below {error.entry}, which {error.reason}") from None
            self._stack.append((parts[depth], os.open(parts[depth], _DIRECTORY, dir_fd=above)))
        return self._stack[-1][1] if self._stack else self._root

    def _open(self, parts: list[bytes]) -> int:
        """A directory that is known to be there."""
        fd = os.dup(self._root)
        for part in parts:
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _dress(self, fd: int, record: Record, mtime: int) -> None:
        if self._owners:
            os.chown(fd, record.uid, record.gid)
        os.chmod(fd, record.mode)  # after the owner, whose change takes set-id bits away
        for name, value in record.xattrs.items():
            os.setxattr(fd, name, value)
        os.utime(fd, ns=(mtime, mtime))


def _write(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])


def _hash_zeros(update: Callable[[bytes], object], size: int) -> None:
    while size > 0:
        update(_ZEROS[: min(size, len(_ZEROS))])
        size -= len(_ZEROS)


_ZEROS: Final = bytes(1 << 20)
