"""One layer: where it comes from, building it, and what the store knows of it.

On disk, ``layers/<name>/``: ``fs/``, the tree; ``manifest``, every entry of it; ``layer.json``, a ``LayerInfo``. The name is the
digest of the uncompressed archive (the diff id), or for a directory that of its manifest.

A layer may have an entry whose directories it says nothing about. Then these are what the layers below make them, so /tmp stays
1777; and the same archive above other layers can be another layer. Such a one has a suffix to its name.
"""

from __future__ import annotations

import hashlib
import os
import stat
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agentrun.image.archive import Extracted, extract
from agentrun.image.copying import copy_directory
from agentrun.image.limits import ArchiveError, Limits, Report
from agentrun.image.manifest import OPAQUE, encode
from agentrun.image.streams import Blob, Uncompressed
from agentrun.image.tree import ROOTS, Owner

_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Packed(msgspec.Struct, frozen=True):
    """A layer that is a tar, compressed or not."""

    blob: Blob
    diff_id: str | None = None
    """What the uncompressed tar has to be; None: whatever it is."""


class Folder(msgspec.Struct, frozen=True):
    """A layer that is a directory of this host."""

    path: str


LayerSource = Packed | Folder


class LayerInfo(msgspec.Struct, frozen=True):
    """``layer.json``."""

    diff_id: str
    size: int
    """Bytes of its files, holes included."""
    entries: int
    manifest: str
    """Digest of the file ``manifest``."""
    opaque: bool = False
    """Nothing of the layers below is in an image with this one."""
    implied: dict[str, Owner] = {}
    """Directories it says nothing of, percent-encoded, and what they are here: as below, mode, user and group."""
    dropped: dict[str, int] = {}
    """Extended attributes that were not taken, and of how many entries."""

    @property
    def name(self) -> str:
        """What its directory is called."""
        digest = self.diff_id.removeprefix("sha256:")
        if all(tuple(owner) == ROOTS for owner in self.implied.values()):
            return digest
        return f"{digest}-{hashlib.sha256(msgspec.json.encode(self.implied, order='sorted')).hexdigest()[:12]}"

    def fits(self, lowers: Sequence[Path]) -> bool:
        """Would it be the same if it were built above these trees?"""
        below = inherit_from(lowers)
        return all(below(urllib.parse.unquote_to_bytes(path)) == tuple(owner) for path, owner in self.implied.items())


def build(source: LayerSource, into: Path, lowers: Sequence[Path], limits: Limits, report: Report) -> LayerInfo:
    """Write ``fs``, ``manifest`` and ``layer.json`` into an empty directory. ``lowers`` are the trees below, lowest first.

    Raises:
        ArchiveError: the source is refused, or its digest is wrong.
        HostError: it cannot be read, or not be written.
    """
    tree = into / "fs"
    tree.mkdir(0o755)
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if isinstance(source, Folder):
            extracted, diff_id = copy_directory(source.path, root, limits, report), None
        else:
            with Uncompressed(source.blob, limits, report) as stream:
                extracted = extract(stream.read, root, limits, inherit_from(lowers))
                diff_id = stream.finish(source.diff_id)
    except ArchiveError as error:
        error.add_archive(source.path if isinstance(source, Folder) else source.blob.what)
        raise
    finally:
        os.close(root)
    data = encode(extracted.manifest)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    info = _describe(extracted, diff_id or digest, digest)
    (into / "manifest").write_bytes(data)
    (into / "layer.json").write_bytes(msgspec.json.format(msgspec.json.encode(info)))
    return info


def _describe(extracted: Extracted, diff_id: str, digest: str) -> LayerInfo:
    return LayerInfo(
        diff_id,
        extracted.size,
        len(extracted.manifest),
        digest,
        any(name in extracted.manifest[b""].xattrs for name in OPAQUE),
        {urllib.parse.quote_from_bytes(path): owner for path, owner in extracted.implied.items()},
        extracted.dropped,
    )


def inherit_from(lowers: Sequence[Path]) -> Callable[[bytes], Owner]:
    """What a directory is like in the layers below: mode, user and group of the uppermost that has it."""

    def below(path: bytes) -> Owner:
        for lower in reversed(lowers):
            found, hides = _look_up(lower, path.split(b"/"))
            if found is not None:
                return found
            if hides:
                break
        return ROOTS

    return below


def _look_up(lower: Path, parts: Sequence[bytes]) -> tuple[Owner | None, bool]:
    """A directory in one layer, and whether that layer hides what those below it have there."""
    fd = os.open(lower, _FLAGS)
    hides = False
    try:
        for part in parts:
            hides = hides or _is_opaque(fd)
            try:
                inner = os.open(part, _FLAGS, dir_fd=fd)
            except FileNotFoundError:
                return None, hides
            os.close(fd)
            fd = inner
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                return None, True
        found = os.fstat(fd)
        return (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid), hides
    finally:
        os.close(fd)


def _is_opaque(fd: int) -> bool:
    """By way of /proc, for a descriptor of O_PATH has no attributes."""
    return any(name in os.listxattr(f"/proc/self/fd/{fd}") for name in OPAQUE)
