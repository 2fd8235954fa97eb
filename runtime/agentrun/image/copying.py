"""A host directory as a layer, copied into the store once: by reference where the file system can (reflink), else in the kernel.

The same rules as for archives. Mounts below the directory come as the empty directories that they cover.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from typing import Final

from agentrun.errors import HostError
from agentrun.image.archive import Extracted
from agentrun.image.entries import Attributes, keep_xattrs, split
from agentrun.image.limits import NO_SPECIAL, ArchiveError, Limits, Report
from agentrun.image.tree import Tree

_FICLONE: Final = 0x40049409
"""linux/fs.h: _IOW(0x94, 9, int)"""
_CANNOT: Final = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_STEP: Final = 1 << 26
_CHUNK: Final = 1 << 20


def copy_directory(source: str, root: int, limits: Limits, report: Report) -> Extracted:
    """Write the tree at ``source`` below ``root``, the descriptor of an empty directory.

    Raises:
        ArchiveError: something in it cannot be in an image.
        HostError: it cannot be read, or not be written.
    """
    tree = Tree(root, limits)
    copy = _Copy(tree, limits, report, source)
    try:
        fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy.directory(fd, b"", os.fstat(fd).st_dev)
        finally:
            os.close(fd)
        return Extracted(tree.finish(), {}, copy.dropped, tree.budget.size)
    except OSError as error:
        raise HostError(f"copying {source}: {os.fsdecode(copy.at)!r}: {error.strerror}") from error
    finally:
        tree.close()


class _Copy:
    def __init__(self, tree: Tree, limits: Limits, report: Report, what: str) -> None:
        self.at = b"."
        self.dropped: dict[str, int] = {}
        self._tree = tree
        self._limits = limits
        self._report = report
        self._what = what
        self._linked: dict[tuple[int, int], list[bytes]] = {}

    def directory(self, fd: int, path: bytes, device: int) -> None:
        """One directory and everything below it."""
        found = os.fstat(fd)
        parts = split(path, self._limits) if path else []
        self._tree.directory(parts, self._attributes(fd, path, found))
        if found.st_dev != device:
            return
        with os.scandir(fd) as entries:
            names = sorted(os.fsencode(entry.name) for entry in entries)
        for name in names:
            self.at = inner = path + b"/" + name if path else name
            self._entry(fd, name, inner, device)

    def _entry(self, above: int, name: bytes, path: bytes, device: int) -> None:
        found = os.stat(name, dir_fd=above, follow_symlinks=False)
        parts = split(path, self._limits)
        mode = found.st_mode
        self._tree.budget.take_entry(path, found.st_size if stat.S_ISREG(mode) else 0)
        if (stat.S_ISREG(mode) or stat.S_ISLNK(mode)) and found.st_nlink > 1:
            first = self._linked.setdefault((found.st_dev, found.st_ino), parts)
            if first is not parts:
                self._tree.hard_link(parts, first)
                return
        if stat.S_ISLNK(mode):
            target = os.readlink(name, dir_fd=above)
            self._tree.symlink(parts, Attributes(0o777, found.st_uid, found.st_gid, found.st_mtime_ns), target)
        elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
            try:
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    self.directory(fd, path, device)
                else:
                    self._file(fd, parts, path)
            finally:
                os.close(fd)
        elif not self._limits.skip_special:
            raise ArchiveError(path, f"is a device, FIFO or socket; {NO_SPECIAL}")

    def _file(self, fd: int, parts: list[bytes], path: bytes) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ArchiveError(path, "was replaced while it was read")

        def fill(to: int) -> bytes:
            _copy_content(fd, to, found.st_size)
            os.lseek(to, 0, os.SEEK_SET)
            digest = hashlib.sha256()
            while chunk := os.read(to, _CHUNK):
                digest.update(chunk)
            return digest.digest()

        self._tree.filled_file(parts, self._attributes(fd, path, found), fill)
        self._report(self._what, self._tree.budget.size, None)

    def _attributes(self, fd: int, path: bytes, found: os.stat_result) -> Attributes:
        xattrs = {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
        kept = keep_xattrs(path or b".", xattrs, self.dropped)
        return Attributes(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns, kept)


def _copy_content(source: int, to: int, size: int) -> None:
    try:
        fcntl.ioctl(to, _FICLONE, source)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    else:
        return
    os.truncate(to, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        _copy_range(source, to, at, min(end, size))
        at = end


def _copy_range(source: int, to: int, at: int, end: int) -> None:
    while at < end:
        try:
            done = os.copy_file_range(source, to, min(_STEP, end - at), at, at)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            chunk = os.pread(source, min(_CHUNK, end - at), at)
            done = os.pwrite(to, chunk, at) if chunk else 0
        if not done:  # it became shorter meanwhile
            return
        at += done
