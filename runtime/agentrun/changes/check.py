"""Whether a directory still is what the changes were made to, and what of them is in it already.

Applying looks twice: before anything is touched, at every unit, and again at each unit when it is replaced.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Iterator, Sequence

import msgspec

from agentrun.changes.beneath import ESCAPES, NOT_THERE, look, open_beneath, split, walk
from agentrun.changes.model import Change
from agentrun.changes.nodes import Node, Seen, kind_name, kind_of, read_target, read_xattrs, same_content, seen
from agentrun.changes.units import Unit


class Conflict(msgspec.Struct, frozen=True):
    """A path that is not as it was when the call ran; nothing of it has been overwritten."""

    path: bytes
    reason: str


class State(enum.Enum):
    """Of a unit."""

    TODO = "the original is there"
    DONE = "what was to be is there"
    CONFLICT = "something else is there"


Verdict = tuple[State, list[Conflict]]


def check(unit: Unit, layers: Sequence[int], root: int, *, force: bool = False) -> Verdict:
    """What there is below ``root`` where a unit goes.

    Args:
        force: files may have been changed, or be new or gone. A directory that has something in it which is not known is
            still a conflict: forcing overwrites files one is told of, and removes nothing that one is not.
    """
    try:
        if unit.attributes:
            return _check_attributes(unit, root, force=force)
        return _check_entry(unit, layers, root, force=force)
    except OSError as error:
        if error.errno not in ESCAPES:
            raise
        what = "a link is on the way there now" if error.errno == ESCAPES[0] else "is on another file system"
        return State.CONFLICT, [Conflict(unit.path, what)]


def _check_attributes(unit: Unit, root: int, *, force: bool) -> Verdict:
    new, old, found = unit.new, unit.old[unit.path], look(root, unit.path)
    assert new is not None
    if found is None:
        return State.CONFLICT, [Conflict(unit.path, "is gone")]
    now = seen(found)
    if now.kind != "d" or (now.inode != old.inode and not force):
        return State.CONFLICT, [Conflict(unit.path, f"is another {kind_name(now.kind)} now")]
    if (now.mode, now.uid, now.gid) == (new.mode, new.uid, new.gid) and read_xattrs(root, unit.path) == new.xattrs:
        return State.DONE, []
    # Killed in between, some of it may be new and some old.
    known = now.mode in (old.mode, new.mode) and now.uid in (old.uid, new.uid) and now.gid in (old.gid, new.gid)
    if force or (known and not unit.raced):
        return State.TODO, []
    return State.CONFLICT, [Conflict(unit.path, _RACED if known else _difference(old, now))]


def _check_entry(unit: Unit, layers: Sequence[int], root: int, *, force: bool) -> Verdict:
    found = look(root, unit.path)
    if unit.new is None:
        if found is None:
            return State.DONE, []
    else:
        if found is not None and is_new(unit, layers, root, unit.path):
            return State.DONE, []
        if not has_directory(root, split(unit.path)[0]):
            return State.CONFLICT, [Conflict(unit.path, "its directory is gone")]
        if found is None and unit.old and not force:
            return State.CONFLICT, [Conflict(unit.path, "is gone")]
        if found is not None and not unit.old and (not force or stat.S_ISDIR(found.st_mode)):
            return State.CONFLICT, [Conflict(unit.path, f"is new: there is a {kind_name(kind_of(found))} now")]
    conflicts = list(differences(unit, root, unit.path, force=force)) if unit.old else []
    if not force:
        told = {conflict.path for conflict in conflicts}
        conflicts += [Conflict(path, _RACED) for path in unit.raced if path not in told]
    return (State.CONFLICT if conflicts else State.TODO), conflicts


_RACED = "was changed while the call ran"


def differences(unit: Unit, root: int, at: bytes, *, moved: bool = False, force: bool = False) -> Iterator[Conflict]:
    """What is at ``at`` and is not what the unit found at its own path; what is missing there is no difference.

    Args:
        moved: what was at the unit's path has been renamed to ``at``.
    """
    found = look(root, at)
    if found is None:
        return
    for path, there in [(at, found), *(walk(root, at) if stat.S_ISDIR(found.st_mode) else ())]:
        original = unit.path + path[len(at) :]
        old, now = unit.old.get(original), seen(there)
        if old is None:
            yield Conflict(original, "is new")
        elif not old.same(now, moved=moved) and not (force and "d" not in (old.kind, now.kind)):
            yield Conflict(original, _difference(old, now))


def _difference(old: Seen, now: Seen) -> str:
    if old.kind != now.kind:
        return f"was a {kind_name(old.kind)} and is a {kind_name(now.kind)}"
    if old.inode != now.inode:
        return f"is another {kind_name(now.kind)} now"
    if (old.size, old.mtime) != (now.size, now.mtime):
        return "was written to"
    if old.mode != now.mode:
        return f"had mode {old.mode:04o} and has {now.mode:04o}"
    if (old.uid, old.gid) != (now.uid, now.gid):
        return f"belonged to {old.uid}:{old.gid} and belongs to {now.uid}:{now.gid}"
    return "was changed"


def is_new(unit: Unit, layers: Sequence[int], root: int, at: bytes) -> bool:
    """Whether at ``at`` there is exactly what the unit puts there."""
    found = look(root, at)
    if found is None or unit.new is None or not _same_node(unit.new, unit.path, layers, root, at, found):
        return False
    if unit.new.kind != "d":
        return True
    wanted = dict(unit.inner)
    for path, there in walk(root, at):
        original = unit.path + path[len(at) :]
        node = wanted.pop(original, None)
        if node is None or not _same_node(node, original, layers, root, path, there):
            return False
    return not wanted


def _same_node(node: Node, path: bytes, layers: Sequence[int], root: int, at: bytes, found: os.stat_result) -> bool:
    owner = (found.st_uid, found.st_gid)
    if (node.kind, node.uid, node.gid) != (kind_of(found), *owner):
        return False
    if node.kind == "l":
        return node.target == read_target(root, at)
    if node.mode != stat.S_IMODE(found.st_mode):
        return False
    if node.kind == "f" and (node.size, node.mtime) != (found.st_size, found.st_mtime_ns):
        return False
    if node.kind in "fd" and node.xattrs != read_xattrs(root, at):
        return False
    return node.kind != "f" or same_content(layers[node.layer], path, root, at)


def has_directory(root: int, path: bytes) -> bool:
    """Whether there is a directory."""
    try:
        os.close(open_beneath(root, path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise
    return True


def find_damage(changes: Sequence[Change], layers: Sequence[int]) -> str | None:
    """The first new entry that is not in its layer as it has to be; None if all are."""
    for change in changes:
        node, path = change.new, os.fsdecode(change.path) or "."
        if node is None:
            continue
        found = look(layers[node.layer], change.path)
        if found is None or kind_of(found) != node.kind:
            return f"{path} is missing"
        if node.kind == "f" and (found.st_size, found.st_mtime_ns) != (node.size, node.mtime):
            return f"{path} is not what it was when the call ended"
        if stat.S_IMODE(found.st_mode) != node.mode or (found.st_uid, found.st_gid) != (node.uid, node.gid):
            return f"{path} has another mode or owner than when the call ended"
    return None
