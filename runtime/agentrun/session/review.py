"""What a session's workspace has that its directory has not: to be looked at, and applied.

That takes as long as there is much of it, so nothing is held but the session itself. Layers that others share do not change.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator, Sequence

import msgspec

from agentrun.changes.apply import Report, Step, apply, no_step
from agentrun.changes.beneath import split
from agentrun.changes.check import Conflict
from agentrun.changes.leftovers import clear
from agentrun.changes.model import Change, ChangeSet
from agentrun.changes.mount import clone_quietly
from agentrun.changes.scan import scan, size_on_disk
from agentrun.errors import HostError, UsageError
from agentrun.session.directory import open_workspace
from agentrun.session.model import Applying, Session
from agentrun.session.store import Sessions
from agentrun.tomltext import show_path


def look(store: Sessions, session_id: str) -> ChangeSet:
    """The changes of a session's workspace, all its layers together.

    Raises:
        UsageError: there is no such session, it has no workspace, or calls run in it.
        HostError: something cannot be read.
    """
    with store.alone(session_id) as session, _opened(store, session) as (changes, _, _):
        return changes


def carry_over(store: Sessions, session_id: str, *, force: bool = False, step: Step = no_step) -> tuple[ChangeSet, Report]:
    """Make the directory what the workspace is. The session stays as it is; killed, it can be done again.

    Args:
        force: overwrite files that somebody else has changed since the session was made, or last applied.
        step: told how far it is: see ``apply``.

    Raises:
        UsageError: as ``look``; or the caller has not the right to.
        HostError: something cannot be written.
    """
    with store.alone(session_id) as session:
        left = _clear(store, session)  # before the directory is looked at
        with _opened(store, session) as (changes, layers, workspace):
            if left:
                return changes, Report(conflicts=left)
            begun = Applying(f"{session.id}-{secrets.token_hex(3)}", _layer_names(session), changes.changes)
            begin = functools.partial(store.begin_applying, session, begun)
            with _finish_later(session):
                report = apply(changes.changes, layers, workspace, name=begun.name, force=force, begin=begin, step=step)
            if report.begun:
                store.end_applying(session, complete=report.complete)
    return changes, report


def _clear(store: Sessions, session: Session) -> list[Conflict]:
    """Clear away what an applying that was killed has left in the directory; what only a human can decide about.

    What is to be applied now says nothing of it: what was in its place by then is no change any more.
    """
    begun = store.begun(session)
    if begun is None:
        return []
    with contextlib.ExitStack() as stack, _finish_later(session):
        layers = _open_layers(store, begun.layers, stack)
        stack.callback(os.close, workspace := open_workspace(session))
        left = clear(begun.changes, layers, workspace, name=begun.name)
    if left:
        store.end_applying(session, complete=False)
    return left


def _forgive(changes: Sequence[Change], begun: Applying) -> tuple[Change, ...]:
    """Changes without the suspicion that an applying which was killed has cast: making names in a directory changes its time.

    So where nothing but that can be known of a path, what was known when it was begun still holds.
    """
    known = {change.path: change for change in begun.changes}
    touched = {split(path)[0] for path in known}

    def is_ours(change: Change) -> bool:
        before = known.get(change.path)
        if not change.raced or before is None or before.raced:
            return False
        if change.kind == before.kind == "added":
            return split(change.path)[0] in touched
        old, new, now = before.old, before.new, change.old
        if old is None or new is None or now is None or change.path not in touched:
            return False
        some_of_both = now.mode in (old.mode, new.mode) and now.uid in (old.uid, new.uid) and now.gid in (old.gid, new.gid)
        return (old.kind, new.kind, old.inode) == ("d", "d", now.inode) and some_of_both

    return tuple(msgspec.structs.replace(change, raced=False) if is_ours(change) else change for change in changes)


@contextlib.contextmanager
def _finish_later(session: Session) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({show_path(error.filename)})" if error.filename else ""
        raise HostError(f"session {session.id}: {error.strerror}{where}; apply it again to finish") from error


@contextlib.contextmanager
def _opened(store: Sessions, session: Session) -> Iterator[tuple[ChangeSet, list[int], int]]:
    """The changes, the layers they are in, topmost first, and the directory."""
    if not session.workspace:
        raise UsageError(f"session {session.id} has no workspace")
    with contextlib.ExitStack() as stack:
        layers = _open_layers(store, _layer_names(session), stack)
        stack.callback(os.close, workspace := open_workspace(session))
        stack.callback(os.close, base := clone_quietly(workspace))
        uid, gid = session.caller
        found, begun = scan(layers, base, since=session.since), store.begun(session)
        changes = ChangeSet(
            id=session.id,
            workspace=session.workspace,
            inode=os.fstat(base).st_ino,
            uid=uid,
            gid=gid,
            created=session.created,
            call="",
            argv=(),
            size=size_on_disk(layers),
            changes=found if begun is None else _forgive(found, begun),
        )
        yield changes, layers, workspace


def _layer_names(session: Session) -> tuple[str, ...]:
    """Topmost first."""
    return (session.upper, *session.layers[::-1])


def _open_layers(store: Sessions, names: Sequence[str], stack: contextlib.ExitStack) -> list[int]:
    layers = []
    for name in names:
        layers.append(os.open(store.layer(name) / "workspace/upper", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        stack.callback(os.close, layers[-1])
    return layers
