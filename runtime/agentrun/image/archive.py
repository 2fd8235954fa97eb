"""One layer tar stream → a tree: docker's whiteouts become overlay's, and whatever could reach outside is refused.

Refused, with the entry named: absolute names and ``..``; anything below something that is no directory; hard links to what is not
in the same layer; symbolic links that climb out; devices, FIFOs and sockets, a whiteout in overlay's own form (device 0:0)
included, for only ``.wh.`` names are whiteouts; a directory with entries that becomes something else; more than the limits;
what is no whole tar. An entry that comes twice replaces the first, as everywhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

import msgspec

from agentrun.errors import HostError
from agentrun.image.entries import Attributes, keep_xattrs, split
from agentrun.image.limits import NO_SPECIAL, ArchiveError, Limits
from agentrun.image.manifest import Manifest
from agentrun.image.tarstream import Entry, TarReader
from agentrun.image.tree import ROOTS, Owner, Tree

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_SPECIAL: Final = ("character device", "block device", "FIFO")
_ARCHIVES_FAULT: Final = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class Extracted(msgspec.Struct):
    """A tree that has been written."""

    manifest: Manifest
    implied: dict[bytes, Owner]
    """Directories that have entries here and none of their own, and what they were given."""
    dropped: dict[str, int]
    """Extended attributes that were not taken, and of how many entries."""
    size: int
    """Bytes of all files."""


def extract(
    read: Callable[[int], bytes], root: int, limits: Limits, inherit: Callable[[bytes], Owner] = lambda _: ROOTS
) -> Extracted:
    """Write the layer that ``read`` gives below ``root``, the descriptor of an empty directory.

    Raises:
        ArchiveError: it is refused; what has been written until then is to be thrown away.
        HostError: it cannot be written.
    """
    tree = Tree(root, limits, inherit)
    dropped: dict[str, int] = {}
    name = b"."
    try:
        reader = TarReader(read, limits)
        for entry in reader:
            name = entry.name
            _write(tree, entry, reader, limits, dropped)
        name = b"."
        return Extracted(tree.finish(), tree.implied, dropped, tree.budget.size)
    except OSError as error:
        if error.errno in _ARCHIVES_FAULT:
            raise ArchiveError(name, f"cannot be written: {error.strerror}") from error
        raise HostError(f"writing a layer: {os.fsdecode(name)!r}: {error.strerror}") from error
    finally:
        tree.close()


def _write(tree: Tree, entry: Entry, reader: TarReader, limits: Limits, dropped: dict[str, int]) -> None:
    parts = split(entry.name, limits)
    tree.budget.take_entry(entry.name, entry.size)
    if any(part.startswith(_WHITEOUT) for part in parts):
        _write_whiteout(tree, entry, parts)
        return
    if entry.kind in _SPECIAL:
        if not limits.skip_special:
            raise ArchiveError(entry.name, f"is a {entry.kind}; {NO_SPECIAL}")
        return
    attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime, keep_xattrs(entry.name, entry.xattrs, dropped))
    match entry.kind:
        case "directory":
            tree.directory(parts, attributes)
        case "file":
            tree.file(parts, attributes, entry.size, reader.data())
        case "symbolic link":
            tree.symlink(parts, attributes, entry.link)
        case _:
            try:
                # Some builders write where the other name is in the image, with the slash. It is looked up in the layer anyway.
                target = split(entry.link.lstrip(b"/"), limits)
            except ArchiveError as error:
                raise ArchiveError(entry.name, f"is a hard link to {error.entry!r}, which {error.reason}") from None
            tree.hard_link(parts, target)


def _write_whiteout(tree: Tree, entry: Entry, parts: list[bytes]) -> None:
    *above, last = parts
    if not last.startswith(_WHITEOUT) or any(part.startswith(_WHITEOUT) for part in above):
        raise ArchiveError(entry.name, "is below a whiteout (.wh.), which is no directory")
    if entry.kind != "file" or entry.size:
        raise ArchiveError(entry.name, f"is a whiteout (.wh.) but a {entry.kind} of {entry.size} bytes; one is an empty file")
    hidden = last.removeprefix(_WHITEOUT)
    if last == _OPAQUE:
        tree.opaque(above)
    elif hidden in (b"", b".", b"..") or hidden.startswith(_WHITEOUT):
        raise ArchiveError(entry.name, "is a whiteout (.wh.) of a name that no file can have")
    else:
        tree.whiteout([*above, hidden])
