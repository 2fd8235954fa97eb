"""What a session is made of, as it is written down."""

from __future__ import annotations

from typing import Final

import msgspec

from agentrun.changes.model import Change
from agentrun.errors import UsageError
from agentrun.overlay import MOST_LOWERS
from agentrun.tomltext import show

MOST_LAYERS: Final = 400
"""Layers of a session, above an image that has few enough."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One session as it is now."""

    id: str
    image: str
    """The id of the image below its root; ``host``: the root is the host's and read-only, only the workspace is kept."""
    workspace: str = ""
    """The directory below its workspace, which is never written to; empty: none."""
    inode: int = 0
    """Of that directory: another one at its path is not it. 0: nobody knows."""
    layers: tuple[str, ...] = ()
    """Those that do not change any more, lowest first."""
    upper: str
    """Where calls write."""
    snapshots: dict[str, tuple[str, ...]] = {}
    """By name, in the order they were made: the layers of each."""
    parent: str = ""
    """The session it was forked from."""
    caller: tuple[int, int] = (0, 0)
    """The uid and gid whose rights the workspace is used with."""
    since: int = 0
    """Nanoseconds: what was changed in the workspace's directory later than this, the session may not have seen."""
    created: float = 0.0
    """Seconds since 1970."""

    @property
    def key(self) -> str:
        """What its sandboxes are told apart by: another one after each snapshot and rollback."""
        return f"{self.id}.{self.upper}"


class Applying(msgspec.Struct, frozen=True):
    """An applying that was begun, and perhaps not finished: what has to be known to clear away what it left."""

    name: str
    """In the names that it uses: never the same twice, for units of another one are other paths."""
    layers: tuple[str, ...]
    """Topmost first: where its changes have their files. They stay for as long as this is known."""
    changes: tuple[Change, ...]


def most_layers(depth: int) -> int:
    """How many layers a session can have above an image of so many: overlay takes so many, and one is our own (imageroot)."""
    return max(0, min(MOST_LAYERS, MOST_LOWERS - 1 - depth))


def layers_of(session: Session, snapshot: str) -> tuple[str, ...]:
    """The layers of a snapshot.

    Raises:
        UsageError: there is none of that name.
    """
    if snapshot not in session.snapshots:
        known = ", ".join(session.snapshots) or "none"
        raise UsageError(f"session {session.id} has no snapshot {show(snapshot)} (known: {known})")
    return session.snapshots[snapshot]


def next_name(session: Session) -> str:
    """A name for a snapshot that there is none of yet."""
    number = len(session.snapshots) + 1
    while f"s{number}" in session.snapshots:
        number += 1
    return f"s{number}"
