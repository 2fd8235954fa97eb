"""The directory below a session's workspace: found once by its path, and from then on that one and no other."""

from __future__ import annotations

import os

from agentrun.changes.beneath import open_plainly
from agentrun.changes.store import check_text
from agentrun.errors import UsageError
from agentrun.session.model import Session
from agentrun.workspace import Workspace, open_directory, real_path


def find_workspace(path: str) -> tuple[str, int]:
    """Where a directory is, and its inode.

    Raises:
        UsageError: it cannot be a workspace, or its path cannot be written down.
    """
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
