"""Run a container plan: start the helper, follow what it says, answer it.

The helper is executed from a sealed copy in memory, so that no program in a container can reach, by /proc/<pid>/exe, a file of
the host that runs as root again. It is our child, and so is what it clones (CLONE_PARENT): when we end, the container's process
becomes a child of whoever is our subreaper, conmon or containerd's shim.
"""

from __future__ import annotations

import os
import sys

from agentrun_shim import container_plan as cp
from agentrun_shim.container_plan import Plan
from agentrun_shim.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Event = tuple[int, int, int, int, int]

NATIVE = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/_native/agentrun-oci"
_EXEC = 0x10
"""MFD_EXEC: since Linux 6.3 a kernel may be told to make files in memory that cannot be executed unless asked for."""
_HOOK_STATUS = 0x10000
_NO_PROGRAM = ("no such file or directory", "permission denied")


class Launch:
    """A helper and the process it makes."""

    def __init__(self, plan: Plan, program: str, keep: int) -> None:
        """Start the helper. ``program`` is what error messages call what is to be executed; ``keep`` is --preserve-fds.

        Raises:
            OciError: it could not be started.
        """
        self.plan, self.program = plan, program
        self.pid = 0
        self._buffer = b""
        self._early: list[Event] = []
        self.helper = 0
        packed = os.memfd_create("plan", os.MFD_CLOEXEC)
        os.write(packed, plan.pack())
        self.up, up = os.pipe()
        down, self.down = os.pipe()
        image = _sealed_copy()
        try:
            argv = ["agentrun-oci: container", str(packed), str(up), str(down), str(keep)]
            actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (packed, up, down)]
            self.helper = os.posix_spawn(
                image if isinstance(image, str) else f"/proc/self/fd/{image}", argv, {}, file_actions=actions
            )
        except OSError as error:
            raise OciError(f"starting {NATIVE}: {error.strerror}") from None
        finally:
            for fd in (packed, up, down, *([image] if isinstance(image, int) else [])):
                os.close(fd)

    def expect(self, kind: int) -> Event:
        """The next event, which has to be of this kind.

        Raises:
            OciError: an operation failed, in its own words; or the process died.
        """
        event = self.next()
        if event is None:
            raise OciError(f"the container's process died ({self._end()})")
        if event[0] == cp.FAILED:
            raise OciError(self.explain(event[2], event[3]))
        if event[0] != kind:
            raise OciError(f"the container's process said {event[0]} instead of {kind}")
        return event

    def next(self) -> Event | None:
        """The next event; None at the end."""
        return self._early.pop(0) if self._early else self._read()

    def _read(self) -> Event | None:
        while len(self._buffer) < cp.EVENT.size:
            more = os.read(self.up, 4096)
            if not more:
                return None
            self._buffer += more
        event: Event = cp.EVENT.unpack(self._buffer[: cp.EVENT.size])
        self._buffer = self._buffer[cp.EVENT.size :]
        return event

    def born(self) -> int:
        """Wait for the clone, collect the helper; returns the pid. The child may have said something before the helper did."""
        early: list[Event] = []
        while (event := self._read()) is not None and event[0] != cp.CLONED:
            early.append(event)
        self._early = early
        self.pid = event[3] if event is not None else self.expect(cp.CLONED)[3]
        os.waitpid(self.helper, 0)
        self.helper = 0
        return self.pid

    def send(self, data: bytes) -> None:
        """To the container's process, which waits for it."""
        while data:
            try:
                data = data[os.write(self.down, data) :]
            except BrokenPipeError:
                return  # it has ended, and `up` says why

    def send_state(self, state: str) -> None:
        """Answer its STATE operation."""
        raw = state.encode()
        self.send(len(raw).to_bytes(4, "little") + raw)

    def explain(self, error: int, op: int) -> str:
        """Words for a failed operation; engines look for those about the program."""
        about = self.plan.about[op] if op < len(self.plan.about) else f"operation {op}"
        if error > 0xFFFF:
            status = error & 0xFFFF
            code = os.waitstatus_to_exitcode(status) if status else 0
            return f"{about}: {f'exit status {code}' if code >= 0 else f'killed by signal {-code}'}"
        text = os.strerror(error)
        text = text[:1].lower() + text[1:]
        if op < len(self.plan.names) and self.plan.names[op] in ("FIND", "EXEC"):
            if error == 2 and "/" not in self.program:
                text = "executable file not found in $PATH"
            return f'exec: "{self.program}": {text}'
        return f"{about}: {text}"

    def kill(self) -> None:
        """End the process if there is one, and let go of everything."""
        self.close()
        for pid in (self.pid, self.helper):
            if pid:
                try:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    continue
        self.pid = self.helper = 0

    def close(self) -> None:
        """Close the pipes. A process that waits on ours ends with that, unless it was told to go on."""
        for fd in (self.up, self.down):
            if fd >= 0:
                os.close(fd)
        self.up = self.down = -1

    def _end(self) -> str:
        try:
            _, status = os.waitpid(self.helper or self.pid, 0)
        except ChildProcessError:
            return "nobody knows how"
        code = os.waitstatus_to_exitcode(status)
        if self.helper:
            self.helper = 0
        else:
            self.pid = 0
        return f"exit status {code}" if code >= 0 else f"signal {-code}"


def serve_maps(launch: Launch, maps: Callable[[int], None]) -> None:
    """Write the id maps of the process and tell it."""
    maps(launch.pid)
    launch.send(b"m")


def _sealed_copy() -> int | str:
    """The native program in memory; its path where the kernel allows no such file to be executed."""
    try:
        source = os.open(NATIVE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OciError(f"{NATIVE}: {error.strerror} (the native programs are not built: make build, or reinstall)") from None
    try:
        try:
            copy = os.memfd_create("agentrun-oci", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _EXEC)
        except OSError:
            copy = os.memfd_create("agentrun-oci", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            while os.sendfile(copy, source, None, 1 << 24):
                pass
            import fcntl

            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
            return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)  # a file open for writing is not executed
        finally:
            os.close(copy)
    except OSError:
        return NATIVE
    finally:
        os.close(source)


def native(arguments: list[str]) -> int:
    """Run a verb of the native half, and wait; returns its exit status."""
    sys.stdout.flush()
    pid = os.posix_spawn(NATIVE, ["agentrun-oci", *arguments], dict(os.environ))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
