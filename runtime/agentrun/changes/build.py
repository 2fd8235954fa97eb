"""A new file, link or tree, made under a name that nobody knows, complete and on the disk before it gets its own."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import Final

from agentrun.changes.beneath import DIRECTORY, FILE, HANDLE, join, look_at, open_beneath, opened, split
from agentrun.changes.nodes import Node, counts, kind_of
from agentrun.changes.units import Unit
from agentrun.errors import HostError

_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK: Final = 1 << 20
_MAKERS: Final = {"p": stat.S_IFIFO, "s": stat.S_IFSOCK}


def build(unit: Unit, layers: Sequence[int], directory: int, name: bytes, *, sync: bool) -> None:
    """Make what the unit puts somewhere as ``name`` in an open directory; with ``sync``, have it on the disk.

    Raises:
        HostError: what is kept is not what it was when the call ended.
        OSError: it cannot be made.
    """
    assert unit.new is not None
    directories = []
    for path, node in ((unit.path, unit.new), *unit.inner.items()):
        above, last = split(name + path[len(unit.path) :])
        with opened(directory, above, DIRECTORY) as fd:
            if node.kind == "d":
                os.mkdir(last, 0o700, dir_fd=fd)
                directories.append((join(above, last), node))
            else:
                _make(node, path, layers, fd, last, sync=sync)
    for path, node in reversed(directories):  # what is written into one changes its time, and may not be allowed any more
        with opened(directory, path, DIRECTORY) as fd:
            dress(fd, node)
            if sync:
                os.fsync(fd)


def _make(node: Node, path: bytes, layers: Sequence[int], directory: int, name: bytes, *, sync: bool) -> None:
    if node.kind == "f":
        fd = os.open(name, _NEW, 0o600, dir_fd=directory)
        try:
            with opened(layers[node.layer], path, FILE) as source:
                _check_source(node, path, os.fstat(source))
                _copy(source, fd, node.size)
            dress(fd, node)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        return
    if node.kind == "l":
        os.symlink(node.target, name, dir_fd=directory)
    elif node.kind in _MAKERS:
        os.mknod(name, _MAKERS[node.kind] | 0o600, dir_fd=directory)
    else:
        raise OSError(errno.EPERM, "devices are not applied", os.fsdecode(path))
    # By name it could be something else by now, a link to what is not ours, if others may write to this directory.
    fd = os.open(name, HANDLE, dir_fd=directory)
    try:
        found, itself = os.fstat(fd), f"/proc/self/fd/{fd}"
        if kind_of(found) != node.kind or found.st_nlink != 1:
            raise OSError(errno.ESTALE, "somebody replaced it while it was made", os.fsdecode(path))
        if (found.st_uid, found.st_gid) != (node.uid, node.gid):
            os.chown(itself, node.uid, node.gid)
        if node.kind != "l":
            os.chmod(itself, node.mode)
        os.utime(itself, ns=(node.mtime, node.mtime))
    finally:
        os.close(fd)


def _check_source(node: Node, path: bytes, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or (found.st_size, found.st_mtime_ns) != (node.size, node.mtime):
        raise HostError(f"change set: {os.fsdecode(path)} is damaged: it is not what it was when the call ended")


def dress(fd: int, node: Node) -> None:
    """Give a file or directory its owner, attributes, mode and time."""
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (node.uid, node.gid):
        os.chown(fd, node.uid, node.gid)
    there = {name: os.getxattr(fd, name) for name in os.listxattr(fd) if counts(name)}
    for name in there.keys() - node.xattrs.keys():  # of which an access control list may have been inherited
        os.removexattr(fd, name)
    for name, value in node.xattrs.items():
        if there.get(name) != value:
            os.setxattr(fd, name, value)
    os.chmod(fd, node.mode)  # after the owner, whose change takes bits away
    os.utime(fd, ns=(node.mtime, node.mtime))


def _copy(source: int, target: int, size: int) -> None:
    """Copy a file, its holes as holes; blocks are shared where the file system can."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole
                raise
            break
        end = os.lseek(source, start, os.SEEK_HOLE)
        while start < end:
            start += _copy_some(source, target, start, end - start)
        offset = end
    os.truncate(target, size)


def _copy_some(source: int, target: int, offset: int, count: int) -> int:
    try:
        if done := os.copy_file_range(source, target, count, offset, offset):
            return done
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    data = os.pread(source, min(count, _CHUNK), offset)
    if not data:
        raise HostError("change set: a file in it became shorter while it was read")
    return os.pwrite(target, data, offset)


def remove_tree(directory: int, name: bytes) -> None:
    """Remove what is at a name in an open directory, whatever it is; nothing being there is fine."""
    found = look_at(directory, name)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=directory)
        return
    inside = [name]
    for path in inside:
        _let_us_in(directory, path)
        with opened(directory, path, DIRECTORY) as fd:
            for entry in os.listdir(fd):
                inner = os.fsencode(entry)
                if (there := look_at(fd, inner)) is not None and stat.S_ISDIR(there.st_mode):
                    inside.append(join(path, inner))
                else:
                    os.unlink(inner, dir_fd=fd)
    for path in reversed(inside):
        above, last = split(path)
        with opened(directory, above, DIRECTORY) as fd:
            os.rmdir(last, dir_fd=fd)


def _let_us_in(directory: int, path: bytes) -> None:
    """A directory that is to go may have a mode that keeps its owner from emptying it."""
    if os.geteuid() == 0:
        return
    fd = open_beneath(directory, path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)
