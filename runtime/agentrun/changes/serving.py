"""The daemon's side of ``agentrun changes``: the store is root's, and others are handed what is theirs.

What they get are descriptors: the manifest to read, the new files as a read-only mount of nothing else, and the lock, which
is theirs for as long as they live. With these a caller applies by himself, with his own rights and no others.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Any

import trio

from agentrun.changes.model import summary
from agentrun.changes.mount import clone_quietly
from agentrun.changes.store import Store
from agentrun.errors import HostError
from agentrun.protocol import Changes, reply_frame


async def answer_changes(sock: trio.socket.SocketType, request: Changes, uid: int) -> None:
    """Answer a question, with descriptors where it is about one change set."""
    data, fds = await trio.to_thread.run_sync(_answer, request, uid)
    try:
        frame = memoryview(reply_frame(data))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with trio.move_on_after(30):  # who does not read his answer is let go
            frame = frame[await sock.sendmsg([frame], rights) :]
            while frame:
                frame = frame[await sock.send(frame) :]
    finally:
        for fd in fds:
            os.close(fd)


def _answer(request: Changes, uid: int) -> tuple[dict[str, Any], list[int]]:
    store = Store()
    if request.action == "list":
        return {"changes": [summary(changes) | {"begun": store.begun(changes.id)} for changes in store.every(uid)]}, []
    if request.action == "begin":
        return {"id": store.begin_applying(request.id, uid)}, []
    if request.action == "discard":
        return {"id": store.discard(request.id, uid, force=request.force)}, []
    opened = store.open(request.id, uid, take=request.action == "take")
    fds: list[int] = []
    try:
        fds.append(os.open(store.root / opened.changes.id / "manifest", os.O_RDONLY | os.O_CLOEXEC))
        fds.append(clone_quietly(opened.upper))
        if opened.lock >= 0:
            fds.append(os.dup(opened.lock))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        raise HostError(f"change set {opened.changes.id}: {error.strerror}") from error
    finally:
        opened.close()
    return {"id": opened.changes.id, "fds": ["manifest", "upper", "lock"][: len(fds)]}, fds
