"""What a layer has to be on disk, entry by entry, and the comparison with what it is.

The manifest is made while a layer is written, from what the archive says, and not read back from the disk: a file system that
lost something differs from it. Times are not in it, so a layer read from a directory has the same name whenever it is read.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Final

import msgspec

OPAQUE: Final = ("trusted.overlay.opaque", "user.overlay.opaque")
"""Marks a directory that hides what is below it: for root's overlays, and for a user's."""
_CHUNK: Final = 1 << 20
_IGNORED: Final = ("security.selinux", "security.ima", "security.evm", "security.SMACK")
"""What a host's security modules put on files by themselves."""
_KINDS: Final = {"f": "file", "d": "directory", "l": "symbolic link", "w": "whiteout"}


class Record(msgspec.Struct, array_like=True):
    """One entry of a layer."""

    kind: str
    """f, d, l, or w: a whiteout, character device 0:0."""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    content: bytes = b""
    """SHA-256 of a file; the target of a link."""
    xattrs: dict[str, bytes] = {}
    same_as: bytes = b""
    """The first of the paths that are hard links to this file, if that is another one."""


Manifest = dict[bytes, Record]
"""Path below the layer's root, which is the empty one, → entry; sorted."""
_decoder = msgspec.msgpack.Decoder(Manifest)


def kind_name(kind: str) -> str:
    """A record's kind, for messages."""
    return _KINDS.get(kind, "something else")


def encode(manifest: Manifest) -> bytes:
    """As it is stored, and hashed."""
    return msgspec.msgpack.encode(manifest)


def decode(data: bytes) -> Manifest:
    """The opposite.

    Raises:
        msgspec.MsgspecError: it is damaged.
    """
    return _decoder.decode(data)


def finished(records: dict[bytes, Record]) -> Manifest:
    """A manifest of records in any order, in which hard links share one record."""
    manifest: Manifest = {}
    first: dict[int, bytes] = {}
    for path in sorted(records):
        record = records[path]
        known = first.setdefault(id(record), path)
        manifest[path] = record if known == path else msgspec.structs.replace(record, same_as=known)
    return manifest


def scan(root: int) -> Manifest:
    """Read a tree from the disk: all of it, the content of every file included. ``root`` is a descriptor of its directory."""
    records: dict[bytes, Record] = {b"": _record(root, os.fstat(root))}
    linked: dict[tuple[int, int], Record] = {}
    for path, found, fd in _walk(root, b""):
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            record = linked.get((found.st_dev, found.st_ino))
            if record is None:
                record = linked[found.st_dev, found.st_ino] = _record(fd, found)
            records[path] = record
        else:
            records[path] = _record(fd, found)
    return finished(records)


def _walk(directory: int, above: bytes) -> Iterator[tuple[bytes, os.stat_result, int]]:
    """Every entry below a directory, with a descriptor: of the thing itself, or O_PATH if it is neither file nor directory."""
    with os.scandir(directory) as entries:
        names = sorted(os.fsencode(entry.name) for entry in entries)
    for name in names:
        path = above + b"/" + name if above else name
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        openable = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_RDONLY | os.O_NONBLOCK if openable else os.O_PATH)
        fd = os.open(name, flags, dir_fd=directory)
        try:
            yield path, os.fstat(fd), fd
            if stat.S_ISDIR(found.st_mode):
                yield from _walk(fd, path)
        finally:
            os.close(fd)


def _record(fd: int, found: os.stat_result) -> Record:
    mode = found.st_mode
    if stat.S_ISDIR(mode):
        return Record("d", stat.S_IMODE(mode), found.st_uid, found.st_gid, xattrs=_xattrs(fd))
    if stat.S_ISREG(mode):
        return Record("f", stat.S_IMODE(mode), found.st_uid, found.st_gid, found.st_size, _content(fd), _xattrs(fd))
    if stat.S_ISLNK(mode):
        return Record("l", 0o777, found.st_uid, found.st_gid, content=os.fsencode(os.readlink("", dir_fd=fd)))
    if stat.S_ISCHR(mode) and found.st_rdev == 0:
        return Record("w")
    return Record("?", stat.S_IMODE(mode), found.st_uid, found.st_gid)


def _xattrs(fd: int) -> dict[str, bytes]:
    return {name: os.getxattr(fd, name) for name in sorted(os.listxattr(fd)) if not name.startswith(_IGNORED)}


def _content(fd: int) -> bytes:
    digest = hashlib.sha256()
    while chunk := os.read(fd, _CHUNK):
        digest.update(chunk)
    return digest.digest()


def difference(wanted: Manifest, found: Manifest) -> tuple[bytes, str] | None:
    """The first entry, by path, that is not as it should be, and how."""
    for path in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(path), found.get(path)
        if one is None:
            return path, "is there and should not be"
        if other is None:
            return path, f"is missing (a {kind_name(one.kind)})"
        if one != other:
            return path, _describe(one, other)
    return None


def _describe(wanted: Record, found: Record) -> str:
    if wanted.kind != found.kind:
        return f"should be a {kind_name(wanted.kind)} and is a {kind_name(found.kind)}"
    if wanted.mode != found.mode:
        return f"should have mode {wanted.mode:04o} and has {found.mode:04o}"
    if (wanted.uid, wanted.gid) != (found.uid, found.gid):
        return f"should belong to {wanted.uid}:{wanted.gid} and belongs to {found.uid}:{found.gid}"
    if wanted.size != found.size:
        return f"should have {wanted.size} bytes and has {found.size}"
    if wanted.content != found.content:
        return "points elsewhere" if wanted.kind == "l" else "has other content"
    if wanted.xattrs != found.xattrs:
        names = {name for name, _ in wanted.xattrs.items() ^ found.xattrs.items()}
        return f"has another value of the extended attribute {min(names)}"
    return "is not the hard link that it should be"
