"""Read and write control files below a directory descriptor; explain a write that failed."""

from __future__ import annotations

import errno
import os

from agentrun.errors import HostError


def read_file(dirfd: int, name: str) -> bytes | None:
    """The content of a control file, or ``None`` where it does not exist or its cgroup is gone (ENOENT, ENODEV)."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dirfd)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 65536)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise
    finally:
        os.close(fd)


def write_file(dirfd: int, name: str, text: str, where: str) -> None:
    """Write a control file.

    Raises:
        HostError: it failed; the message says what was written where and, if it can be told, why.
    """
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dirfd)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"writing {text.strip()!r} to {where}/{name}: {_explain(error, dirfd, name)}") from error


def _explain(error: OSError, dirfd: int, name: str) -> str:
    """crun's habit: a failed cgroup write says which controller is missing, not only ENOENT."""
    controller = os.path.basename(name).partition(".")[0]
    if error.errno == errno.ENOENT and controller != "cgroup":
        enabled = (read_file(dirfd, "cgroup.controllers") or b"").decode().split()
        if controller not in enabled:
            return f"controller {controller!r} is not enabled there (it has: {' '.join(enabled) or 'none'})"
    if error.errno == errno.EROFS:
        return "the cgroup file system is mounted read-only"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.strerror}: this cgroup is not delegated to us"
    return error.strerror or str(error)
