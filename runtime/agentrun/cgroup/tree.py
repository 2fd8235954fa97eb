"""Our part of the cgroup tree: find it, own it, and remove what a killed owner left.

::

    <base>/                     a delegated cgroup, or the cgroup2 mount
      agentrun-<name>/          ours; locked with flock(2) for as long as its owner lives
        supervisor/             the owner's own processes, where the base demands that they move
        tenant-<name>/          one tenant's budget
          call-<id>/            one tool call: the leaf

The lock is the whole of the crash recovery: whoever can take it knows that the owner is dead, kills what is left below,
and removes it. No pid file, no state file, nothing to go stale.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from agentrun.cgroup.files import read_file, write_file
from agentrun.cgroup.leaf import Leaf
from agentrun.cgroup.limits import Plan, plan_limits
from agentrun.errors import HostError, UsageError
from agentrun.policy import Limits
from agentrun.types import Unenforced

PREFIX = "agentrun-"
_log = logging.getLogger("agentrun")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PLANS_KEPT = 1024
CONTROLLERS = ("cpu", "memory", "pids", "io")
COVERED = frozenset({"pids.max", "memory.oom.group", "memory.swap.max"})
"""Not missed where they are missing: RLIMIT_NPROC bounds processes; without memory.max the other two say nothing."""


class Base(msgspec.Struct, frozen=True):
    """Where our tree may be made."""

    path: Path
    origin: str
    """How it was found: ``AGENTRUN_CGROUP``, ``delegated``, or ``mount``."""


def find_mount(mountinfo: str = "/proc/self/mountinfo") -> Path | None:
    """The cgroup2 mount point, the first one if there are several (hybrid hosts have it beside the v1 hierarchies)."""
    return next((mount for mount, _ in _mounts(mountinfo)), None)


def _mounts(mountinfo: str = "/proc/self/mountinfo") -> list[tuple[Path, str]]:
    """Where cgroup2 is mounted, and which cgroup of it is there."""
    found = []
    for line in Path(mountinfo).read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        if after.split(b" ", 1)[0] == b"cgroup2":
            # proc_pid_mountinfo(5): blank, tab, newline and backslash are octal escapes.
            fields = [re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), field) for field in before.split()]
            found.append((Path(os.fsdecode(fields[4])), os.fsdecode(fields[3])))
    return found


def level_of(path: Path) -> int:
    """How deep a cgroup directory is in the cgroup tree; the root is 0. Within a cgroup namespace, as deep as that shows."""
    places = [(mount, root) for mount, root in _mounts() if path.is_relative_to(mount)]
    return max((len(Path(root).parts) - 1 + len(path.relative_to(mount).parts) for mount, root in places), default=0)


def place_of(cgroup: str) -> Path | None:
    """The directory of a cgroup that /proc/PID/cgroup names so; ``None`` if no mount of ours shows it."""
    for mount, root in _mounts():
        if Path(cgroup).is_relative_to(root) and ".." not in Path(cgroup).parts:
            return mount / Path(cgroup).relative_to(root)
    return None


def find_base(environ: Mapping[str, str] = os.environ) -> Base:
    """$AGENTRUN_CGROUP, else the cgroup we run in if systemd delegated it to us, else the cgroup2 mount.

    Raises:
        HostError: there is no cgroup2 file system, or $AGENTRUN_CGROUP is not on one.
    """
    if named := environ.get("AGENTRUN_CGROUP"):
        if not Path(named, "cgroup.procs").exists():
            raise HostError(f"AGENTRUN_CGROUP={named} is not a cgroup2 directory (no cgroup.procs in it)")
        return Base(Path(named), "AGENTRUN_CGROUP")
    mount = find_mount()
    if mount is None:
        raise HostError("no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup; needs Linux 5.14)")
    own = _own_cgroup(mount)
    if own != mount and _is_delegated(own):
        return Base(own, "delegated")
    return Base(mount, "mount")


def _own_cgroup(mount: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return mount / line[3:].lstrip("/")
    return mount


def _is_delegated(path: Path) -> bool:
    # systemd marks a delegated cgroup (Delegate=yes) with an extended attribute: systemd.resource-control(5).
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError:
            continue
    return False


class Tree:
    """An owned, locked ``agentrun-<name>`` below a base."""

    def __init__(self, base: Base, name: str) -> None:
        """Make it, lock it, enable the controllers that can be had.

        Raises:
            HostError: another live owner holds the name, or the base refuses a child.
        """
        self.path = base.path / (PREFIX + check_name(name))
        self.base = base
        self._tenants: dict[str, int] = {}
        self._plans: dict[Limits, Plan] = {}
        self.fd = _claim(self.path)
        try:
            _clear(self.fd, self.path)  # a dead owner of the same name
            self.controllers = self._enable()
            self.files = self._probe_files()
        except BaseException:
            self.close()
            raise

    @property
    def level(self) -> int:
        """How deep it is in the cgroup tree; see ``level_of``."""
        return level_of(self.path)

    def _enable(self) -> frozenset[str]:
        """Enable our controllers from the base down; returns those the leaves will have."""
        base_fd = os.open(self.base.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            available = set((read_file(base_fd, "cgroup.controllers") or b"").decode().split())
            wanted = [name for name in CONTROLLERS if name in available]
            if self.base.origin == "delegated":
                self._move_to_supervisor(base_fd)
            _delegate(base_fd, str(self.base.path), wanted)
        finally:
            os.close(base_fd)
        _delegate(self.fd, str(self.path), wanted)
        return frozenset((read_file(self.fd, "cgroup.subtree_control") or b"").decode().split())

    def _probe_files(self) -> frozenset[str]:
        """The control files a leaf has here: the kernel's configuration decides, and only looking tells."""
        os.mkdir("probe", dir_fd=self.fd)
        try:
            return frozenset(os.listdir(self.path / "probe"))
        finally:
            os.rmdir("probe", dir_fd=self.fd)

    def plan(self, limits: Limits) -> Plan:
        """What to write to a leaf for ``limits``, and which of them nothing here can enforce."""
        if limits not in self._plans:
            if len(self._plans) >= _PLANS_KEPT:  # --memory may be another number each time
                self._plans.clear()
            files = plan_limits(limits)
            missing = tuple(Unenforced(name, self._why(name)) for name in files if name not in self.files)
            self._plans[limits] = Plan(
                limits,
                {name: text for name, text in files.items() if name in self.files},
                tuple(item for item in missing if item.limit not in COVERED),
            )
        return self._plans[limits]

    def _why(self, name: str) -> str:
        controller = name.partition(".")[0]
        if controller in self.controllers:
            return f"this kernel has no {name}"
        return f"no {controller} controller under {self.path} ({_where_is(controller)})"

    def _move_to_supervisor(self, base_fd: int) -> None:
        # cgroups(7), no internal processes: a cgroup that gives controllers to children has no processes of its own.
        os.makedirs(self.base.path / "supervisor", exist_ok=True)
        for pid in (read_file(base_fd, "cgroup.procs") or b"").decode().split():
            try:
                write_file(base_fd, "supervisor/cgroup.procs", pid, str(self.base.path))
            except HostError as error:
                if not isinstance(error.__cause__, ProcessLookupError):  # it has exited meanwhile
                    raise

    def tenant(self, name: str, files: Mapping[str, str]) -> int:
        """The directory fd of a tenant's cgroup, made with its budget on first use.

        Raises:
            HostError: it could not be made, or its budget could not be written.
        """
        if name not in self._tenants:
            directory = f"tenant-{name}"
            try:
                os.mkdir(directory, dir_fd=self.fd)
            except FileExistsError:
                pass
            except OSError as error:
                raise HostError(f"making a cgroup at {self.path}/{directory}: {error.strerror}") from error
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                for file, text in files.items():
                    if file in self.files:
                        write_file(fd, file, text, f"{self.path}/{directory}")
                _delegate(fd, f"{self.path}/{directory}", sorted(self.controllers))
            except BaseException:
                os.close(fd)
                raise
            self._tenants[name] = fd
        return self._tenants[name]

    def drop_tenants(self, keep: Collection[str]) -> list[str]:
        """Remove the cgroups of all tenants but these, as far as they are empty; returns whose are gone."""
        gone = []
        for name in [name for name in self._tenants if name not in keep]:
            try:
                os.rmdir(f"tenant-{name}", dir_fd=self.fd)
            except FileNotFoundError:
                pass
            except OSError:
                continue  # a sandbox of it is still being taken down
            os.close(self._tenants.pop(name))
            gone.append(name)
        return gone

    def leaf(self, tenant: str, name: str, files: Mapping[str, str]) -> Leaf:
        """A new leaf below a tenant that exists; ``files`` are written before any process can be in it."""
        return Leaf(self._tenants[tenant], name, f"{self.path}/tenant-{tenant}", self.controllers, files)

    def close(self) -> None:
        """Kill whatever is left, remove the tree, give up the lock."""
        for fd in self._tenants.values():
            os.close(fd)
        self._tenants.clear()
        if self.fd >= 0:
            try:
                _clear(self.fd, self.path)
                _rmdir(self.path)
            finally:
                fd, self.fd = self.fd, -1
                os.close(fd)


def remove_stale(base: Path) -> list[str]:
    """Remove every ``agentrun-*`` below ``base`` whose owner is dead; returns their names."""
    removed = []
    for path in sorted(base.glob(PREFIX + "*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(fd, path)
            _rmdir(path)
            removed.append(path.name)
        except (BlockingIOError, FileNotFoundError):
            continue  # it has an owner, or somebody else removed it first
        except (OSError, HostError) as error:
            _log.warning("removing what a dead agentrun left at %s: %s", path, error)
        finally:
            os.close(fd)
    return removed


def check_name(name: str) -> str:
    """The name of a tree, as a directory can carry it.

    Raises:
        UsageError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"name: {name!r} is no name for a cgroup (letters, digits, '-', '_', '.'; at most 64)")
    return name


def _claim(path: Path, patience: float = 1.0) -> int:
    """Make a cgroup and take its lock; returns its descriptor.

    Somebody who looks for stale trees may hold the lock for a moment, or remove the directory between our mkdir and our
    lock; so try again for a little, and believe only a lock on what is there now.

    Raises:
        HostError: a live owner has it, or the base refuses a child.
    """
    deadline = time.monotonic() + patience
    while True:
        fd = -1
        try:
            path.mkdir(exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
            os.close(fd)
        except (BlockingIOError, FileNotFoundError):
            if fd >= 0:
                os.close(fd)
            if time.monotonic() > deadline:
                raise HostError(f"{path} belongs to an agentrun that is running") from None
            time.sleep(0.01)
        except OSError as error:
            raise HostError(f"making a cgroup at {path}: {error.strerror}") from error


def _rmdir(path: Path, patience: float = 5.0) -> None:
    """rmdir, while the kernel may still be letting go of what died there (EBUSY)."""
    deadline = time.monotonic() + patience
    while True:
        try:
            path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            return


def _where_is(controller: str) -> str:
    """Why a controller is not there, from /proc/cgroups: cgroups(7)."""
    for line in Path("/proc/cgroups").read_text().splitlines():
        fields = line.split()
        if fields[0] == controller or (controller, fields[0]) == ("io", "blkio"):
            if fields[3] == "0":
                return "disabled in the kernel"
            return "a cgroup v1 hierarchy has it" if fields[1] != "0" else "not delegated to this cgroup"
    return "not in this kernel"


def _delegate(dirfd: int, where: str, controllers: list[str]) -> None:
    enabled = (read_file(dirfd, "cgroup.subtree_control") or b"").decode().split()
    for name in controllers:
        if name in enabled:
            continue
        try:
            write_file(dirfd, "cgroup.subtree_control", f"+{name}", where)
        except HostError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EBUSY, errno.ENOENT, errno.EINVAL):
                continue  # not ours to give: the results list what is not enforced, doctor says why
            raise


def _clear(fd: int, path: Path, patience: float = 10.0) -> None:
    """Kill everything below a cgroup and remove its children.

    Raises:
        HostError: something below is still alive after ``patience`` seconds.
    """
    write_file(fd, "cgroup.kill", "1", str(path))
    deadline = time.monotonic() + patience
    while True:
        busy = _remove_children(path)
        if not busy:
            return
        if time.monotonic() > deadline:
            raise HostError(f"{busy} still has processes {patience:g} s after they were killed")
        time.sleep(0.002)


def _remove_children(path: Path) -> Path | None:
    busy = None
    for entry in os.scandir(path):
        if not entry.is_dir(follow_symlinks=False):
            continue
        child = Path(entry.path)
        busy = _remove_children(child) or busy
        try:
            child.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            busy = child
    return busy
