"""The default image: the host's own root file system, read-only, as detached mounts.

The root of a sandbox is a small tmpfs on which the host's top-level directories are attached read-only, without setuid and
device nodes. Nothing is copied. What belongs to the machine or to its people is left out and replaced by something private
or empty: /proc, /sys, /dev, /run, /tmp, /home, /root, /mnt, /media, /boot, /lost+found.

The sandbox's user namespace does not map the host's users, so a file that only root or some user may read on the host
cannot be read inside: every host file is owned by nobody there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from agentrun.binds import clone_bind, make_mount_point, set_read_only
from agentrun.errors import HostError
from agentrun.policy import Bind
from agentrun_shim import syscalls as sc

PRIVATE = {"tmp": 0o1777, "home": 0o755}
"""Directories that are the call's own, on its scratch tmpfs, with their modes."""
ON_DEMAND = {"media": 0o755, "mnt": 0o755, "root": 0o755}
"""The same, but only where a workspace has to be attached below one: every mount has its price in every sandbox."""
HIDDEN = frozenset({*PRIVATE, *ON_DEMAND, "boot", "dev", "lost+found", "proc", "run", "sys"})
SCRATCH = "/run/agentrun/scratch"
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
"""Name → major, minor: Documentation/admin-guide/devices.txt."""
USER, UID, GID, HOME = "tool", 1000, 1000, "/home/tool"


NOBODY = ((False, 0xFFFFFFF0, 0x5FFFFFF0, 1), (True, 0xFFFFFFF0, 0x5FFFFFF0, 1))
"""Maps of a user namespace that has names for nobody: one id that no file has."""


class Private(msgspec.Struct, frozen=True):
    """A directory that is the call's own."""

    name: str
    """Of where it really is, on the scratch tmpfs."""
    path: str
    mode: int
    owned: bool = False
    """It is the tool's; else root's."""
    on_demand: bool = False
    """Not there before a workspace is attached below it."""


class RootFs(msgspec.Struct):
    """Detached mounts ready for a plan. ``fds[0]`` is the root; ``moves`` are (fd index, path below the root)."""

    fds: list[int]
    moves: list[tuple[int, str]]
    binds: list[tuple[str, str]]
    has_var_tmp: bool = False
    private: list[Private] = []
    late: list[tuple[str, str, str]] = []
    """What is bound (from, to) after the private directories, because it is below one of them, which is the third."""
    made: list[tuple[str, str, int, int]] = []
    """Directories made in private ones: the path, the private one, uid and gid."""
    whole: bool = False
    """All of it can be written to."""
    attached: set[str] = set()
    """Top-level directories of the host that are in it."""
    points: frozenset[str] = frozenset()
    """Where there is something to attach binds to already."""
    writable: list[tuple[str, bool]] = []
    """Absolute paths of writable binds, and whether each is a directory."""

    def close(self) -> None:
        """Close the descriptors; the zygote has its own by then."""
        while self.fds:
            os.close(self.fds.pop())


def open_host_root(
    host: str = "/", ids: tuple[int, int] = (UID, GID), etc: Mapping[str, bytes] | None = None, nobody: int = -1
) -> RootFs:
    """Clone the host's root into detached mounts, with an account for the tool's ``ids`` and other files laid over /etc.

    ``nobody`` is a user namespace with the maps of ``NOBODY``: through it no file has an owner the kernel knows, and it refuses
    to write to anything there (HAS_UNMAPPED_ID, fs/namei.c), sockets and pipes included, which read-only mounts do not cover.
    A file system that cannot be mounted so is mounted without.

    Raises:
        HostError: a mount call failed; the message names it.
    """
    private = [Private(name, f"/{name}", mode) for name, mode in PRIVATE.items()]
    private += [Private(name, f"/{name}", mode, on_demand=True) for name, mode in ON_DEMAND.items()]
    root = RootFs([], [], [], os.path.isdir(os.path.join(host, "var/tmp")), private)
    try:
        _build(root, host, ids, etc or {}, nobody)
    except OSError as error:
        root.close()
        raise HostError(f"preparing the host's root as an image: {error.filename}: {error.strerror}") from error
    return root


def _build(root: RootFs, host: str, ids: tuple[int, int], etc: Mapping[str, bytes], nobody: int) -> None:
    base = sc.new_filesystem("tmpfs", {"size": "64m", "mode": "755"}, sc.MOUNT_ATTR_NOSUID)
    root.fds.append(base)
    for name in ("proc", "dev", "run", "sys", "sys/fs", "sys/fs/cgroup", *PRIVATE, *ON_DEMAND):
        os.mkdir(name, 0o755, dir_fd=base)
    for entry in sorted(os.scandir(host), key=lambda entry: entry.name):
        if entry.name in HIDDEN:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), entry.name, dir_fd=base)
        elif entry.is_dir():
            os.mkdir(entry.name, 0o755, dir_fd=base)
            move(root, _clone_read_only(entry.path, nobody), entry.name)
            root.attached.add(entry.name)
    # A fully visible /proc has to be there before a user namespace may mount its own (mount_too_revealing, fs/namespace.c).
    move(root, sc.open_tree(sc.AT_FDCWD, os.path.join(host, "proc"), sc.OPEN_TREE_CLONE), "proc")
    build_dev(root, base, host)
    _build_etc(root, base, host, ids, etc)


def _clone_read_only(path: str, nobody: int) -> int:
    fd = sc.open_tree(sc.AT_FDCWD, path, sc.OPEN_TREE_CLONE | sc.AT_RECURSIVE)
    try:
        set_read_only(fd, nobody)
    except BaseException:
        os.close(fd)
        raise
    return fd


def build_dev(root: RootFs, base: int, host: str, below: str = "dev/") -> None:
    """A minimal /dev on ``base``: in its directory ``dev``, which is there already, or where else ``below`` says."""
    os.mkdir(f"{below}pts", 0o755, dir_fd=base)
    for name, target in _dev_links():
        os.symlink(target, f"{below}{name}", dir_fd=base)
    for name, (major, minor) in DEVICES.items():
        try:
            os.mknod(f"{below}{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=base)
            os.chmod(f"{below}{name}", 0o666, dir_fd=base)
        except PermissionError:
            # A container around us may refuse device nodes; then the host's own is attached, one mount each.
            os.close(os.open(f"{below}{name}", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=base))
            move(root, sc.open_tree(sc.AT_FDCWD, os.path.join(host, "dev", name), sc.OPEN_TREE_CLONE), f"dev/{name}")


def _dev_links() -> Iterator[tuple[str, str]]:
    yield "fd", "/proc/self/fd"
    yield from ((name, f"/proc/self/fd/{number}") for number, name in enumerate(("stdin", "stdout", "stderr")))
    yield "ptmx", "pts/ptmx"
    yield "shm", f"{SCRATCH}/shm"


def _build_etc(root: RootFs, base: int, host: str, ids: tuple[int, int], etc: Mapping[str, bytes]) -> None:
    """passwd and group with an entry for the tool's user, bound over the host's: git, pip and ssh ask who they are."""
    uid, gid = ids
    for name in ("run/agentrun", "run/agentrun/etc", SCRATCH[1:]):
        os.mkdir(name, 0o755, dir_fd=base)
    entries = {
        "passwd": f"{USER}:x:{uid}:{gid}:agentrun tool call:{HOME}:/bin/sh",
        "group": f"{USER}:x:{gid}:",
    }
    for name, entry in entries.items():
        path = os.path.join(host, "etc", name)
        if os.path.isfile(path):
            write(base, f"run/agentrun/etc/{name}", replace_entry(Path(path).read_bytes(), entry.encode()))
            root.binds.append((f"run/agentrun/etc/{name}", f"etc/{name}"))
    for name, content in etc.items():
        _lay_over(root, base, os.path.realpath(os.path.join(host, "etc", name)), f"run/agentrun/etc/{name}", content)


def _lay_over(root: RootFs, base: int, path: str, own: str, content: bytes) -> None:
    """Show ``content`` where a file of /etc really is: in /etc, or in /run, which is the sandbox's own, behind a link."""
    if path.startswith("/etc/") and os.path.isfile(path):
        write(base, own, content)
        root.binds.append((own, path[1:]))
    elif path.startswith("/run/"):
        parts = path[1:].split("/")
        for depth in range(2, len(parts)):
            with contextlib.suppress(FileExistsError):
                os.mkdir("/".join(parts[:depth]), 0o755, dir_fd=base)
        write(base, path[1:], content)


def replace_entry(text: bytes, entry: bytes) -> bytes:
    """``text`` without the lines that have the name or the id of ``entry``, and with ``entry``."""
    name, _, number = entry.split(b":")[:3]
    kept = [line for line in text.splitlines() if line.split(b":")[0] != name and line.split(b":")[2:3] != [number]]
    return b"\n".join([*kept, entry, b""])


def write(base: int, path: str, content: bytes) -> None:
    """A new file below a directory."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=base)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def add_bind(root: RootFs, bind: Bind, source: int, found: os.stat_result, userns_fd: int) -> None:
    """Show a policy's bind in the root as well.

    Raises:
        HostError: it cannot be attached where it should.
    """
    is_directory = stat.S_ISDIR(found.st_mode)
    if bind.target not in root.points:
        try:
            make_mount_point(root.fds[0], bind.target, frozenset(root.attached), is_directory=is_directory)
        except OSError as error:
            raise HostError(f"fs.binds: making {bind.target}: {error.strerror}") from error
    move(root, clone_bind(bind, source, userns_fd), bind.target[1:])
    if bind.mode == "rw":
        root.writable.append((bind.target, is_directory))


def move(root: RootFs, fd: int, path: str) -> None:
    """Have a detached mount attached at a path of the root; it is the root's to close."""
    root.fds.append(fd)
    root.moves.append((len(root.fds) - 1, path))
