"""One leaf: the cgroup of one tool call."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping

import msgspec

from agentrun.cgroup.files import read_file, write_file
from agentrun.cgroup.stats import parse_cpu, parse_flat, parse_io, parse_number, parse_pressure
from agentrun.errors import HostError


class LeafStats(msgspec.Struct, frozen=True, kw_only=True):
    """A leaf's own account. Seconds and bytes; ``None`` where the host has no such file."""

    cpu_user: float
    cpu_system: float
    throttled: float | None
    memory_peak: int | None
    oom_kills: int
    """Processes the kernel killed here for want of memory."""
    ooms: int
    """Times this leaf's own limit was what ran out; with ``oom_kills``, none means that a cgroup above it, or the host, did."""
    pids_peak: int | None
    io_read: int | None
    io_written: int | None


class Leaf:
    """A cgroup directory we made, by its descriptor.

    ``fd`` is -1 once closed, so that a number the kernel gave to somebody else can never be used by mistake.
    """

    __slots__ = ("_built_system", "_built_user", "_files", "_parent_fd", "controllers", "fd", "id", "name", "where")

    def __init__(self, parent_fd: int, name: str, where: str, controllers: frozenset[str], files: Mapping[str, str]) -> None:
        """Make the leaf and write ``files`` (control file → text) to it, before any process can be in it.

        Raises:
            HostError: it could not be made, or a limit not be written; then it is removed again.
        """
        try:
            os.mkdir(name, 0o755, dir_fd=parent_fd)
        except OSError as error:
            raise HostError(f"making the leaf {where}/{name}: {error.strerror}") from error
        self._parent_fd, self.name, self.where, self.controllers = parent_fd, name, f"{where}/{name}", controllers
        self.fd = -1
        self.id = 0
        """Its cgroup id, by which the kernel's programs know it."""
        self._files: dict[str, int] = {}
        self._built_user = self._built_system = 0.0
        try:
            self.fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent_fd)
            self.id = os.fstat(self.fd).st_ino
            for file, text in files.items():
                write_file(self.fd, file, text, self.where)
        except BaseException:
            self.close()
            os.rmdir(name, dir_fd=parent_fd)
            raise

    def write(self, files: Mapping[str, str]) -> None:
        """Write control files, in their order.

        Raises:
            HostError: naming the file, the value and the likely cause.
        """
        for file, text in files.items():
            write_file(self.fd, file, text, self.where)

    def mark_ready(self) -> None:
        """The sandbox is built: open what the end of every call reads, and note the time spent so far, which is not the tool's.

        Raises:
            HostError: there are no descriptors left.
        """
        try:
            for name in ("cgroup.procs", "cpu.stat"):
                self._files[name] = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            raise HostError(f"opening {self.where}/{name}: {error.strerror} (raise LimitNOFILE, or keep fewer warm)") from error
        stats = self.stats()
        self._built_user, self._built_system = stats.cpu_user, stats.cpu_system

    def _read(self, name: str) -> bytes:
        fd = self._files.get(name, -1)
        return os.pread(fd, 65536, 0) if fd >= 0 else read_file(self.fd, name) or b""

    def only(self, pid: int) -> bool:
        """No live process but this one is in it."""
        return self._read("cgroup.procs") in (b"", b"%d\n" % pid)

    def pids(self) -> list[int]:
        """The processes in it now (host pids; the dead are not listed)."""
        return [int(pid) for pid in self._read("cgroup.procs").split()]

    def kill(self) -> None:
        """SIGKILL to everything in it, at once and without a race (cgroup.kill, Linux 5.14).

        A killed leaf is spent: later CLONE_INTO_CGROUP children would be killed at birth.
        """
        with contextlib.suppress(FileNotFoundError):
            write_file(self.fd, "cgroup.kill", "1", self.where)

    def freeze(self, frozen: bool) -> None:
        """Stop everything in it, or let it go on (cgroup.freeze). What sits in a long system call stops when that returns."""
        write_file(self.fd, "cgroup.freeze", "1" if frozen else "0", self.where)

    def stats(self) -> LeafStats:
        """Read its account once; meant for when nothing runs in it any more."""
        fd, has = self.fd, self.controllers
        user, system, throttled = parse_cpu(self._read("cpu.stat"))
        events = parse_flat(read_file(fd, "memory.events") or b"") if "memory" in has else {}
        io = parse_io(read_file(fd, "io.stat") or b"") if "io" in has else (None, None)
        return LeafStats(
            cpu_user=max(0.0, round(user - self._built_user, 6)),
            cpu_system=max(0.0, round(system - self._built_system, 6)),
            throttled=throttled,
            memory_peak=parse_number(read_file(fd, "memory.peak")) if "memory" in has else None,
            oom_kills=events.get("oom_kill", 0),
            ooms=events.get("oom", 0),
            pids_peak=parse_number(read_file(fd, "pids.peak")) if "pids" in has else None,
            io_read=io[0],
            io_written=io[1],
        )

    def load(self) -> dict[str, float | None]:
        """Processor seconds so far, and PSI: percent of the last ten seconds in which something of it had to wait."""
        user, system, _ = parse_cpu(self._read("cpu.stat"))
        return {
            "cpu": round(user + system - self._built_user - self._built_system, 6),
            "psi_cpu": parse_pressure(read_file(self.fd, "cpu.pressure")),
            "psi_memory": parse_pressure(read_file(self.fd, "memory.pressure")),
        }

    def remove_nowait(self) -> bool:
        """rmdir it; False while the kernel still sees a dying process there (EBUSY). A leaf already gone is removed."""
        try:
            os.rmdir(self.name, dir_fd=self._parent_fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        self.close()
        return True

    def close(self) -> None:
        """Forget the descriptors; the cgroup stays."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
