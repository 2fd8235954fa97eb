"""A policy's binds: host files and directories that a sandbox shows besides its image."""

from __future__ import annotations

import os
import stat

from agentrun.errors import HostError
from agentrun.policy import Bind
from agentrun.policychecks import check_bind
from agentrun_shim import syscalls as sc


def open_source(bind: Bind) -> tuple[int, os.stat_result]:
    """An O_PATH descriptor of a bind's source, which is a directory or a plain file, wherever its links lead.

    Raises:
        HostError: it is not there, is something else, or leads to what is never shown.
        UsageError: the same, for a link to a path that no policy may name.
    """
    where = f"fs.binds: {bind.source}"
    try:
        fd = os.open(bind.source, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"{where}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
            raise HostError(f"{where}: is neither a directory nor a plain file; sockets and devices are never shown to a tool")
        check_bind(Bind(os.readlink(f"/proc/self/fd/{fd}"), bind.target, bind.mode), where, ())
    except BaseException:
        os.close(fd)
        raise
    return fd, found


def clone_bind(bind: Bind, fd: int, userns_fd: int) -> int:
    """A detached mount of an open source, with ``mode`` rw its owner mapped through ``userns_fd``.

    Raises:
        HostError: the file system cannot map owners, or a mount call failed.
    """
    where = f"fs.binds: {bind.source}"
    below = sc.AT_RECURSIVE if bind.mode == "ro" else 0
    try:
        mount = sc.open_tree(fd, "", sc.OPEN_TREE_CLONE | sc.AT_EMPTY_PATH | below)
    except OSError as error:
        raise HostError(f"{where}: {error.strerror} (open_tree)") from error
    try:
        if bind.mode == "ro":
            set_read_only(mount, userns_fd)
        else:
            flags = sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_IDMAP
            sc.mount_setattr(mount, flags, userns_fd=userns_fd)
    except OSError as error:
        os.close(mount)
        reason = error.strerror or str(error)
        if bind.mode == "rw" and error.errno in sc.CANNOT_MAP_OWNERS:
            reason = "its file system cannot map owners (idmapped mounts); bind it read-only"
        raise HostError(f"{where}: {reason} (mount_setattr)") from error
    return mount


def set_read_only(mount: int, nobody: int) -> None:
    """Make a detached tree of mounts read-only, without set-id bits and devices, and with owners nobody has.

    ``nobody`` is a user namespace that maps no id there is, or -1. File systems that cannot map owners stay as they are.
    """
    flags = sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV
    if nobody >= 0:
        try:
            sc.mount_setattr(mount, flags | sc.MOUNT_ATTR_IDMAP, recursive=True, userns_fd=nobody)
        except OSError as error:
            if error.errno not in sc.CANNOT_MAP_OWNERS:
                raise
        else:
            return
    sc.mount_setattr(mount, flags, recursive=True)


def make_mount_point(base: int, target: str, attached: frozenset[str], *, is_directory: bool, host: str = "/") -> None:
    """Have something to attach a bind to: made on the sandbox's own root, or already there in the image.

    Raises:
        HostError: the image, which is read-only, has nothing at that path.
    """
    parts = target.strip("/").split("/")
    if parts[0] in attached:
        there = os.path.join(host, target[1:])
        if os.path.realpath(there) != os.path.normpath(there):
            raise HostError(f"fs.binds: target {target} is missing, or behind a symbolic link of the image")
        if not os.path.lexists(there) or os.path.isdir(there) != is_directory:
            kind = "directory" if is_directory else "file"
            raise HostError(f"fs.binds: the image has no {kind} {target} to attach to; use a target of your own, such as /data")
        return
    for depth in range(1, len(parts) + (1 if is_directory else 0)):
        step = "/".join(parts[:depth])
        try:
            os.mkdir(step, 0o755, dir_fd=base)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(step, dir_fd=base, follow_symlinks=False).st_mode):
                raise HostError(f"fs.binds: target {target} is behind a symbolic link, /{step}") from None
    if not is_directory:
        os.close(os.open("/".join(parts), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=base))
