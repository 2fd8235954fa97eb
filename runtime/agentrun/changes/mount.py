"""The overlay of a copy-on-write workspace: the caller's directory below, read-only, and a directory of the store above."""

from __future__ import annotations

import os

from agentrun.errors import HostError
from agentrun.overlay import mount_overlay
from agentrun.workspace import clone_mount
from agentrun_shim import syscalls as sc


def mount_changes(dirfd: int, path: str, kept: int, *, lower: int, upper: int) -> int:
    """A detached mount of the directory at ``path``, where what is changed goes to ``kept``.

    Args:
        dirfd: a descriptor of the directory.
        kept: that of the directory with ``upper`` and ``work``.
        lower: a user namespace by which the directory's owners are mapped.
        upper: the same for what is kept, with a place for overlay itself: ``owner_maps(mounter=True)``.

    Raises:
        HostError: one of the file systems cannot do it.
    """
    base = clone_mount(dirfd, path, "cow", lower)
    try:
        above = _clone_kept(kept, upper)
        try:
            mount = mount_overlay([base], upper=above)
        except OSError as error:
            raise HostError(f"workspace {path}: an overlay of it: {error.strerror}; {_WHERE}") from error
        finally:
            os.close(above)
    finally:
        os.close(base)
    if os.fstatvfs(mount).f_flag & os.ST_RDONLY:  # what overlay makes of it where it can have no place to work in
        os.close(mount)
        there = os.fstatvfs(kept)
        why = "its disk is full; apply or discard some" if there.f_bavail * there.f_frsize < _LEAST else _WHERE
        raise HostError(f"workspace {path}: overlay cannot write to the change store; {why}")
    return mount


_LEAST = 1 << 20
"""Bytes that nobody has to himself any more, where what is reserved for root is left."""
_WHERE = "the store of changes has to be on ext4, xfs or btrfs, or on tmpfs since Linux 6.3 (AGENTRUN_CHANGES)"


def _clone_kept(kept: int, userns: int) -> int:
    try:
        mount = sc.open_tree(kept, "", sc.OPEN_TREE_CLONE | sc.AT_EMPTY_PATH)
    except OSError as error:
        raise HostError(f"change store: {error.strerror} (open_tree)") from error
    try:
        sc.mount_setattr(mount, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_IDMAP, userns_fd=userns)
    except OSError as error:
        os.close(mount)
        if error.errno in sc.CANNOT_MAP_OWNERS:
            raise HostError(f"change store: its file system cannot map owners; {_WHERE}") from error
        raise HostError(f"change store: {error.strerror} (mount_setattr)") from error
    return mount


def clone_quietly(dirfd: int) -> int:
    """A detached mount of a directory to read it by: owners as on the disk, and nothing that is mounted below it."""
    mount = sc.open_tree(dirfd, "", sc.OPEN_TREE_CLONE | sc.AT_EMPTY_PATH)
    try:
        sc.mount_setattr(mount, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC)
    except OSError:
        os.close(mount)
        raise
    return mount
