"""The files of one store of sessions, and the lock for whoever changes any.

::

    sessions/<id>.json    a ``Session``
    sessions/<id>.lock    who uses it: ``holds``
    sessions/<id>.begun   an ``Applying`` that was begun, and perhaps not finished
    layers/<name>/        ``layers``
    tmp/                  what is not yet, or no longer, one of these
    lock                  held while anything is made, changed or removed

What a session is changes by the rename of one small file, so whoever is killed has changed it or has not.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agentrun.changes.draft import stamp
from agentrun.errors import HostError, UsageError
from agentrun.image import locks
from agentrun.session.model import Applying, Session
from agentrun.tomltext import show

_ID: Final = re.compile(r"[0-9a-f]{12}")


def default_root() -> Path:
    """Where sessions are: ``$AGENTRUN_SESSIONS``, or the machine's."""
    return Path(os.environ.get("AGENTRUN_SESSIONS") or "/var/lib/agentrun/sessions")


class Shelf:
    """The files of one store."""

    def __init__(self, root: Path) -> None:
        """Make the directories that are missing.

        Raises:
            HostError: they cannot be made.
        """
        self.root = root
        self.sessions, self.layers, self.tmp = (root / name for name in ("sessions", "layers", "tmp"))
        try:
            root.mkdir(0o700, parents=True, exist_ok=True)
            for directory in (self.sessions, self.layers, self.tmp):
                directory.mkdir(0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"sessions {root}: {error.strerror} ({error.filename}); set AGENTRUN_SESSIONS") from error

    @contextlib.contextmanager
    def changing(self, step: str) -> Iterator[None]:
        """Be the only one who makes, changes or removes anything: for moments. See ``holds`` for the order of locks."""
        with self.errors(step), locks.exclusive(self.root / "lock"):
            yield

    @contextlib.contextmanager
    def errors(self, step: str) -> Iterator[None]:
        """Say of what the system refuses what it was for."""
        try:
            yield
        except OSError as error:
            raise HostError(f"sessions {self.root}: {step}: {error.strerror} ({error.filename})") from error

    def lock_path(self, session_id: str) -> Path:
        """The file of a session's lock."""
        return self.sessions / f"{session_id}.lock"

    def exists(self, session_id: str) -> bool:
        """Whether there is a session of that id."""
        return self._path(session_id).exists()

    def read(self, session_id: str) -> Session:
        """One session.

        Raises:
            UsageError: there is none of that id.
            HostError: it cannot be read.
        """
        if not isinstance(session_id, str) or not _ID.fullmatch(session_id):
            raise UsageError(f"session: {show(session_id)} is not the id of one")
        path = self._path(session_id)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Session)
        except FileNotFoundError:
            raise UsageError(f"session: there is no session {session_id}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"sessions {self.root}: {path} is damaged: {error}") from error

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        found = []
        for path in self.sessions.glob("*.json"):
            with contextlib.suppress(UsageError):  # removed meanwhile
                found.append(self.read(path.stem))
        return sorted(found, key=lambda session: session.created)

    def write(self, session: Session) -> None:
        """Make a session, or replace what is known of it; within ``changing``."""
        self.lock_path(session.id).touch(0o600)
        self._write(self._path(session.id), msgspec.json.encode(session))

    def remove(self, session_id: str) -> None:
        """Remove a session's files; within ``changing``, by who has it alone."""
        self._path(session_id).unlink()
        self.write_begun(session_id, None)
        self.lock_path(session_id).unlink(missing_ok=True)
        locks.sync_directory(self.sessions)

    def read_begun(self, session_id: str) -> Applying | None:
        """The applying that was begun for a session.

        Raises:
            HostError: what is known of it cannot be read.
        """
        path = self._begun_path(session_id)
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Applying)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"sessions {self.root}: {path} is damaged: {error}") from error

    def write_begun(self, session_id: str, begun: Applying | None) -> None:
        """Remember an applying before it touches anything; None: it is over. Within ``changing``, by who has it alone."""
        if begun is None:
            self._begun_path(session_id).unlink(missing_ok=True)
        else:
            self._write(self._begun_path(session_id), msgspec.msgpack.encode(begun))

    def sweep(self) -> None:
        """Remove the files of sessions that never were, or are no more: of who was killed. Within ``changing``."""
        for path in self.tmp.iterdir():
            if path.is_file():
                path.unlink()
        for path in self.sessions.iterdir():
            if path.suffix in (".lock", ".begun") and not self.exists(path.stem):
                path.unlink()

    def stamp(self) -> int:
        """A moment in the time that files are stamped with."""
        fd = os.open(self.tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return stamp(fd)
        finally:
            os.close(fd)

    def _path(self, session_id: str) -> Path:
        return self.sessions / f"{session_id}.json"

    def _begun_path(self, session_id: str) -> Path:
        return self.sessions / f"{session_id}.begun"

    def _write(self, path: Path, data: bytes) -> None:
        new = self.tmp / path.name
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        new.rename(path)
        locks.sync_directory(path.parent)
