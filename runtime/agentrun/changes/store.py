"""Change sets on disk: one directory each, there until it is applied or discarded.

::

    changes/            0700: what tools made lies in here, under the owners that it would have in the workspace
      lock              held while a change set is begun, and while what killed ones have left is removed
      <id>/
        upper/ work/    overlay's; ``work`` goes when the call has ended
        lock            held by the daemon while the call runs, by whoever applies or discards it
        manifest        a ``ChangeSet``; renamed into place, so what has one is whole
        applying        its applying was begun

A directory without a manifest that nobody has locked is of somebody who was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from agentrun.changes.beneath import DIRECTORY
from agentrun.changes.check import find_damage
from agentrun.changes.model import ChangeSet, decode
from agentrun.errors import HostError, UsageError
from agentrun.image.locks import exclusive, sync_directory
from agentrun.tomltext import show_path

_SHORTEST: Final = 4
"""Letters of an id that may stand for it."""


def default_root(env: Mapping[str, str] | None = None) -> Path:
    """Where the store is: ``$AGENTRUN_CHANGES``, the machine's, or for who is not root his own.

    Raises:
        UsageError: there is no such place.
    """
    variables = os.environ if env is None else env
    if given := variables.get("AGENTRUN_CHANGES"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/agentrun/changes")
    data = variables.get("XDG_DATA_HOME") or (f"{home}/.local/share" if (home := variables.get("HOME")) else "")
    if not data.startswith("/"):
        raise UsageError("change store: there is no home directory for it; set AGENTRUN_CHANGES")
    return Path(data, "agentrun/changes")


class Opened(msgspec.Struct):
    """A change set to read, or with a lock to apply; close it."""

    changes: ChangeSet
    upper: int
    """A descriptor of the directory with the new files."""
    lock: int = -1

    def close(self) -> None:
        """Give back what is held."""
        for fd in (self.upper, self.lock):
            if fd >= 0:
                os.close(fd)
        self.upper = self.lock = -1


class Store:
    """The change sets of one machine. A ``uid`` that is given is that of who asks: root is told of everybody's."""

    def __init__(self, root: Path | None = None) -> None:
        """Make the directory if it is missing.

        Raises:
            HostError: it cannot be made, or is not ours alone.
        """
        self.root = default_root() if root is None else root
        try:
            self.root.mkdir(0o700, parents=True, exist_ok=True)
            found = self.root.stat()
            if found.st_uid != os.geteuid():
                raise HostError(f"change store {self.root}: belongs to user {found.st_uid}; set AGENTRUN_CHANGES")
            if found.st_mode & 0o077:
                self.root.chmod(0o700)
        except OSError as error:
            raise HostError(f"change store {self.root}: {error.strerror} ({error.filename}); set AGENTRUN_CHANGES") from error

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Be the only one that begins a change set, or clears up."""
        return exclusive(self.root / "lock")

    def begin(self) -> tuple[str, Path, int]:
        """A new change set's id, directory and lock.

        Raises:
            OSError: it cannot be made.
        """
        with self.locked():
            name = secrets.token_hex(6)
            path = self.root / name
            path.mkdir(0o700)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return name, path, lock

    def ids(self) -> list[str]:
        """Every change set that is whole."""
        return sorted(path.parent.name for path in self.root.glob("*/manifest"))

    def every(self, uid: int = 0) -> list[ChangeSet]:
        """Those of a user, oldest first; of a damaged one only root is told, by ``verify``."""
        found = []
        for name in self.ids():
            with contextlib.suppress(HostError, UsageError):
                found.append(self.read(name, uid))
        return sorted(found, key=lambda changes: changes.created)

    def resolve(self, name: str, uid: int = 0) -> str:
        """An id that was given whole, or by its first letters.

        Raises:
            UsageError: there is none, or several, or it is another user's, which is no different from none.
        """
        known = [known for known in self.ids() if known == name or (len(name) >= _SHORTEST and known.startswith(name))]
        mine = [found for found in known if uid == 0 or self._owner(found) == uid]
        if len(mine) != 1:
            several = f"{name!r} is the beginning of {len(mine)} ids"
            raise UsageError(f"change set: {several if mine else f'there is none {name!r}'}")
        return mine[0]

    def _owner(self, name: str) -> int | None:
        try:
            return self._decode(name).uid
        except (OSError, msgspec.MsgspecError):
            return None

    def _decode(self, name: str) -> ChangeSet:
        return decode((self.root / name / "manifest").read_bytes())

    def read(self, name: str, uid: int = 0) -> ChangeSet:
        """One change set.

        Raises:
            UsageError: there is none, or it is another user's.
            HostError: it is damaged.
        """
        try:
            changes = self._decode(name)
        except FileNotFoundError:
            raise UsageError(f"change set: there is none {name!r}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(f"change set {name}: its manifest is damaged: {error}") from error
        if uid not in (0, changes.uid):
            raise UsageError(f"change set: there is none {name!r}")
        return changes

    def open(self, name: str, uid: int = 0, *, take: bool = False) -> Opened:
        """A change set, to be read; or to be applied, which nobody else may then.

        Raises:
            UsageError: there is none, it is another user's, or somebody is at work on it.
            HostError: it is damaged.
        """
        name = self.resolve(name, uid)
        path = self.root / name
        opened = Opened(self.read(name, uid), -1)
        try:
            if take:
                opened.lock = self._lock(name)
                self.read(name, uid)  # it may have gone before it was ours
            opened.upper = os.open(path / "upper", DIRECTORY)
        except OSError as error:
            opened.close()
            raise HostError(f"change set {name}: {error.strerror} ({error.filename})") from error
        except BaseException:
            opened.close()
            raise
        return opened

    def _lock(self, name: str) -> int:
        lock = os.open(self.root / name / "lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UsageError(f"change set {name}: it is being applied or discarded") from None
        return lock

    def begin_applying(self, name: str, uid: int = 0) -> str:
        """Remember that from now on some of it may have been applied; its id. For whoever has taken it.

        Raises:
            UsageError: there is none, or it is another user's.
            HostError: there is no room for that.
        """
        name = self.resolve(name, uid)
        try:
            os.close(os.open(self.root / name / "applying", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            sync_directory(self.root / name)
        except OSError as error:
            raise HostError(f"change set {name}: {error.strerror} ({error.filename})") from error
        return name

    def begun(self, name: str) -> bool:
        """Its applying was begun, and perhaps not finished."""
        return (self.root / name / "applying").exists()

    def discard(self, name: str, uid: int = 0, *, force: bool = False) -> str:
        """Remove a change set; its id.

        Args:
            force: though its applying was begun.

        Raises:
            UsageError: there is none, it is another user's, somebody is at work on it, or its applying was begun.
        """
        name = self.resolve(name, uid)
        if not force and self.begun(name):
            raise UsageError(f"change set {name}: its applying was begun; apply it again to finish, or discard it with --force")
        try:
            lock = self._lock(name)
        except FileNotFoundError:
            raise UsageError(f"change set: there is none {name!r}") from None
        try:
            self.remove(self.root / name)
        finally:
            os.close(lock)
        return name

    def remove(self, path: Path) -> None:
        """Remove what is ours alone. Without its manifest it is nothing any more, however far we come."""
        try:
            with contextlib.suppress(FileNotFoundError):
                (path / "manifest").unlink()
                sync_directory(path)
            remove_deep(path)
        except OSError as error:
            raise HostError(f"change store: removing {path}: {error.strerror} ({error.filename})") from error

    def sweep(self) -> None:
        """Remove what those who were killed have left."""
        with self.locked():
            for path in self.root.iterdir():
                if not path.is_dir() or (path / "manifest").exists():
                    continue
                try:
                    lock = self._lock(path.name)
                except UsageError:
                    continue
                except FileNotFoundError:  # not even that: who began it had the store locked, and so have we
                    lock = -1
                try:
                    self.remove(path)
                finally:
                    if lock >= 0:
                        os.close(lock)

    def verify(self) -> Iterator[tuple[str, str]]:
        """What is wrong: a change set, and the first entry of it that is not as its manifest says."""
        for name in self.ids():
            try:
                opened = self.open(name)
            except HostError as error:
                yield name, str(error)
                continue
            try:
                if (problem := find_damage(opened.changes.changes, [opened.upper])) is not None:
                    yield name, problem
            finally:
                opened.close()


def remove_deep(path: Path) -> None:
    """Remove a directory however deep it is: what is in it is moved to the top before it is emptied."""
    top = os.open(path, DIRECTORY)
    try:
        while names := os.listdir(top):
            for name in names:
                _remove(top, name)
    finally:
        os.close(top)
    path.rmdir()


def _remove(top: int, name: str) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=top)
        return
    fd = os.open(name, DIRECTORY, dir_fd=top)
    try:
        for inner in os.listdir(fd):
            if stat.S_ISDIR(os.stat(inner, dir_fd=fd, follow_symlinks=False).st_mode):
                os.rename(inner, secrets.token_hex(12), src_dir_fd=fd, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=top)


def check_text(path: str) -> str:
    """A workspace's path, where it is to be written down.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"workspace {show_path(path)}: its path is not UTF-8, which changes are not kept for") from None
    return path
