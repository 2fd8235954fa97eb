"""A workspace: a host directory inside the sandbox, at its own path, with its owner's rights and no others.

The mount is idmapped: the caller's user and group on disk are the tool's inside, so files the tool makes come back as the
caller's, and nothing else on that file system is more accessible than it is to the caller. Nothing is chowned.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Literal

import msgspec

from agentrun.errors import HostError, UsageError
from agentrun_shim import syscalls as sc

Mode = Literal["rw", "ro", "cow"]
"""cow: copy on write. The tool may change everything, and nothing of it reaches the directory (``agentrun.changes``)."""
IdMap = tuple[bool, int, int, int]
"""(is a gid map, first id on disk, first id of the mount, count)"""
_IDS = 65536

_SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys", "/usr")
"""Not as a workspace, nor anything inside: it would put the caller's files where the system's are trusted."""
_WHOLE = ("/", "/home", "/opt", "/srv", "/tmp", "/var")
"""Not themselves, though directories inside them are fine."""


class Workspace(msgspec.Struct, frozen=True):
    """A directory to give to a tool call."""

    path: str
    mode: Mode = "rw"


def as_path(given: object, what: str) -> str:
    """A path as the caller gave it.

    Raises:
        UsageError: it is none.
    """
    try:
        return os.fsdecode(given)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"{what}: {given!r} is not a path") from None


def open_directory(workspace: Workspace) -> int:
    """An O_PATH descriptor of the directory, opened with the caller's own rights.

    Raises:
        UsageError: it is not a directory that can be opened.
    """
    try:
        return os.open(workspace.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"workspace {workspace.path}: {reason}") from error


def real_path(dirfd: int) -> str:
    """Where an open directory is on the host; the path it will have in the sandbox.

    Raises:
        UsageError: it is a directory that must not be a workspace, has been removed, or is out of our sight.
    """
    path = os.readlink(f"/proc/self/fd/{dirfd}")
    if not path.startswith("/") or not _same(path, dirfd):
        raise UsageError(f"workspace {path}: the directory is gone, or in another mount namespace")
    if path in _WHOLE or any(path == top or path.startswith(top + "/") for top in _SYSTEM):
        raise UsageError(f"workspace {path}: a system directory cannot be a workspace")
    return path


def workspace_tops() -> list[str]:
    """The directories of the host's root that a workspace may be below."""
    with os.scandir("/") as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.path not in _SYSTEM]


def check_mode(asked: str, most: str, policy: str) -> Mode:
    """The mode a workspace is mounted with: what was asked for, if the policy allows it.

    Raises:
        UsageError: it does not.
    """
    if most == "none":
        raise UsageError(f"workspace: policy {policy} allows none")
    if asked == "rw" and most == "ro":
        raise UsageError(f"workspace: policy {policy} allows it read-only (say :ro, or :cow to change a copy)")
    # A copy is allowed where reading is: nothing is written to the directory.
    return "ro" if asked == "ro" else "cow" if asked == "cow" else "rw"


def _same(path: str, dirfd: int) -> bool:
    try:
        there, here = os.stat(path), os.stat(dirfd)
    except OSError:
        return False
    return stat.S_ISDIR(here.st_mode) and (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def owner_maps(on_disk: tuple[int, int], owner: tuple[int, int], strangers: int, *, mounter: bool = False) -> tuple[IdMap, ...]:
    """Maps for an idmapped mount: the one user and group ``on_disk`` are the tool's ``owner`` ids, all others are strangers'.

    Without the strangers, 65,536 host ids that nobody has, the kernel would let no one change an entry of which owner or group
    has no map, not even its owner (HAS_UNMAPPED_ID, fs/namei.c), and rename it with EOVERFLOW.

    With ``mounter``, host root has an id as well, on disk one that nobody has: overlay makes its whiteouts and its place to work
    in with the rights of who mounts it, and else could make none (EOVERFLOW) and become read-only.
    """
    maps: list[IdMap] = []
    for gid in (False, True):
        inside = on_disk[gid]
        maps.append((gid, inside, owner[gid], 1))
        for first, last in ((0, min(inside, _IDS)), (inside + 1, _IDS)):
            if first < last:
                maps.append((gid, first, strangers + first, last - first))
        if mounter:
            maps.append((gid, _IDS if inside != _IDS else _IDS + 1, 0, 1))
    return tuple(maps)


def with_mounter(maps: Sequence[IdMap]) -> tuple[IdMap, ...]:
    """The same maps for an overlay's upper layer: root, who mounts it and makes its work directory, has an id there as well.

    One that nobody has: else it could not write (HAS_UNMAPPED_ID, fs/namei.c), and overlay would make itself read-only.
    """
    return (*maps, (False, _IDS, 0, 1), (True, _IDS, 0, 1))


def clone_mount(dirfd: int, path: str, mode: Mode, userns_fd: int) -> int:
    """A detached mount of the directory, owners mapped through ``userns_fd``; mounts below it are not included.

    Raises:
        HostError: the file system cannot map owners; a read-only workspace does without.
    """
    try:
        mount = sc.open_tree(dirfd, "", sc.OPEN_TREE_CLONE | sc.AT_EMPTY_PATH)
    except OSError as error:
        raise HostError(f"workspace {path}: {error.strerror} (open_tree)") from error
    flags = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | (0 if mode == "rw" else sc.MOUNT_ATTR_RDONLY)
    try:
        try:
            sc.mount_setattr(mount, flags | sc.MOUNT_ATTR_IDMAP, userns_fd=userns_fd)
        except OSError as error:
            if error.errno not in sc.CANNOT_MAP_OWNERS:
                raise
            if mode != "ro":
                raise HostError(
                    f"workspace {path}: its file system cannot map owners (idmapped mounts: ext4, xfs, btrfs; tmpfs since"
                    " Linux 6.3); move it, or take it read-only (:ro)"
                ) from error
            sc.mount_setattr(mount, flags)
    except OSError as error:
        os.close(mount)
        raise HostError(f"workspace {path}: {error.strerror} (mount_setattr)") from error
    except HostError:
        os.close(mount)
        raise
    return mount
