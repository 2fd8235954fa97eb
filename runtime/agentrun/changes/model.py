"""A change set: what a call did to a directory, entry by entry, and what the directory was like before."""

from __future__ import annotations

import base64
import stat
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from agentrun.changes.nodes import Node, Seen, kind_name

KINDS: Final = ("added", "modified", "deleted", "type", "mode", "time")
VERSION: Final = 1


class Change(msgspec.Struct, frozen=True, array_like=True):
    """One path that is not as it was."""

    path: bytes
    """Below the workspace; empty: the workspace itself."""
    kind: str
    """``added``, ``deleted``, ``type`` (another kind of thing is there), ``modified`` (content, target or extended attributes),
    ``mode`` (mode or owner, and at most the time besides), ``time`` (of a file, and nothing else).
    """
    new: Node | None = None
    old: Seen | None = None
    what: tuple[str, ...] = ()
    """Of what was there before and after: which of ``content``, ``target``, ``mode``, ``owner``, ``xattrs``, ``time`` differ."""
    raced: bool = False
    """The original was changed while the call ran, so nobody knows which state of it the tool saw."""


class ChangeSet(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a call: ``manifest`` in its directory of the store."""

    version: int = VERSION
    id: str
    workspace: str
    """Its path on the host."""
    inode: int
    """Of the workspace: another directory at that path is another workspace."""
    uid: int
    gid: int
    """The caller's: who may see, apply and discard it."""
    created: float
    """Seconds since 1970."""
    call: str
    """The call's name."""
    argv: tuple[bytes, ...]
    size: int
    """Bytes of disk that it takes."""
    changes: tuple[Change, ...]


def in_order(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Sorted so that what is in a directory comes right after it."""
    return tuple(sorted(changes, key=lambda change: change.path.split(b"/") if change.path else []))


def count(changes: Sequence[Change]) -> dict[str, int]:
    """How many there are of each kind."""
    found = dict.fromkeys(KINDS, 0)
    for change in changes:
        found[change.kind] += 1
    return found


def encode(changes: ChangeSet) -> bytes:
    """As it is stored."""
    return msgspec.msgpack.encode(changes)


def decode(data: bytes) -> ChangeSet:
    """The opposite.

    Raises:
        msgspec.MsgspecError: it is damaged, or of another version.
    """
    found = msgspec.msgpack.decode(data, type=ChangeSet)
    if found.version != VERSION:
        raise msgspec.ValidationError(f"version {found.version}, and not {VERSION}")
    return found


def summary(changes: ChangeSet) -> dict[str, Any]:
    """What a list of change sets says of one; also in JSON."""
    return {
        "id": changes.id, "workspace": changes.workspace, "uid": changes.uid, "created": changes.created, "call": changes.call,
        "argv": [argument.decode("utf-8", "replace") for argument in changes.argv], "bytes": changes.size,
        **count(changes.changes),
    }  # fmt: skip


def to_json(changes: ChangeSet) -> dict[str, Any]:
    """The whole, in JSON: docs/workspaces.md."""
    return {**summary(changes), "changes": [_change_to_json(change) for change in changes.changes]}


def path_to_json(path: bytes) -> dict[str, str]:
    """A path, and if it is not UTF-8 its exact bytes as well."""
    text = (path or b".").decode("utf-8", "replace")
    return {"path": text} if text.encode() == (path or b".") else {"path": text, "path_base64": base64.b64encode(path).decode()}


def _change_to_json(change: Change) -> dict[str, Any]:
    return {
        **path_to_json(change.path), "kind": change.kind, "what": list(change.what), "raced": change.raced,
        "old": None if change.old is None else _side(change.old), "new": None if change.new is None else _side(change.new),
    }  # fmt: skip


def _side(entry: Node | Seen) -> dict[str, Any]:
    mode = f"{stat.S_IMODE(entry.mode):04o}"
    side: dict[str, Any] = {"type": kind_name(entry.kind), "mode": mode, "uid": entry.uid, "gid": entry.gid}
    if entry.kind == "f":
        side |= {"size": entry.size, "mtime": entry.mtime / 1e9}
    if isinstance(entry, Node) and entry.kind == "l":
        side["target"] = entry.target.decode("utf-8", "replace")
    return side
