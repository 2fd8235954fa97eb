"""Overlay file systems as detached mounts, made of detached mounts: nothing of them is ever in anybody's mount table.

Layers are idmapped before they come here (``sc.mount_setattr``), which overlay takes since Linux 5.19: the same files then have
other owners for each tenant, and nothing is copied or chowned.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import Final

from agentrun_shim import syscalls as sc

MOST_LOWERS: Final = 500
"""Of one overlay: OVL_MAX_STACK."""
_OPTIONS = {"redirect_dir": "off", "metacopy": "off", "index": "off", "xino": "off"}
_attached_only = False
"""This kernel wants layers one by one, or attached to the mount namespace of whoever makes the overlay: before Linux 6.15
(clone_private_mount)."""


def mount_overlay(lowers: Sequence[int], *, upper: int = -1, flags: int = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV) -> int:
    """A detached overlay mount; its descriptor. Layers stay as they are, and may be closed.

    Args:
        lowers: descriptors of detached mounts, topmost first; two at least where there is no ``upper``.
        upper: that of a detached mount with the directories ``upper`` and ``work``, where changes go; -1: it is read-only.
        flags: MOUNT_ATTR_* of the mount.

    Renaming a directory that is in a lower layer fails with EXDEV, as mv(1) expects (redirect_dir=off), and a file is copied up
    whole (metacopy=off): so what is in ``upper`` can be read without knowing more than whiteouts and opaque directories.

    Raises:
        OSError: a mount call failed; with what overlay says about it, where it says something. E2BIG: too many layers.
    """
    global _attached_only
    if len(lowers) > MOST_LOWERS:
        raise OSError(errno.E2BIG, f"{len(lowers)} layers, and the kernel takes {MOST_LOWERS}", "overlay")
    if not _attached_only:
        try:
            return _mount_detached(lowers, upper, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    mount = _mount_attached(lowers, upper, flags)
    _attached_only = True
    return mount


def wants_attached() -> bool:
    """Whether this kernel was found to want layers attached."""
    return _attached_only


def _mount_detached(lowers: Sequence[int], upper: int, flags: int) -> int:
    options = [*_OPTIONS.items(), *(("lowerdir+", f"/proc/self/fd/{fd}") for fd in lowers)]
    if upper >= 0:
        options += [("upperdir", f"/proc/self/fd/{upper}/upper"), ("workdir", f"/proc/self/fd/{upper}/work")]
    return sc.new_filesystem("overlay", options, flags)


def _mount_attached(lowers: Sequence[int], upper: int, flags: int) -> int:
    """The same from a thread with a mount namespace of its own to attach the layers in; overlay keeps its own clones of them.

    By mount(2), which takes a page of names: fsconfig(2) takes 255 bytes, and layers one by one only since Linux 6.7.
    """
    found: list[int | OSError] = []

    def attach_and_mount() -> None:
        mounts: list[int] = []
        try:
            sc.leave_mount_namespace()
            stage = sc.new_filesystem("tmpfs", {"size": "1m"}, sc.MOUNT_ATTR_NOSUID)
            mounts.append(stage)
            sc.move_mount(stage, sc.AT_FDCWD, "/dev")  # any directory that every host has
            os.fchdir(stage)
            for name, fd in [*((str(number), fd) for number, fd in enumerate(lowers)), *([("u", upper)] if upper >= 0 else [])]:
                os.mkdir(name)
                sc.move_mount(fd, stage, name)
            options = {**_OPTIONS, "lowerdir": ":".join(str(number) for number in range(len(lowers)))}
            if upper >= 0:
                options |= {"upperdir": "u/upper", "workdir": "u/work"}
            os.mkdir("mnt")
            sc.mount(b"overlay", b"mnt", b"overlay", 0, ",".join(f"{key}={value}" for key, value in options.items()).encode())
            mount = sc.open_tree(stage, "mnt", sc.OPEN_TREE_CLONE)
            mounts.append(mount)
            sc.mount_setattr(mount, flags)
            found.append(mounts.pop())
        except OSError as error:
            found.append(error)
        finally:
            for fd in mounts:
                os.close(fd)

    thread = threading.Thread(target=attach_and_mount, name="overlay")
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
