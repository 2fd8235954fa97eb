"""What survives the daemon of the containers it controls: one file each, beside the socket. Hooks without a daemon write one."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agentrun_shim.hook_static import record_directory, record_name

_log = logging.getLogger("agentrun")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What survives the daemon."""

    id: str
    bundle: str
    cgroup: str
    inode: int
    policy: str
    tenant: str
    hint: str | None
    fail: str
    uid: int
    found: dict[str, str | None]
    """What its control files said before the policy."""
    frozen: bool = False
    """By us: whom its engine has paused nobody wakes."""


class Records:
    """The directory of them. It is root's alone, or it is not used."""

    def __init__(self, socket: str) -> None:
        """``socket`` is the daemon's."""
        self._directory = Path(record_directory(socket))

    def _is_ours(self, *, make: bool = False) -> bool:
        """It is there, and nobody else can put anything into it."""
        try:
            if make:
                self._directory.mkdir(mode=0o700, exist_ok=True)
            found = self._directory.lstat()
        except OSError as error:
            if make:
                _log.warning("%s: %s; containers are forgotten when the daemon ends", self._directory, error.strerror)
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022

    def all(self) -> Iterator[Record]:
        """Every record that can be read; what cannot is logged and left."""
        if not self._is_ours():
            return
        for path in sorted(self._directory.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Record)
            except (OSError, msgspec.MsgspecError) as error:
                _log.warning("%s: not a record of a container: %s", path, error)

    def find(self, name: str, bundle: str, inode: int) -> Record | None:
        """The record of this very container, if it has one."""
        if not self._is_ours():
            return None
        try:
            record = msgspec.json.decode((self._directory / record_name(name, bundle)).read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None
        return record if record.inode == inode else None

    def save(self, record: Record) -> None:
        """Write one, whole or not at all; a failure is logged."""
        if not self._is_ours(make=True):
            return
        path = self._directory / record_name(record.id, record.bundle)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_bytes(msgspec.json.encode(record))
            temporary.replace(path)
        except OSError as error:
            _log.warning("%s: %s; the next daemon will not know of this container", path, error.strerror)

    def drop(self, record: Record) -> None:
        """A container is gone."""
        with contextlib.suppress(OSError):
            (self._directory / record_name(record.id, record.bundle)).unlink()

    def close(self) -> None:
        """Remove the directory, if there is nothing to remember."""
        with contextlib.suppress(OSError):
            self._directory.rmdir()
