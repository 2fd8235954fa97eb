"""What is done with sessions: create, snapshot, fork, roll back, remove, prune; and holding one while it is used.

::

    session = store.get("5f1c…")
    fd, mounted = store.hold(session.key, mounted)      # shared with other calls; until it is closed nobody changes the session
    store.layer(session.upper)        # root/upper root/work workspace/upper workspace/work

Each takes the session alone where it changes it (``holds``), and then, for the moment of the change, the store (``shelf``).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from agentrun.errors import UsageError
from agentrun.image.store import Store
from agentrun.policy import HOST
from agentrun.session import holds
from agentrun.session.directory import find_workspace
from agentrun.session.images import KeptImages
from agentrun.session.layers import Layers, remove_all
from agentrun.session.model import Applying, Session, layers_of, most_layers, next_name
from agentrun.session.shelf import Shelf, default_root
from agentrun.tomltext import show

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Sessions:
    """One store of sessions. Any number of processes may use it at once."""

    def __init__(self, root: Path | None = None, images: Store | None = None) -> None:
        """Open it; it is made if it is not there.

        Raises:
            HostError: it cannot be made.
        """
        self.root = root or default_root()
        self._shelf = Shelf(self.root)
        self._layers = Layers(self._shelf)
        self._images = KeptImages(images)

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
        path, inode = find_workspace(workspace) if workspace else ("", 0)
        with self._shelf.changing("creating a session"):
            session_id = secrets.token_hex(6)
            image = self._images.keep(image, session_id)
            caller = os.geteuid(), os.getegid()
            session = Session(
                id=session_id, image=image, workspace=path, inode=inode, upper="", caller=caller, created=time.time()
            )
            session = replace(session, upper=self._layers.make(session), since=self._shelf.stamp())
            self._shelf.write(session)
        return session

    def get(self, session_id: str) -> Session:
        """One session.

        Raises:
            UsageError: there is none of that id.
            HostError: it cannot be read.
        """
        return self._shelf.read(session_id)

    def exists(self, session_id: str) -> bool:
        """Whether there is a session of that id."""
        return self._shelf.exists(session_id)

    def all(self) -> list[Session]:
        """Every session, oldest first."""
        return self._shelf.all()

    def layer(self, name: str) -> Path:
        """A layer's directory."""
        return self._layers.path(name)

    def hold(self, key: str, mounted: str = "") -> tuple[int, str]:
        """Keep a session as it is, with this key, until the descriptor that is returned is closed: ``holds.share``.

        Raises:
            Busy: others hold it who have it mounted otherwise, or somebody has it alone.
            UsageError: there is no such session, or it was changed since somebody asked for its key.
        """
        session_id = key.partition(".")[0]
        self.get(session_id)
        fd, mounted = holds.share(self._shelf.lock_path(session_id), session_id, mounted)
        try:
            if self.get(session_id).key != key:
                raise UsageError(f"session {session_id} was changed while a call waited for its turn; try again")
        except BaseException:
            os.close(fd)
            raise
        return fd, mounted

    @contextlib.contextmanager
    def alone(self, session_id: str, step: str = "looking at") -> Iterator[Session]:
        """A session for the length of a block, however long, in which no call runs in it, and nobody changes it.

        What others need is not held: they make, change and remove other sessions meanwhile, and fork snapshots of this one.

        Args:
            step: what it is for, where the system refuses something.

        Raises:
            UsageError: there is none, calls run in it, or somebody else has it alone.
        """
        self.get(session_id)
        with self._shelf.errors(f"{step} session {session_id}"), holds.alone(self._shelf.lock_path(session_id), session_id):
            yield self.get(session_id)

    def snapshot(self, session_id: str, name: str = "") -> tuple[Session, str]:
        """Remember a session as it is now; the session, and what the snapshot is called.

        Raises:
            UsageError: calls run in it, the name is taken or none, or it has too many layers.
        """
        with self._changing(session_id) as session:
            name = name or next_name(session)
            if not _NAME.fullmatch(name):
                raise UsageError(f"session: {show(name)} is not a name for a snapshot (letters, digits, . _ -; at most 63)")
            if name in session.snapshots:
                raise UsageError(f"session {session_id} has a snapshot {name} already")
            session = self._freeze(session)
            session = replace(session, snapshots={**session.snapshots, name: session.layers})
            self._shelf.write(session)
        return session, name

    def fork(self, session_id: str, snapshot: str = "") -> Session:
        """Another session that begins as this one is now, or as it was at a snapshot.

        Raises:
            UsageError: there is no such session or snapshot; or calls run in it, and no snapshot was named.
        """
        if snapshot:  # which does not change, whatever else the session does
            with self._shelf.changing(f"forking session {session_id}"):
                session = self.get(session_id)
                return self._fork(session, layers_of(session, snapshot))
        with self._changing(session_id) as session:
            session = self._freeze(session)
            self._shelf.write(session)
            return self._fork(session, session.layers)

    def rollback(self, session_id: str, snapshot: str = "") -> Session:
        """Have a session as it was at a snapshot, or at the last one; without any, as it was made. Later snapshots stay.

        What was written since is gone for good; its files are there until ``prune``, which takes longer the more there are.

        Raises:
            UsageError: there is no such session or snapshot, or calls run in it.
        """
        with self._changing(session_id) as session:
            layers = layers_of(session, snapshot) if snapshot else next(reversed(session.snapshots.values()), ())
            session = replace(session, layers=layers)
            session = replace(session, upper=self._layers.make(session))
            self._shelf.write(session)
        return session

    def begin_applying(self, session: Session, begun: Applying) -> None:
        """Remember, within ``alone``, that from now on something may be left beside what is applied."""
        with self._shelf.changing(f"applying session {session.id}"):
            self._shelf.write_begun(session.id, begun)

    def begun(self, session: Session) -> Applying | None:
        """The applying that was begun, and perhaps not finished."""
        return self._shelf.read_begun(session.id)

    def end_applying(self, session: Session, *, complete: bool) -> None:
        """Nothing is left beside what was applied.

        Args:
            complete: the directory is now what the workspace is: what changes in it from now on is somebody's doing.
        """
        with self._shelf.changing(f"applying session {session.id}"):
            if complete:
                self._shelf.write(replace(session, since=self._shelf.stamp()))
            self._shelf.write_begun(session.id, None)

    def remove(self, session_id: str) -> None:
        """Remove a session; what others need of it stays, and the files of what nobody does until ``prune``.

        Raises:
            UsageError: there is no such session, or calls run in it.
        """
        with self._changing(session_id) as session:
            self._shelf.remove(session_id)
            self._images.let_go(session.image, session_id)  # last: see there

    def prune(self) -> int:
        """Remove layers that no session needs, and what those who were killed have left; how many layers there were."""
        with self._shelf.changing("pruning"):
            needed: set[str] = set()
            sessions = self.all()
            self._images.keep_only({session.id for session in sessions})
            for session in sessions:
                needed |= {*session.layers, session.upper, *(name for below in session.snapshots.values() for name in below)}
                needed |= set(begun.layers if (begun := self._shelf.read_begun(session.id)) else ())
            gone = self._layers.take_out(needed)
            self._shelf.sweep()
            left = self._layers.left()
        remove_all(left)
        return gone

    @contextlib.contextmanager
    def _changing(self, session_id: str) -> Iterator[Session]:
        """A session to be changed: ``alone``, and only then the store, which nobody else has to wait for while calls end."""
        with self.alone(session_id, "changing") as session, self._shelf.changing(f"changing session {session_id}"):
            yield session

    def _fork(self, source: Session, layers: tuple[str, ...]) -> Session:
        fork_id = secrets.token_hex(6)
        self._images.keep(source.image, fork_id)
        kept = {name: below for name, below in source.snapshots.items() if below == layers[: len(below)]}
        fork = replace(source, id=fork_id, layers=layers, snapshots=kept, parent=source.id, created=time.time())
        fork = replace(fork, upper=self._layers.make(fork))
        self._shelf.write(fork)
        return fork

    def _freeze(self, session: Session) -> Session:
        """The session with an empty layer on top; as it is, if that is empty already."""
        if self._layers.is_empty(session.upper):
            return session
        depth = self._images.depth(session.image)
        if len(session.layers) >= (most := most_layers(depth)):
            there = f"{len(session.layers)} layers" + (f" above the {depth} of its image" if depth else "")
            raise UsageError(f"session {session.id} has {there}, and {most} is as many as there may be")
        session = replace(session, layers=(*session.layers, session.upper))
        return replace(session, upper=self._layers.make(session))
