"""The container's cgroup (v2): where it is, what is written to it, and the leaves below it.

::

    <cgroupsPath>/          the container: its limits, its devices, frozen and killed as a whole
      init/                 the container's first process, and what it starts
      exec-<pid>/           what one `exec` started: its own account, its own end

A cgroup that gives controllers to those below has no processes of its own (cgroups(7), "no internal processes"); so the first
process has a leaf, too. Engines read the cgroup of the first process to find limits: those they show are written to ``init`` as
well.
"""

from __future__ import annotations

import os

from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.log import Log

INIT = "init"
SHOWN = ("memory.max", "memory.swap.max", "memory.high", "memory.low", "memory.min", "pids.max", "cpu.max")


def find_mount() -> tuple[str, str] | None:
    """Where cgroup2 is mounted, and which cgroup of it is there; the usual place first."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("cgroup2 "):
                fields = before.split(" ")
                found.append((fields[4], fields[3]))
    found.sort(key=lambda mount: mount[0] != "/sys/fs/cgroup")
    return found[0] if found else None


def own_cgroup() -> str:
    """The cgroup we run in, ``/`` at the top."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        for line in file:
            if line.startswith("0::"):
                return line[3:].strip()
    return "/"


def place(path: str, name: str, *, rootless: bool) -> str:
    """The directory of ``linux.cgroupsPath``.

    Absolute paths begin at the mount. Relative ones and none do, too, for root; others have only what was delegated to them, so
    theirs begin at the cgroup they run in.

    Raises:
        OciError: there is no cgroup2, or the path leads out of it.
    """
    mount = find_mount()
    if mount is None:
        raise OciError(
            "no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup), and --cgroup-manager is not disabled"
        )
    # Not agentrun-…: those at the base are the daemon's, and it clears them of what a dead one left.
    parts = [part for part in (path or f"oci-agentrun-{name}").split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise OciError(f"linux.cgroupsPath: {path!r} {'has .. in it' if parts else 'names no cgroup of its own'}")
    if "\n" in path:  # nor does the kernel take one
        raise OciError(f"linux.cgroupsPath: {path!r} has a line break in it")
    base = mount[0]
    if rootless and not path.startswith("/"):
        base += own_cgroup().rstrip("/")
    return f"{base}/{'/'.join(parts)}"


def must_be_free(path: str) -> None:
    """Refuse a cgroup that others are in already: it would be frozen with the container, limited with it, and killed with it.

    Raises:
        OciError: there are processes in it, or below.
    """
    try:
        events = read(path, "cgroup.events")
    except FileNotFoundError:
        if not os.path.exists(f"{path}/cgroup.procs"):
            return  # it is not there yet
        events = "populated 1"  # the root of a hierarchy has no such file
    if "populated 1" in events:
        raise OciError(f"the cgroup {path} is not the container's alone: there are processes in it")


def make(path: str) -> None:
    """Make a cgroup and those above it, and give it the controllers there are, from the top down.

    Raises:
        OciError: it could not be made.
    """
    mount = find_mount()
    top = mount[0] if mount else "/sys/fs/cgroup"
    above = top
    for part in [*path[len(top) :].strip("/").split("/")]:
        enable(above)
        above = f"{above}/{part}"
        for _ in range(8):
            try:
                os.mkdir(above, 0o755)
            except FileExistsError:
                break
            except FileNotFoundError:  # the last of its neighbours was removed, and the directory with it: once more
                os.makedirs(os.path.dirname(above), exist_ok=True)
                continue
            except OSError as error:
                raise OciError(f"making the cgroup {above}: {strerror(error)}") from None
            break


def first_missing(path: str) -> str:
    """The topmost directory of a path that is not there yet."""
    while not os.path.isdir(os.path.dirname(path)):
        path = os.path.dirname(path)
    return path


def is_ours(path: str) -> bool:
    """Whether we may make a cgroup at a path that is not there yet: what another user has to ask before."""
    return os.access(os.path.dirname(first_missing(path)), os.W_OK)


def enable(path: str) -> None:
    """Give a cgroup's children every controller it has. One that cannot be given is missed by whoever needs it."""
    try:
        has = read(path, "cgroup.controllers").split()
        given = read(path, "cgroup.subtree_control").split()
    except OSError:
        return
    missing = [name for name in has if name not in given]
    if not missing:
        return
    try:
        write_raw(path, "cgroup.subtree_control", " ".join([f"+{name}" for name in missing]))
    except OSError:
        for name in missing:
            try:
                write_raw(path, "cgroup.subtree_control", f"+{name}")
            except OSError:
                continue


def read(path: str, file: str) -> str:
    """A control file's text."""
    with open(f"{path}/{file}", encoding="utf-8") as opened:
        return opened.read()


def write_raw(path: str, file: str, text: str) -> None:
    """Write a control file in one go: the kernel takes each write as a whole."""
    fd = os.open(f"{path}/{file}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def apply(path: str, files: list[tuple[str, str]], *, best_effort: bool, log: Log) -> None:
    """Write limits to a container's cgroup, and to its first leaf those that engines look for there.

    Raises:
        OciError: one could not be written. What nothing here can enforce is an error, too, unless ``best_effort`` says otherwise.
    """
    for file, text in files:
        try:
            write_raw(path, file, text)
        except FileNotFoundError:
            controller = file.partition(".")[0]
            message = f"controller `{controller}` is not available under {path}: {file} = {text} cannot be enforced"
            if not best_effort:
                raise OciError(message) from None
            log.warning(message)
            continue
        except OSError as error:
            raise OciError(f"{path}/{file}: {text!r}: {strerror(error)}") from None
        if file in SHOWN:
            try:
                write_raw(f"{path}/{INIT}", file, text)
            except OSError:
                continue  # the container's own limit holds


def processes(path: str) -> list[int]:
    """The processes of a cgroup and of all below it."""
    found: list[int] = []
    for directory, _, files in os.walk(path):
        if "cgroup.procs" in files:
            try:
                found += [int(line) for line in read(directory, "cgroup.procs").split()]
            except OSError:
                continue
    return sorted(set(found))


def freeze(path: str, frozen: bool) -> None:
    """Freeze or thaw, and wait until it is so.

    Raises:
        OciError: the kernel has no freezer there, or it took longer than ten seconds.
    """
    import select

    wanted = "1" if frozen else "0"
    try:
        write_raw(path, "cgroup.freeze", wanted)
        fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OciError(f"{path}/cgroup.freeze: {strerror(error)}") from None
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        for _ in range(200):
            if f"frozen {wanted}" in os.pread(fd, 256, 0).decode():
                return
            poll.poll(50)
        raise OciError(f"{path}: not {'frozen' if frozen else 'thawed'} after ten seconds")
    finally:
        os.close(fd)
