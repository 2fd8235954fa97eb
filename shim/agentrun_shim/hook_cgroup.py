"""A container's cgroup: where it is, what is written there already, and what a policy adds to that.

A hook never loosens what the engine was told: of the engine's limit and the policy's the tighter one holds. The daemon uses the
same rules, so this knows neither policies nor sockets.
"""

from __future__ import annotations

import errno
import os

from agentrun_shim.hook_state import HookError

_DEFAULTS = {"cpu.weight": "100", "io.weight": "default 100"}
"""Shares have no tighter and looser: the engine's stays if it is not the kernel's default."""
HARMLESS = frozenset({"memory.oom.group", "memory.swap.max"})
"""Not missed where they are missing: without memory.max, or without swap, they say nothing."""


def cgroup_of(pid: int) -> tuple[str, str]:
    """The cgroup2 cgroup that a process is in, as /proc has it, and its directory. It has to be its own: not also the hook's.

    Raises:
        HookError: there is none.
    """
    if pid <= 0:
        raise HookError("the state names no pid, so there is no cgroup to look for")
    try:
        path, own = _path(f"/proc/{pid}/cgroup"), _path("/proc/self/cgroup")
        mount, root = _mount()
    except OSError as error:
        raise HookError(f"the cgroup of process {pid}: {error.strerror}") from error
    if (own.rstrip("/") + "/").startswith(path.rstrip("/") + "/"):
        raise HookError(f"the container has no cgroup2 cgroup of its own: {path} is also its runtime's")
    inside = os.path.relpath(path, root)
    if inside.startswith(".."):
        raise HookError(f"the container's cgroup {path} cannot be seen from here: {mount} shows {root}")
    return path, os.path.normpath(os.path.join(mount, inside))


def _path(file: str) -> str:
    with open(file, encoding="utf-8", errors="surrogateescape") as stream:
        for line in stream:
            if line.startswith("0::"):
                return line[3:].rstrip("\n")
    raise HookError(f"{file}: no cgroup2 hierarchy")


def _mount() -> tuple[str, str]:
    """Where cgroup2 is mounted, and which cgroup of it that shows."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as stream:
        for line in stream:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                fields = before.split(" ")
                return _unescape(fields[4]), _unescape(fields[3])
    raise HookError("no cgroup2 file system is mounted")


def _unescape(field: str) -> str:
    # proc_pid_mountinfo(5): blank, tab, newline and backslash are octal escapes.
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, letter)
    return field


def read_files(dirfd: int, names: list[str]) -> dict[str, str | None]:
    """What control files of a cgroup say; ``None`` for those it does not have."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dirfd)
        except OSError:
            found[name] = None
            continue
        try:
            found[name] = os.read(fd, 4096).decode().strip()
        except OSError:
            found[name] = None
        finally:
            os.close(fd)
    return found


class Merged:
    """A policy's control files laid over a cgroup's own."""

    __slots__ = ("kept", "missing", "write")

    def __init__(self, found: dict[str, str | None], wanted: dict[str, str]) -> None:
        """``found`` is what is there (``read_files``), ``wanted`` what the policy comes to, in the order to write it."""
        self.write: dict[str, str] = {}
        """What has to be written."""
        self.kept: dict[str, str] = {}
        """What is there and tighter."""
        self.missing: list[str] = []
        """What the cgroup has no file for."""
        for name, text in wanted.items():
            there = found.get(name)
            if there is None:
                self.missing.append(name)
            elif _is_tighter(name, there, text) or (name == "cpu.max.burst" and "cpu.max" in self.kept):
                self.kept[name] = there
            elif there != text:
                self.write[name] = text


def _is_tighter(name: str, there: str, text: str) -> bool:
    if name in _DEFAULTS:
        return there.splitlines()[0] != _DEFAULTS[name] if there else False
    if name == "memory.oom.group":
        return False
    return _amount(there) < _amount(text)


def _amount(text: str) -> float:
    """A limit as a number: ``max`` is infinite, ``quota period`` (cpu.max) a share."""
    words = text.split()
    if not words or words[0] == "max":
        return float("inf")
    return int(words[0]) / (int(words[1]) if len(words) > 1 else 1)


def write_files(dirfd: int, files: dict[str, str], where: str) -> None:
    """Write control files, in order.

    Raises:
        HookError: naming the file, the value and the reason.
    """
    for name, text in files.items():
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=dirfd)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise HookError(f"writing {text!r} to {where}/{name}: {_explain(error, dirfd, name)}") from error


def why_missing(dirfd: int, name: str) -> str:
    """Why a cgroup has no such control file."""
    controller = name.partition(".")[0]
    enabled = ((read_files(dirfd, ["cgroup.controllers"])["cgroup.controllers"]) or "").split()
    if controller in enabled:
        return f"this kernel has no {name}"
    return f"its cgroup has no {controller} controller (it has: {' '.join(enabled) or 'none'})"


def _explain(error: OSError, dirfd: int, name: str) -> str:
    if error.errno == errno.ENOENT:
        return why_missing(dirfd, name)
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{error.strerror}: this cgroup is not delegated to us"
    return error.strerror or str(error)
