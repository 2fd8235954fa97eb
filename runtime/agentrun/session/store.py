"""Sessions on disk: ``sessions/<id>.json`` says of which layers each consists, ``layers/<id>/`` are those.

::

    session = store.get("5f1c…")
    fd, mounted = store.hold(session.key, mounted)      # shared with other calls; until it is closed nobody changes the session
    store.layer(session.upper)        # root/upper root/work workspace/upper workspace/work

What a session is changes by the rename of one small file, so whoever is killed has changed it or has not. A layer belongs to
whatever session names it; one that none does is removed by the next who changes anything. There is no count that could be wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agentrun.changes.beneath import open_plainly
from agentrun.changes.draft import dress_like, stamp
from agentrun.changes.store import check_text
from agentrun.errors import HostError, UsageError
from agentrun.image import locks
from agentrun.image.shelf import SESSION_TAG
from agentrun.image.shelf import default_root as image_root
from agentrun.image.store import Store
from agentrun.policy import HOST
from agentrun.session.model import Session, layers_of, next_name
from agentrun.tomltext import show
from agentrun.workspace import Workspace, open_directory, real_path

MOST_LAYERS: Final = 400
"""Layers of a session; overlay takes 500 (OVL_MAX_STACK), and an image has some."""
_PATIENCE: Final = 1.0
"""Seconds to wait for calls to be gone."""
_MOUNT: Final = 16
"""Letters of a mount's name."""
_ID: Final = re.compile(r"[0-9a-f]{12}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Busy(UsageError):
    """Others run in a session who have it mounted otherwise: see ``Sessions.hold``."""


class Sessions:
    """One store of sessions. Any number of processes may use it at once."""

    def __init__(self, root: Path | None = None, images: Store | None = None) -> None:
        """Open it; it is made if it is not there.

        Raises:
            HostError: it cannot be made.
        """
        self.root = root or default_root()
        self._images = images
        self._sessions, self._layers, self._tmp = (self.root / name for name in ("sessions", "layers", "tmp"))
        try:
            self.root.mkdir(0o700, parents=True, exist_ok=True)
            for directory in (self._sessions, self._layers, self._tmp):
                directory.mkdir(0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"sessions {self.root}: {error.strerror} ({error.filename}); set AGENTRUN_SESSIONS") from error

    def create(self, *, image: str = HOST, workspace: str = "") -> Session:
        """A new session.

        Args:
            image: of the store, by name or id; ``host``: only the workspace is kept.
            workspace: a directory that is the call's workspace, copy-on-write.

        Raises:
            UsageError: there is no such image or directory, or neither was asked for.
            HostError: the store cannot be written.
        """
        if image == HOST and not workspace:
            raise UsageError("session: without an image and a workspace there is nothing to keep")
        path, inode = _look_at_workspace(workspace) if workspace else ("", 0)
        with self._changing("creating a session"):
            session_id = secrets.token_hex(6)
            if image != HOST:
                image = self._keep_image(image, session_id)
            caller = os.geteuid(), os.getegid()
            session = Session(
                id=session_id, image=image, workspace=path, inode=inode, upper="", caller=caller, created=time.time()
            )
            session = msgspec.structs.replace(session, upper=self._new_layer(session), since=self._stamp())
            self._write(session)
        return session

    def get(self, session_id: str) -> Session:
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

    def exists(self, session_id: str) -> bool:
        """Whether there is a session of that id."""
        return self._path(session_id).exists()

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        found = []
        for path in self._sessions.glob("*.json"):
            with contextlib.suppress(UsageError):  # removed meanwhile
                found.append(self.get(path.stem))
        return sorted(found, key=lambda session: session.created)

    def hold(self, key: str, mounted: str = "") -> tuple[int, str]:
        """Keep a session as it is, with this key, until the descriptor that is returned is closed. Never waits.

        Two overlays must not write to one layer, and one does not see what another has written. So of a session one mount at a
        time is in use, and the lock's file says which. Who has another one becomes the next when nobody holds the session.

        Args:
            mounted: what this returned when the caller mounted it; empty: he has not.

        Returns:
            The descriptor, and the name of the mount that is in use: another one than the caller gave, if he has to mount it now.

        Raises:
            Busy: others hold it who have it mounted otherwise.
            UsageError: there is no such session, it is being changed, or was since somebody asked for its key.
        """
        session_id = key.partition(".")[0]
        self.get(session_id)
        fd = self._lock(session_id)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"session {session_id} is being changed; try again") from None
            if not mounted or os.pread(fd, _MOUNT, 0) != mounted.encode():
                mounted = _take_turn(fd, session_id)
            if self.get(session_id).key != key:
                raise UsageError(f"session {session_id} was changed while a call waited for its turn; try again")
        except BaseException:
            os.close(fd)
            raise
        return fd, mounted

    def layer(self, name: str) -> Path:
        """A layer's directory."""
        return self._layers / name

    def snapshot(self, session_id: str, name: str = "") -> tuple[Session, str]:
        """Remember a session as it is now; the session, and what the snapshot is called.

        Raises:
            UsageError: calls run in it, the name is taken or none, or it has too many layers.
        """
        with self._exclusive(session_id) as session:
            name = name or next_name(session)
            if not _NAME.fullmatch(name):
                raise UsageError(f"session: {show(name)} is not a name for a snapshot (letters, digits, . _ -; at most 63)")
            if name in session.snapshots:
                raise UsageError(f"session {session_id} has a snapshot {name} already")
            session = self._freeze(session)
            session = msgspec.structs.replace(session, snapshots={**session.snapshots, name: session.layers})
            self._write(session)
        return session, name

    def fork(self, session_id: str, snapshot: str = "") -> Session:
        """Another session that begins as this one is now, or as it was at a snapshot.

        Raises:
            UsageError: there is no such session or snapshot; or calls run in it, and no snapshot was named.
        """
        with contextlib.ExitStack() as stack:
            if snapshot:  # which does not change, whatever else the session does
                stack.enter_context(self._changing(f"forking session {session_id}"))
                source = self.get(session_id)
                layers = layers_of(source, snapshot)
            else:
                source = self._freeze(stack.enter_context(self._exclusive(session_id)))
                self._write(source)
                layers = source.layers
            fork_id = secrets.token_hex(6)
            if source.image != HOST:
                self._keep_image(source.image, fork_id)
            kept = {name: below for name, below in source.snapshots.items() if below == layers[: len(below)]}
            fork = msgspec.structs.replace(
                source, id=fork_id, layers=layers, snapshots=kept, parent=session_id, created=time.time()
            )
            fork = msgspec.structs.replace(fork, upper=self._new_layer(fork))
            self._write(fork)
        return fork

    @contextlib.contextmanager
    def alone(self, session_id: str) -> Iterator[Session]:
        """A session for the length of a block in which no call runs in it, and nobody else changes anything.

        Raises:
            UsageError: there is none, or calls run in it.
        """
        with self._exclusive(session_id) as session:
            yield session

    def mark_applied(self, session: Session) -> None:
        """The directory has been made what the workspace is, within ``alone``: what changes from now on is somebody's doing."""
        self._write(msgspec.structs.replace(session, since=self._stamp()))

    def rollback(self, session_id: str, snapshot: str = "") -> Session:
        """Have a session as it was at a snapshot, or at the last one; without any, as it was made. Later snapshots stay.

        What was written since is gone for good; its files are there until ``prune``, which takes longer the more there are.

        Raises:
            UsageError: there is no such session or snapshot, or calls run in it.
        """
        with self._exclusive(session_id) as session:
            layers = layers_of(session, snapshot) if snapshot else next(reversed(session.snapshots.values()), ())
            session = msgspec.structs.replace(session, layers=layers)
            session = msgspec.structs.replace(session, upper=self._new_layer(session))
            self._write(session)
        return session

    def remove(self, session_id: str) -> None:
        """Remove a session; what others need of it stays, and the files of what nobody does until ``prune``.

        Raises:
            UsageError: there is no such session, or calls run in it.
        """
        with self._exclusive(session_id) as session:
            self._path(session_id).unlink()
            self._lock_path(session_id).unlink(missing_ok=True)
            locks.sync_directory(self._sessions)
            if session.image != HOST:  # last: whoever is killed before leaves a name, which is taken back, and no session without
                with contextlib.suppress(UsageError):
                    self._store.remove(_tag(session_id))

    def prune(self) -> int:
        """Remove layers that no session needs, and what those who were killed have left; how many there were."""
        with self._changing("pruning"):
            needed: set[str] = set()
            sessions = self.all()
            self._let_go_of_images({_tag(session.id) for session in sessions})
            for session in sessions:
                needed |= {*session.layers, session.upper, *(name for below in session.snapshots.values() for name in below)}
            gone = [path for path in self._layers.iterdir() if path.name not in needed]
            for path in gone:
                path.rename(self._tmp / path.name)
            for path in self._tmp.glob("*.json"):
                path.unlink()
            left = list(self._tmp.iterdir())
        for path in left:
            with contextlib.suppress(FileNotFoundError):  # somebody else is at it as well
                locks.remove_tree(path)
        return len(gone)

    @property
    def _store(self) -> Store:
        if self._images is None:
            self._images = Store()
        return self._images

    def _keep_image(self, image: str, session_id: str) -> str:
        """Give the image a name for as long as there is the session, so that nobody prunes it; its id."""
        return self._store.tag(image, _tag(session_id))

    def _let_go_of_images(self, needed: set[str]) -> None:
        """Take back names that were given for sessions of which nothing came, or of which nothing is left."""
        if self._images is None and not image_root().exists():
            return
        for name in self._store.names():
            if name.startswith(SESSION_TAG) and name.removesuffix(":latest") not in needed:
                with contextlib.suppress(UsageError):
                    self._store.remove(name)

    def _freeze(self, session: Session) -> Session:
        """The session with an empty layer on top; as it is, if that is empty already."""
        upper = self.layer(session.upper)
        if not any(any((upper / part / "upper").iterdir()) for part in ("root", "workspace")):
            return session
        if len(session.layers) >= MOST_LAYERS:
            raise UsageError(f"session {session.id} has {MOST_LAYERS} layers, which is as many as there may be")
        session = msgspec.structs.replace(session, layers=(*session.layers, session.upper))
        return msgspec.structs.replace(session, upper=self._new_layer(session))

    def _new_layer(self, session: Session) -> str:
        """An empty layer to go on top of a session's. Its directories are what overlay shows the topmost of each tree as."""
        name = secrets.token_hex(8)
        new = self._tmp / name
        for part in ("root", "workspace"):
            for directory in ("upper", "work"):
                (new / part / directory).mkdir(0o755, parents=True)
        below = self.layer(session.layers[-1]) if session.layers else None
        for part in ("root", "workspace"):
            if below is not None:
                fd = os.open(below / part / "upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            elif part == "workspace" and session.workspace:
                fd = open_workspace(session)
            else:
                continue
            try:
                dress_like(new / part / "upper", fd)
            finally:
                os.close(fd)
        new.rename(self._layers / name)
        return name

    def _stamp(self) -> int:
        fd = os.open(self._tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return stamp(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _changing(self, step: str) -> Iterator[None]:
        """Be the only one who makes or removes anything."""
        try:
            with locks.exclusive(self.root / "lock"):
                yield
        except OSError as error:
            raise HostError(f"sessions {self.root}: {step}: {error.strerror} ({error.filename})") from error

    @contextlib.contextmanager
    def _exclusive(self, session_id: str) -> Iterator[Session]:
        """A session to be changed.

        Raises:
            UsageError: there is none, or calls run in it.
        """
        with self._changing(f"changing session {session_id}"):
            self.get(session_id)
            fd = self._lock(session_id)
            try:
                _wait_alone(fd, session_id)
                yield self.get(session_id)
            finally:
                os.close(fd)

    def _lock(self, session_id: str) -> int:
        try:
            return os.open(self._lock_path(session_id), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"session: there is no session {session_id}") from None

    def _path(self, session_id: str) -> Path:
        return self._sessions / f"{session_id}.json"

    def _lock_path(self, session_id: str) -> Path:
        return self._sessions / f"{session_id}.lock"

    def _write(self, session: Session) -> None:
        self._lock_path(session.id).touch(0o600)
        new = self._tmp / f"{session.id}.json"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(session))
            file.flush()
            os.fsync(fd)
        new.rename(self._path(session.id))
        locks.sync_directory(self._sessions)


def default_root() -> Path:
    """Where sessions are: ``$AGENTRUN_SESSIONS``, or the machine's."""
    return Path(os.environ.get("AGENTRUN_SESSIONS") or "/var/lib/agentrun/sessions")


def _take_turn(fd: int, session_id: str) -> str:
    """Be the one whose mount is in use, with a lock that is shared before and after; what it is called."""
    mount = secrets.token_hex(_MOUNT // 2)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(fd, mount.encode(), 0)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        mount = ""
    # Between the two kinds of lock there is a moment with none.
    if not mount or os.pread(fd, _MOUNT, 0) != mount.encode():
        raise Busy(f"session {session_id}: calls of another policy, tenant or runtime run in it; wait for them")
    return mount


def _wait_alone(fd: int, session_id: str) -> None:
    """Wait until no call holds a session. One that has just returned may still be being taken down."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UsageError(f"session {session_id}: calls run in it; wait for them, or end them") from None
        time.sleep(0.001)


def _look_at_workspace(path: str) -> tuple[str, int]:
    fd = open_directory(Workspace(path))
    try:
        return check_text(real_path(fd)), os.fstat(fd).st_ino
    finally:
        os.close(fd)


def open_workspace(session: Session) -> int:
    """An O_PATH descriptor of the directory below a session's workspace: of the one that it was made for.

    Who may rename something above it could else have a session show what its caller may read, and be applied to that.

    Raises:
        UsageError: it is gone, or something else is at its path.
    """
    try:
        fd = open_plainly(os.fsencode(session.workspace))
    except OSError as error:
        raise UsageError(f"session {session.id}: workspace {session.workspace}: {error.strerror}") from error
    if session.inode and os.fstat(fd).st_ino != session.inode:
        os.close(fd)
        raise UsageError(f"session {session.id}: workspace {session.workspace}: another directory is there now")
    return fd


def _tag(session_id: str) -> str:
    return f"{SESSION_TAG}{session_id}"
