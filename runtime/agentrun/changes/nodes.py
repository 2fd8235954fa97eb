"""One entry of a tree: what it is, what it was, whether it still is that.

Owners are those on the disk. Of extended attributes only those count that a tool can set and a caller can set again: ``user.*``
and access control lists.
"""

from __future__ import annotations

import os
import stat
from typing import Final

import msgspec

from agentrun.changes.beneath import FILE, HANDLE, opened

_KINDS: Final = {
    stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p", stat.S_IFSOCK: "s", stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
}  # fmt: skip
_NAMES: Final = {
    "f": "file", "d": "directory", "l": "symbolic link", "p": "named pipe", "s": "socket", "c": "device", "b": "device",
}  # fmt: skip
_CHUNK: Final = 1 << 20


class Node(msgspec.Struct, frozen=True, array_like=True):
    """An entry as it is to be."""

    kind: str
    """f, d, l (symbolic link), p (named pipe), s (socket), c or b (device)."""
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    """Nanoseconds."""
    target: bytes = b""
    """Of a symbolic link."""
    xattrs: dict[str, bytes] = {}
    layer: int = 0
    """In which of the layers it is, topmost first."""


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """An entry as it was: enough to notice that it is another one now."""

    kind: str
    mode: int
    uid: int
    gid: int
    inode: int
    size: int
    mtime: int
    ctime: int
    links: int

    def same(self, other: Seen, *, moved: bool = False) -> bool:
        """Whether ``other``, which is there now, is still this.

        Args:
            moved: it has another name now, so when it was changed last says nothing. Nor does it of a file with several names,
                which changes with each of them that goes.
        """
        if (self.kind, self.inode, self.uid, self.gid) != (other.kind, other.inode, other.uid, other.gid):
            return False
        if self.kind == "d":  # its entries are entries of their own
            return moved or self.mode == other.mode
        if (self.mode, self.size, self.mtime) != (other.mode, other.size, other.mtime):
            return False
        return moved or self.links > 1 or other.links > 1 or self.ctime == other.ctime


def kind_of(found: os.stat_result) -> str:
    """The letter of what was found."""
    return _KINDS.get(stat.S_IFMT(found.st_mode), "?")


def kind_name(kind: str) -> str:
    """The word for a letter."""
    return _NAMES.get(kind, "something else")


def seen(found: os.stat_result) -> Seen:
    """What is remembered of an original."""
    return Seen(
        kind=kind_of(found), mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid, inode=found.st_ino,
        size=found.st_size, mtime=found.st_mtime_ns, ctime=found.st_ctime_ns, links=found.st_nlink,
    )  # fmt: skip


def read_node(root: int, path: bytes, found: os.stat_result, layer: int = 0) -> Node:
    """What is at a path, where ``found`` was. Content stays where it is."""
    kind = kind_of(found)
    size = found.st_rdev if kind in "cb" else found.st_size if kind in "fl" else 0
    return Node(
        kind=kind, mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid, size=size, mtime=found.st_mtime_ns,
        target=read_target(root, path) if kind == "l" else b"",
        xattrs=read_xattrs(root, path) if kind in "fd" else {},
        layer=layer,
    )  # fmt: skip


def read_target(root: int, path: bytes) -> bytes:
    """Where a symbolic link leads."""
    with opened(root, path, HANDLE) as fd:
        return os.fsencode(os.readlink("", dir_fd=fd))


def counts(name: str) -> bool:
    """Whether an extended attribute is one that is kept."""
    return name.startswith(("user.", "system.posix_acl_"))


def read_xattrs(root: int, path: bytes) -> dict[str, bytes]:
    """The extended attributes of a file or directory that count."""
    with opened(root, path, FILE) as fd:
        return {name: os.getxattr(fd, name) for name in sorted(os.listxattr(fd)) if counts(name)}


def has_xattr(root: int, path: bytes, name: str, value: bytes | None = None) -> bool:
    """Whether a file or directory has an attribute, with that value if one is given."""
    with opened(root, path, FILE) as fd:
        try:
            return os.getxattr(fd, name) == value if value is not None else bool(os.getxattr(fd, name))
        except OSError:
            return False


def same_content(one: int, path: bytes, other: int, at: bytes) -> bool:
    """Whether two files have the same bytes; one that is no file any more has not."""
    with opened(one, path, FILE) as first, opened(other, at, FILE) as second:
        found, there = os.fstat(first), os.fstat(second)
        if not (stat.S_ISREG(found.st_mode) and stat.S_ISREG(there.st_mode)) or found.st_size != there.st_size:
            return False
        offset = 0
        while chunk := os.pread(first, _CHUNK, offset):
            if os.pread(second, len(chunk), offset) != chunk:
                return False
            offset += len(chunk)
        return True
