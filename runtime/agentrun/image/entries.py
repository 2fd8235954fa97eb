"""What an entry of a layer may be called, point to and carry; the same for archives and for directories that are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import msgspec

from agentrun.image.limits import ArchiveError, Limits

_OVERLAYS: Final = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.", "user.containers.")
_LONGEST_VALUE: Final = 65536


class Attributes(msgspec.Struct):
    """What an entry has besides its content."""

    mode: int
    uid: int
    gid: int
    mtime: int
    """Nanoseconds since 1970."""
    xattrs: dict[str, bytes] = {}


def split(name: bytes, limits: Limits) -> list[bytes]:
    """The components of a name; none for the root itself.

    Raises:
        ArchiveError: it is absolute, leads upwards, or is nothing a file can be called.
    """
    if name.startswith(b"/"):
        raise ArchiveError(name, "is an absolute name")
    if not name or b"\0" in name:
        raise ArchiveError(name or b"(an entry)", "has a name that is empty, or has a NUL in it")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise ArchiveError(name, "leads out of its directory (..)")
    if len(name) > 4095 or len(parts) > limits.depth or any(len(part) > 255 for part in parts):
        most = f"4095 bytes, 255 a component, {limits.depth} components"
        raise ArchiveError(name[:200], f"has a name that is too long (at most {most})")
    return parts


def check_target(key: bytes, depth: int, target: bytes) -> None:
    """May a symbolic link in a directory ``depth`` components below the root point there?

    Nothing here follows it, and a program inside that does cannot leave its root. It is refused because it was made for those
    who do.

    Raises:
        ArchiveError: it is no path, or climbs above the root of the image.
    """
    if not target or len(target) > 4095 or b"\0" in target:
        raise ArchiveError(key, "is a symbolic link to a path that is none")
    if target.startswith(b"/"):
        depth = 0
    for part in target.split(b"/"):
        if part == b"..":
            depth -= 1
        elif part not in (b"", b"."):
            depth += 1
        if depth < 0 and not target.startswith(b"/"):
            raise ArchiveError(key, f"is a symbolic link that leads out of the image, to {os.fsdecode(target)!r}")


def keep_xattrs(name: bytes, xattrs: Mapping[str, bytes], dropped: dict[str, int]) -> dict[str, bytes]:
    """The extended attributes that are taken: ``user.*``.

    Those by which overlay file systems are steered are refused: one can redirect a directory to another one. All others are
    dropped, and counted in ``dropped``: capabilities are the host's to give, and a sandbox would honour none (nosuid).

    Raises:
        ArchiveError: one is refused.
    """
    kept = {}
    for key, value in xattrs.items():
        if key.startswith(_OVERLAYS):
            raise ArchiveError(name, f"has the extended attribute {key}, which steers overlay file systems")
        if not key.startswith("user."):
            dropped[key] = dropped.get(key, 0) + 1
        elif not 5 < len(os.fsencode(key)) < 256 or "\0" in key or len(value) > _LONGEST_VALUE:
            raise ArchiveError(name, "has an extended attribute that is too long, or has no name")
        else:
            kept[key] = value
    return dict(sorted(kept.items()))
