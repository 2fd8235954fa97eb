"""What an image of the store shows, for us to read: its layers as one tree, and who its user is."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun.overlay import mount_overlay
from agentrun.tomltext import show
from agentrun_shim import syscalls as sc

_LARGEST = 1 << 20
_IDS = 65536
_DIGITS = 10
_MOST_GROUPS = 32
"""Of a plan (shim/native/plan.c)."""


class User(msgspec.Struct, frozen=True):
    """Who an image's programs run as: ids of the image's own."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    name: str = ""
    """What its /etc/passwd calls it."""


class View:
    """An image's files. Paths are the image's own: its links lead nowhere else."""

    def __init__(self, mount: int) -> None:
        self._mount = mount

    def names(self, path: str = "/") -> list[str]:
        """What is in a directory; nothing where there is none."""
        try:
            fd = sc.open_in_root(self._mount, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def stat(self, path: str) -> os.stat_result | None:
        """What is at a path, the last link not followed; None where nothing is."""
        try:
            fd = sc.open_in_root(self._mount, path, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def leads_to_directory(self, path: str) -> bool:
        """Whether a directory is at a path, or where the links there lead."""
        try:
            os.close(sc.open_in_root(self._mount, path, os.O_PATH | os.O_DIRECTORY))
        except OSError:
            return False
        return True

    def read(self, path: str) -> bytes:
        """A small plain file's content; nothing where there is none.

        Raises:
            HostError: it is larger than such a file may be.
        """
        try:
            fd = sc.open_in_root(self._mount, path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return b""
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # of a directory no file object can be made, and the descriptor would stay
            os.close(fd)
            return b""
        with os.fdopen(fd, "rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise HostError(f"image: its {path} is larger than {_LARGEST} bytes")
        return content


@contextlib.contextmanager
def view(layers: Sequence[Path]) -> Iterator[View]:
    """Look at an image's layers, lowest first, for the length of a block.

    Raises:
        HostError: they cannot be mounted.
    """
    clones: list[int] = []
    try:
        try:
            clones += clone_layers(layers)
            # Without an upper directory overlay wants two layers.
            clones.append(sc.new_filesystem("tmpfs", {"size": "4k", "mode": "755"}, sc.MOUNT_ATTR_RDONLY))
            mount = mount_overlay(clones, flags=sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
            clones.append(mount)
        except OSError as error:
            raise HostError(f"looking at an image: {error.filename}: {error.strerror}") from error
        yield View(mount)
    finally:
        for fd in clones:
            os.close(fd)


def clone_layers(layers: Sequence[Path], userns: int = -1) -> Iterator[int]:
    """Detached mounts of layers, topmost first, their owners mapped by ``userns``: what ``mount_overlay`` takes."""
    for layer in reversed(layers):
        fd = sc.open_tree(sc.AT_FDCWD, str(layer), sc.OPEN_TREE_CLONE)
        try:
            mapped = sc.MOUNT_ATTR_IDMAP if userns >= 0 else 0
            sc.mount_setattr(fd, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | mapped, userns_fd=max(userns, 0))
        except BaseException:
            os.close(fd)
            raise
        yield fd


def find_user(text: str, passwd: bytes, group: bytes) -> User:
    """The user an image config names: nothing, ``name``, ``uid``, ``name:group`` or ``uid:gid``, as ``docker run`` reads it.

    The group is a supplementary one as well, or a tool could drop it, and with it what files deny to that group (CVE-2022-36109).

    Raises:
        UsageError: there is no such user or group, or a number out of range.
    """
    name, colon, group_name = text.partition(":")
    name = name or "0"
    entry = next((e for e in _entries(passwd, 7) if name in (e[0], e[2])), None)
    if entry is None and not _is_number(name):
        raise UsageError(f"image: there is no user {show(name)} in its /etc/passwd")
    uid, gid, groups = int(entry[2] if entry else name), int(entry[3]) if entry else 0, tuple[int, ...]()
    if colon and group_name:
        known = next((e for e in _entries(group, 4) if group_name in (e[0], e[2])), None)
        if known is None and not _is_number(group_name):
            raise UsageError(f"image: there is no group {show(group_name)} in its /etc/group")
        gid = int(known[2] if known else group_name)
    elif entry:
        groups = tuple(int(e[2]) for e in _entries(group, 4) if entry[0] in e[3].split(","))
    groups = tuple(dict.fromkeys((gid, *groups)))[:_MOST_GROUPS]
    if bad := [number for number in (uid, gid, *groups) if number >= _IDS]:
        raise UsageError(f"image: user {show(text)}: {bad[0]} is not below {_IDS}")
    return User(uid, gid, groups, entry[0] if entry else "")


def _entries(file: bytes, fields: int) -> Iterator[list[str]]:
    """The lines of passwd(5) or group(5) that are well-formed: the third field is a number, and the fourth of passwd."""
    for line in file.decode(errors="replace").splitlines():
        parts = line.split(":")
        if len(parts) >= fields and all(_is_number(part) for part in (parts[2:4] if fields > 4 else parts[2:3])):
            yield parts


def _is_number(text: str) -> bool:
    """In digits that the kernel's tools know, and no more of them than an id can have."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS
