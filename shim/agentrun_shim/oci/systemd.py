"""Cgroups that systemd makes: a transient scope for each container, by D-Bus, said directly to the manager.

The few messages that are needed are written here: D-Bus specification, "Message Protocol" and "Authentication Protocol";
org.freedesktop.systemd1(5). The manager's private socket is asked first: it needs no bus.

A scope is made around a process that is there already. A placeholder is that process; it moves on into the container's first
leaf, so that the scope itself is free to give controllers to those below, and ends when the container's own process is born.
"""

from __future__ import annotations

import os
import time
from struct import pack, unpack_from

from agentrun_shim.oci import cgroup
from agentrun_shim.oci.errors import OciError, strerror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Property = tuple[str, str, Any]
    """Its name, its D-Bus type (s, b, t, u or au), its value."""

_PATH, _MANAGER = "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
_PATIENCE = 30.0
_INFINITY = 2**64 - 1


class Writer:
    """A D-Bus message body: values at their alignment, from the start of the message."""

    def __init__(self) -> None:
        self.data = bytearray()

    def align(self, size: int) -> None:
        """Fill up to a multiple of ``size``."""
        self.data += bytes(-len(self.data) % size)

    def u32(self, value: int) -> None:
        """An unsigned number, or a boolean."""
        self.align(4)
        self.data += pack("<I", value)

    def u64(self, value: int) -> None:
        """A long unsigned number."""
        self.align(8)
        self.data += pack("<Q", value)

    def string(self, text: str) -> None:
        """A string or an object path."""
        raw = text.encode()
        self.u32(len(raw))
        self.data += raw + b"\0"

    def signature(self, text: str) -> None:
        """A type, which has a short length of its own."""
        self.data += bytes([len(text)]) + text.encode() + b"\0"

    def value(self, kind: str, value: Any) -> None:
        """One value of a type we need."""
        if kind in ("s", "o"):
            self.string(value)
        elif kind in ("u", "b"):
            self.u32(int(value))
        elif kind == "t":
            self.u64(value)
        elif kind == "g":
            self.signature(value)
        else:  # au
            self.u32(4 * len(value))
            for one in value:
                self.u32(one)

    def properties(self, properties: list[Property]) -> None:
        """An array of (name, variant)."""
        self.u32(0)
        at = len(self.data)
        self.align(8)
        first = len(self.data)
        for name, kind, value in properties:
            self.align(8)
            self.string(name)
            self.signature(kind)
            self.value(kind, value)
        self.data[at - 4 : at] = pack("<I", len(self.data) - first)


def message(serial: int, member: str, types: str, body: bytes, *, interface: str, path: str, destination: str) -> bytes:
    """A method call."""
    head = Writer()
    head.data += pack("<BBBBII", ord("l"), 1, 0, 1, len(body), serial)
    fields = [(1, "o", path), (2, "s", interface), (3, "s", member), *([(6, "s", destination)] if destination else [])]
    fields += [(8, "g", types)] if types else []
    head.u32(0)
    start = len(head.data)
    for code, kind, value in fields:
        head.align(8)
        head.data += bytes([code])
        head.signature(kind)
        head.value(kind, value)
    head.data[start - 4 : start] = pack("<I", len(head.data) - start)
    head.align(8)
    return bytes(head.data) + body


def reply_of(head: bytes) -> tuple[int, int, str]:
    """Type, serial of the call it answers, and the error's name, from a message's header."""
    kind, end, at = head[1], 16 + unpack_from("<I", head, 12)[0], 16
    serial, error = 0, ""
    while at < end:
        at += -at % 8
        if at >= end:
            break
        code, length = head[at], head[at + 1]
        types = head[at + 2 : at + 2 + length]
        at += 3 + length
        if types == b"g":
            at += 2 + head[at]
            continue
        at += -at % 4
        (number,) = unpack_from("<I", head, at)
        at += 4
        if types == b"u":
            serial = number if code == 5 else serial
            continue
        if code == 4:
            error = head[at : at + number].decode()
        at += number + 1
    return kind, serial, error


class Manager:
    """A connection to systemd's manager, of the system or of a user."""

    def __init__(self, *, rootless: bool) -> None:
        """Connect and say who we are.

        Raises:
            OciError: no manager answers.
        """
        import _socket

        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        places = [(f"{runtime}/systemd/private", False), (f"{runtime}/bus", True)] if rootless else []
        places += [] if rootless else [("/run/systemd/private", False), ("/run/dbus/system_bus_socket", True)]
        self.serial = 0
        self.bus = False
        problem = "no socket of its manager"
        for path, bus in places:
            self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
            self.socket.settimeout(_PATIENCE)
            try:
                self.socket.connect(path)
                self._hello(bus)
            except OSError as error:
                problem = f"{path}: {strerror(error)}"
                self.socket.close()
                continue
            return
        raise OciError(f"--systemd-cgroup: systemd cannot be reached: {problem} (--cgroup-manager cgroupfs does without)")

    def _hello(self, bus: bool) -> None:
        # In one go: a BEGIN that arrives with the first message may leave systemd waiting for more.
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(_outer_uid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
        answer = b""
        while not answer.endswith(b"\r\n"):
            more = self.socket.recv(256)
            if not more:
                break
            answer += more
        if not answer.startswith(b"OK"):
            raise OSError(13, "refused")
        self.bus = bus
        if bus:
            self.call(
                "Hello",
                "",
                b"",
                interface="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                destination="org.freedesktop.DBus",
            )

    def call(
        self, member: str, types: str, body: bytes, *, interface: str = _MANAGER, path: str = _PATH,
        destination: str = "org.freedesktop.systemd1",
    ) -> None:  # fmt: skip
        """Call a method and wait for its answer, which nobody reads.

        Raises:
            OciError: it was refused.
        """
        self.serial += 1
        try:
            self.socket.sendall(
                message(
                    self.serial, member, types, body, interface=interface, path=path, destination=destination if self.bus else ""
                )
            )
            while True:
                head = self._read(16)
                length, fields = unpack_from("<I", head, 4)[0], unpack_from("<I", head, 12)[0]
                head += self._read(fields + -fields % 8)
                body = self._read(length)
                kind, serial, error = reply_of(head)
                if serial != self.serial or kind not in (2, 3):
                    continue  # a signal
                if kind == 3:
                    text = body[4 : 4 + unpack_from("<I", body)[0]].decode(errors="replace") if len(body) > 4 else ""
                    raise OciError(f"systemd: {member}: {error}: {text}")
                return
        except OSError as error_:
            raise OciError(f"systemd: {member}: {strerror(error_)}") from None

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise OSError(104, "the connection ended")
            data += more
        return data

    def start_scope(self, name: str, properties: list[Property]) -> None:
        """StartTransientUnit."""
        body = Writer()
        body.string(name)
        body.string("replace")
        body.properties(properties)
        body.u32(0)  # no auxiliary units
        body.align(8)
        self.call("StartTransientUnit", "ssa(sv)a(sa(sv))", bytes(body.data))

    def set_properties(self, name: str, properties: list[Property]) -> None:
        """SetUnitProperties, until the next boot."""
        body = Writer()
        body.string(name)
        body.u32(1)
        body.properties(properties)
        self.call("SetUnitProperties", "sba(sv)", bytes(body.data))

    def stop(self, name: str) -> None:
        """End a unit and forget that it failed; one that is gone is fine."""
        for member, mode in (("StopUnit", "replace"), ("ResetFailedUnit", "")):
            body = Writer()
            body.string(name)
            if mode:
                body.string(mode)
            try:
                self.call(member, "ss" if mode else "s", bytes(body.data))
            except OciError:
                continue


def _outer_uid() -> int:
    """Our user as the manager sees it: it may be on the other side of a user namespace."""
    own = os.geteuid()
    with open("/proc/self/uid_map", encoding="ascii") as file:
        for line in file:
            inside, outside, count = [int(word) for word in line.split()]
            if inside <= own < inside + count:
                return outside + own - inside
    return own


def scope_name(path: str, name: str) -> tuple[str, str]:
    """Slice and scope of a cgroupsPath ``slice:prefix:name``; an empty slice is system.slice."""
    parts = path.split(":") if path.count(":") == 2 else ["", "agentrun", name]
    slice_, prefix, last = parts
    return slice_ or "system.slice", f"{prefix}-{last}.scope" if prefix else f"{last}.scope"


_AS_PROPERTY = {
    "memory.max": "MemoryMax", "memory.low": "MemoryLow", "memory.high": "MemoryHigh", "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax", "cpu.weight": "CPUWeight",
}  # fmt: skip


def limits(files: list[tuple[str, str]]) -> list[Property]:
    """What systemd has to know of the limits, or it would write its own when it next looks at the scope."""
    found: list[Property] = []
    for file, text in files:
        if file in _AS_PROPERTY:
            found.append((_AS_PROPERTY[file], "t", _INFINITY if text == "max" else int(text)))
        elif file == "cpu.max":
            quota, period = text.split()
            found.append(("CPUQuotaPeriodUSec", "t", int(period)))
            found.append(("CPUQuotaPerSecUSec", "t", _INFINITY if quota == "max" else int(quota) * 1_000_000 // int(period)))
    return found


class Scope:
    """A scope that was just made, held by its placeholder until ``release``."""

    def __init__(self, slice_: str, name: str, files: list[tuple[str, str]], *, rootless: bool, description: str) -> None:
        """Make it; ``path`` is its cgroup's directory.

        Raises:
            OciError: systemd refused, or took too long.
        """
        self.name = name
        manager = Manager(rootless=rootless)
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._writer)
            for fd in (0, 1, 2):
                os.close(fd)
            os.read(reader, 1)  # until our creator lets go, or dies
            os._exit(0)
        os.close(reader)
        try:
            own: list[Property] = [
                ("Description", "s", description), ("Slice", "s", slice_), ("Delegate", "b", True),
                ("DefaultDependencies", "b", False), ("PIDs", "au", [self._pid]),
            ]  # fmt: skip
            manager.start_scope(name, own + limits(files))
            self.path = self._wait()
            os.mkdir(f"{self.path}/{cgroup.INIT}", 0o755)
            cgroup.write_raw(f"{self.path}/{cgroup.INIT}", "cgroup.procs", str(self._pid))
            cgroup.enable(self.path)
        except BaseException:
            self.release()
            manager.stop(name)
            raise

    def _wait(self) -> str:
        mount = cgroup.find_mount()
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with open(f"/proc/{self._pid}/cgroup", encoding="utf-8") as file:
                found = [line[3:].strip() for line in file if line.startswith("0::")]
            if found and found[0].endswith(f"/{self.name}"):
                below = mount[1].rstrip("/") if mount and found[0].startswith(f"{mount[1].rstrip('/')}/") else ""
                return f"{mount[0] if mount else '/sys/fs/cgroup'}{found[0][len(below) :]}"
            time.sleep(0.002)
        raise OciError(f"systemd: {self.name} was not there after {_PATIENCE:g} s")

    def release(self) -> None:
        """End the placeholder."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
            os.waitpid(self._pid, 0)
