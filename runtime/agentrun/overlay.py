"""Overlay file systems as detached mounts, made of detached mounts: nothing of them is ever in anybody's mount table.

Layers are idmapped before they come here (``sc.mount_setattr``), which overlay takes since Linux 5.19: the same files then have
other owners for each tenant, and nothing is copied or chowned.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping, Sequence

from agentrun_shim import syscalls as sc

_MOST_OPTIONS = 4000
"""Bytes of lowerdir=: fsconfig(2) takes 255 characters less than a page of them (vfs_parse_fs_string, PAGE_SIZE)."""
_attached_only = False
"""This kernel wants layers attached to the mount namespace of whoever makes the overlay: before Linux 6.15 (clone_private_mount)."""


def mount_overlay(lowers: Sequence[int], *, upper: int = -1, flags: int = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV) -> int:
    """A detached overlay mount; its descriptor. Layers stay as they are, and may be closed.

    Args:
        lowers: descriptors of detached mounts, topmost first; two at least where there is no ``upper``.
        upper: that of a detached mount with the directories ``upper`` and ``work``, where changes go; -1: it is read-only.
        flags: MOUNT_ATTR_* of the mount.

    Renaming a directory that is in a lower layer fails with EXDEV, as mv(1) expects (redirect_dir=off), and a file is copied up
    whole (metacopy=off): so what is in ``upper`` can be read without knowing more than whiteouts and opaque directories.

    Raises:
        OSError: a mount call failed; with what overlay says about it, where it says something.
    """
    global _attached_only  # noqa: PLW0603 - what the kernel can is the same for everybody
    if not _attached_only:
        try:
            return _mount(lowers, upper, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    mount = _mount_in_thread(lowers, upper, flags)
    _attached_only = True
    return mount


def _mount(lowers: Sequence[int], upper: int, flags: int) -> int:
    options = {"redirect_dir": "off", "metacopy": "off", "index": "off", "xino": "off"}
    return sc.new_filesystem("overlay", {**options, **_layers(lowers, upper)}, flags)


def _layers(lowers: Sequence[int], upper: int) -> Mapping[str, str]:
    lower = ":".join(f"/proc/self/fd/{fd}" for fd in lowers)
    if len(lower) > _MOST_OPTIONS:
        raise OSError(errno.E2BIG, f"{len(lowers)} layers are more than overlay can be told at once", "overlay")
    if upper < 0:
        return {"lowerdir": lower}
    return {"lowerdir": lower, "upperdir": f"/proc/self/fd/{upper}/upper", "workdir": f"/proc/self/fd/{upper}/work"}


def _mount_in_thread(lowers: Sequence[int], upper: int, flags: int) -> int:
    """The same, from a thread with a mount namespace of its own to attach the layers in; overlay has its own clones of them."""
    found: list[int | OSError] = []

    def attach_and_mount() -> None:
        mounts: list[int] = []
        try:
            sc.leave_mount_namespace()
            stage = sc.new_filesystem("tmpfs", {"size": "64k"}, sc.MOUNT_ATTR_NOSUID)
            mounts.append(stage)
            sc.move_mount(stage, sc.AT_FDCWD, "/dev")  # any directory but /proc will do; every host has this one
            for number, fd in enumerate((*lowers, *([upper] if upper >= 0 else []))):
                os.mkdir(str(number), dir_fd=stage)
                sc.move_mount(fd, stage, str(number))
            found.append(_mount(lowers, upper, flags))
        except OSError as error:
            found.append(error)
        finally:
            for mount in mounts:
                os.close(mount)

    thread = threading.Thread(target=attach_and_mount, name="overlay")
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
