"""Change sets as the command line gets at them: from the store for root, whose it is, and from the daemon for everybody else."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import Any, Protocol

import msgspec

from agentrun.changes.model import decode, summary
from agentrun.changes.store import Opened, Store
from agentrun.errors import HostError, UsageError

_FDS = 3


class Source(Protocol):
    """Where change sets are."""

    def summaries(self) -> list[dict[str, Any]]:
        """All that the caller may see, as summaries, oldest first."""

    def open(self, name: str, *, take: bool = False) -> Opened:
        """One of them, to look at or to apply."""

    def begin_applying(self, name: str) -> None:
        """Remember that some of it may have been applied."""

    def discard(self, name: str, *, force: bool = False) -> str:
        """Throw one away; its id."""


def find_source(path: str) -> Source:
    """The caller's way to change sets. ``path`` is the daemon's socket."""
    return _Local() if os.geteuid() == 0 else _Remote(path)


class _Local:
    def __init__(self) -> None:
        self._store = Store()
        self._store.sweep()

    def summaries(self) -> list[dict[str, Any]]:
        return [summary(changes) | {"begun": self._store.begun(changes.id)} for changes in self._store.every()]

    def open(self, name: str, *, take: bool = False) -> Opened:
        return self._store.open(name, take=take)

    def begin_applying(self, name: str) -> None:
        self._store.begin_applying(name)

    def discard(self, name: str, *, force: bool = False) -> str:
        return self._store.discard(name, force=force)


class _Remote:
    def __init__(self, path: str) -> None:
        self._path = path

    def summaries(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._ask("list")[0]["changes"]
        return rows

    def open(self, name: str, *, take: bool = False) -> Opened:
        data, fds = self._ask("take" if take else "open", name)
        try:
            if len(fds) != _FDS - (not take) or len(data["fds"]) != len(fds):
                raise HostError(f"daemon at {self._path}: {len(fds)} descriptors came with change set {name!r}")
            manifest = fds.pop(0)
            with os.fdopen(manifest, "rb") as file:
                changes = decode(file.read())
            opened = Opened(changes, fds[0], fds[1] if take else -1)
            fds.clear()
        except msgspec.MsgspecError as error:
            raise HostError(f"change set {name!r}: its manifest is damaged: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        return opened

    def begin_applying(self, name: str) -> None:
        self._ask("begin", name)

    def discard(self, name: str, *, force: bool = False) -> str:
        return str(self._ask("discard", name, force=force)[0]["id"])

    def _ask(self, action: str, name: str = "", *, force: bool = False) -> tuple[dict[str, Any], list[int]]:
        body = msgspec.msgpack.encode({"v": 1, "op": "changes", "action": action, "id": name, "force": force})
        fds: list[int] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(self._path)
                sock.sendall(struct.pack("<I", len(body)) + body)
                answer = msgspec.msgpack.decode(_receive(sock, fds))
            except (OSError, EOFError, msgspec.MsgspecError) as error:
                for fd in fds:
                    os.close(fd)
                reason = error.strerror if isinstance(error, OSError) else "it closed the connection"
                raise HostError(f"no daemon at {self._path}: {reason}; the change sets of who is not root are there") from error
        if answer["op"] == "error":
            raise (UsageError if answer["exit"] == UsageError.exit_code else HostError)(answer["message"])
        return answer["data"], fds


def _receive(sock: socket.socket, fds: list[int]) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + struct.unpack_from("<I", data)[0]:
        chunk, ancillary, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(4 * _FDS), socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % 4])
                fds += numbers
        if not chunk:
            raise EOFError
        data += chunk
    return data[4:]
