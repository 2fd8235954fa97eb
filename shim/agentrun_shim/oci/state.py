"""What is kept of a container: a directory below the root with a few small files. ``shim/native/oci_verbs.c`` reads them too.

record       lines ``key value``; renamed into place. Whoever finds it can remove everything it names
head         the state's JSON but for pid, status and the closing brace
config.json  as it was when the container was made
filter       its seccomp program, for exec
about        its plan in words, a line for each operation: which one failed, for ``start``
start        the socket of a container that waits for ``start``
execs        what execs have used whose leaves are gone
notify/      the socket by which it says that it is ready
"""

from __future__ import annotations

import fcntl
import os

from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.jsontext import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LONGEST = 255
"""NAME_MAX: it is a directory's name. What begins with a dot, below the root, is not a container but ours."""
_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-")


def check_id(name: str) -> str:
    """A container's name, if it is one.

    Raises:
        OciError: it could not be the name of one directory.
    """
    if not name or not _ID.issuperset(name) or name[0] in ".-" or len(name) > _LONGEST:
        raise OciError(f"invalid container id {name!r}: letters, digits, and _ + . - are allowed, and no . or - to begin with")
    return name


class Container:
    """An open container directory. ``record`` is its record, as text by key."""

    def __init__(self, root: str, name: str, *, new: bool = False) -> None:
        """Open it, or make and lock it.

        Raises:
            OciError: it does not exist, or exists already.
        """
        self.root, self.name = root, check_id(name)
        self.path = f"{root}/{name}"
        self.record: dict[str, str] = {}
        try:
            if new:
                os.makedirs(root, 0o700, exist_ok=True)
                os.mkdir(self.path, 0o700)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileExistsError:
            raise OciError(f"container with id {name} already exists") from None
        except FileNotFoundError as error:
            if new:  # something that containers cannot be below, say /proc
                raise OciError(f"--root {root}: {strerror(error)}") from None
            raise OciError(f"container {name} does not exist") from None
        except OSError as error:
            raise OciError(f"{self.path}: {strerror(error)}") from None
        if new:
            self.lock()
        else:
            self.load()

    def lock(self) -> None:
        """Keep others from changing it until we end. Whoever is killed holds nothing."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Let others."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def load(self) -> None:
        """Read the record; none is there if its maker died at once."""
        try:
            text = self.read("record").decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            text = ""
        # Not splitlines(), to which \r and others end a line as well: a program's name, which is in it, may have those.
        self.record = dict([line.partition(" ")[::2] for line in text.split("\n") if line])

    def save(self, **changes: object) -> None:
        """Change the record; a value of None removes the key."""
        for key, value in changes.items():
            if value is None:
                self.record.pop(key, None)
            else:
                self.record[key] = str(value)
        for key, text in self.record.items():
            if "\n" in text:  # the rest would be a line of its own, and name something else that `delete` ends
                raise OciError(f"{key}: {text!r} has a line break in it")
        self.write(
            "record", "".join([f"{key} {value}\n" for key, value in self.record.items()]).encode("utf-8", "surrogateescape")
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file of it."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return os.read(fd, os.fstat(fd).st_size + 1)
        finally:
            os.close(fd)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of it, whole or not at all."""
        fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        os.rename(f"{name}.new", name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def config(self) -> dict[str, Any]:
        """The configuration it was made with."""
        try:
            value: dict[str, Any] = loads(self.read("config.json"), "config.json")
        except FileNotFoundError:
            raise OciError(f"container {self.name} does not exist") from None
        return value

    def head(self) -> str:
        """The beginning of its state."""
        try:
            return self.read("head").decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            raise OciError(f"container {self.name} does not exist") from None

    @property
    def pid(self) -> int:
        """Its first process, 0 before there is one."""
        return int(self.record.get("pid", "0"))

    def alive(self) -> bool:
        """Whether its first process lives."""
        return self.pid != 0 and start_time(self.pid) == int(self.record.get("started", "0"))

    def status(self) -> str:
        """creating, created, running, paused or stopped: the kernel says which."""
        if not self.pid:
            return "creating"
        if not self.alive():
            return "stopped"
        if self.waits():
            return "created"
        try:
            with open(f"{self.record['cgroup']}/cgroup.freeze", "rb") as file:
                return "paused" if file.read(1) == b"1" else "running"
        except (KeyError, OSError):
            return "running"

    def waits(self) -> bool:
        """Whether its first process still waits for ``start``."""
        import _socket

        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
        probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            os.fchdir(self.fd)
            probe.connect("start")
        except BlockingIOError:
            return True
        except OSError:
            return False
        else:
            return True
        finally:
            probe.close()
            os.fchdir(before)
            os.close(before)

    def must_run(self, *allowed: str) -> None:
        """Raise OciError unless its status is one of these."""
        status = self.status()
        if status not in allowed:
            why = "container not running" if status == "stopped" else f"it is {status}"
            raise OciError(f"container {self.name}: {why}")

    def state(self, status: str, pid: int) -> str:
        """The state as JSON."""
        return f'{self.head()},"pid":{pid},"status":{dumps(status)}}}'

    def close(self) -> None:
        """Let go of the directory and its lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot (field 22 of proc_pid_stat(5)); -1 if it has ended."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fields = os.read(fd, 1024).rpartition(b")")[2].split()
    except OSError:
        return -1
    finally:
        os.close(fd)
    return -1 if not fields or fields[0] in (b"Z", b"X") else int(fields[19])
