"""What a session's workspace has that its directory has not: to be looked at, and applied.

That takes as long as there is much of it, so nothing is held but the session itself. Layers that others share do not change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from agentrun.changes.apply import Report, Step, apply, no_step
from agentrun.changes.model import ChangeSet
from agentrun.changes.mount import clone_quietly
from agentrun.changes.scan import scan, size_on_disk
from agentrun.errors import HostError, UsageError
from agentrun.session.directory import open_workspace
from agentrun.session.model import Session
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
    with store.alone(session_id) as session, _opened(store, session) as (changes, layers, workspace):
        try:
            report = apply(changes.changes, layers, workspace, name=changes.id, force=force, step=step)
        except OSError as error:
            where = f" ({show_path(error.filename)})" if error.filename else ""
            raise HostError(f"session {session_id}: {error.strerror}{where}; apply it again to finish") from error
        if report.complete:
            store.mark_applied(session)
    return changes, report


@contextlib.contextmanager
def _opened(store: Sessions, session: Session) -> Iterator[tuple[ChangeSet, list[int], int]]:
    """The changes, the layers they are in, topmost first, and the directory."""
    if not session.workspace:
        raise UsageError(f"session {session.id} has no workspace")
    with contextlib.ExitStack() as stack:
        names = (session.upper, *session.layers[::-1])
        layers = [_open_directory(store.layer(name) / "workspace/upper", stack.callback) for name in names]
        stack.callback(os.close, workspace := open_workspace(session))
        stack.callback(os.close, base := clone_quietly(workspace))
        uid, gid = session.caller
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
            changes=scan(layers, base, since=session.since),
        )
        yield changes, layers, workspace


def _open_directory(path: Path, later: Callable[..., object]) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    later(os.close, fd)
    return fd
