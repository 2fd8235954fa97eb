"""agentrund: the executor behind a unix socket.

One connection, one request, one answer. While a call runs its connection is watched: a ``signal`` frame is passed on, and a
client that goes away takes its call with it. Descriptors travel to the sandbox and are never read here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Sequence
from time import monotonic

import msgspec
import trio

from agentrun.admission import Admission
from agentrun.answers import Answers
from agentrun.changes.serving import answer_changes
from agentrun.config import DaemonConfig
from agentrun.containers import Containers
from agentrun.errors import AgentrunError, UsageError
from agentrun.executor import Executor
from agentrun.nursery import open_plain_nursery
from agentrun.protocol import (
    Bursts,
    Changes,
    Exec,
    ProtocolError,
    Register,
    Signal,
    Unregister,
    decode,
    error_frame,
    receive_frame,
    reply_frame,
    result_frame,
)  # fmt: skip
from agentrun.running import Running
from agentrun.stdio import NULL, Output, Stdio, check_stream, own_pipe
from agentrun.types import Outcome, Result, Verdict
from agentrun.unixsocket import Peer, peer_of, send_all

FIRST_FRAME_SECONDS = 10.0
"""A client that connects and says nothing is let go."""
LAST_FRAME_SECONDS = 30.0
"""A client that does not read its answer is let go."""
FAREWELL_SECONDS = 10.0
"""What the calls get to end, and their clients to be told, when the daemon is to end; a service manager gives it 30."""
_STOPPED = Verdict(
    reason="cancelled", message="killed because the daemon was stopped", advice="run it again if it is still wanted"
)
_FATAL = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_log = logging.getLogger("agentrun")


class Daemon:
    """Serves connections with an executor."""

    def __init__(self, executor: Executor, config: DaemonConfig, *, private: bool = False) -> None:
        self._executor = executor
        self._private = private
        self._containers = Containers(executor, config.socket)
        self._admission = Admission(executor, config, private=private)
        self._answers = Answers(executor, self._containers)
        self._accepting = trio.CancelScope()
        self._owed: set[trio.socket.SocketType] = set()
        """Connections whose call has not been answered yet."""
        self._ending: trio.Event | None = None
        """Once the daemon is to end: set when nothing is owed any more."""

    async def serve(self, listeners: Sequence[trio.socket.SocketType]) -> None:
        """Accept and handle connections until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._containers.run)
            with self._accepting:
                async with trio.open_nursery() as acceptors:
                    for listener in listeners:
                        acceptors.start_soon(self._accept, listener, nursery)

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError:
                await trio.sleep(0.1)  # out of descriptors: those that run now will give theirs back
                continue
            nursery.start_soon(self.handle, connection)

    async def finish(self) -> None:
        """End every call, or refuse it, and tell its client. Who connects from now on is for the next daemon, if there is one."""
        self._accepting.cancel()
        self._ending = trio.Event()
        with trio.move_on_after(FAREWELL_SECONDS):
            await self._executor.performer.aclose()
            if self._owed:
                await self._ending.wait()

    async def handle(self, sock: trio.socket.SocketType) -> None:
        """One connection, whatever it brings."""
        with sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                with trio.fail_after(FIRST_FRAME_SECONDS):
                    received = await receive_frame(sock, rest := bytearray())
                if received is None:
                    return
                answer = await self._answer(sock, rest, *received)
            except ProtocolError as error:
                answer = error_frame(2, str(error))
            except trio.TooSlowError:
                answer = error_frame(2, f"no request within {FIRST_FRAME_SECONDS:g} s")
            except AgentrunError as error:
                answer = error_frame(error.exit_code, str(error))
            except Exception as error:  # noqa: BLE001  one request must not end the others, whatever it found
                _log.exception("a request failed in a way that was not foreseen")
                answer = error_frame(125, f"internal error: {type(error).__name__}: {error}")
            if answer:
                with trio.move_on_after(LAST_FRAME_SECONDS):
                    await send_all(sock, answer)
        self._owed.discard(sock)
        if self._ending is not None and not self._owed:
            self._ending.set()

    async def _answer(self, sock: trio.socket.SocketType, rest: bytearray, frame: bytes, fds: list[int]) -> bytes | None:
        try:
            peer = peer_of(sock)
            self._admission.check(peer)
            request = decode(frame)
            if isinstance(request, Exec):
                return await self._exec(sock, rest, request, fds, peer)
            if isinstance(request, Signal):
                raise ProtocolError("a signal before a call")
            if isinstance(request, Bursts):
                await self._answers.tell_bursts(sock, peer.uid)
                return None
            if isinstance(request, Changes):
                await answer_changes(sock, request, peer.uid)
                return None
            if isinstance(request, Register | Unregister):
                return reply_frame(self._ask_of_container(request, peer))
            return reply_frame(self._answers.answer(request, peer.uid))
        finally:
            _close_all(fds)

    async def _exec(
        self, sock: trio.socket.SocketType, rest: bytearray, request: Exec, fds: list[int], peer: Peer
    ) -> bytes | None:
        begun = monotonic()
        self._owed.add(sock)
        if len(request.fds) != len(fds):
            raise ProtocolError(f"{len(fds)} descriptors came, {len(request.fds)} are named: {', '.join(request.fds)}")
        if twice := {name for name in request.fds if request.fds.count(name) > 1}:
            raise ProtocolError(f"fds: named twice: {', '.join(sorted(twice))}")
        if request.options.workspace and "workspace" not in request.fds:
            raise ProtocolError("the option workspace without a descriptor of that name")
        named: dict[str, int] = dict(zip(request.fds, fds, strict=True))
        resolved = self._admission.resolve(request, named.get("workspace", -1), peer)
        stdio = self._stdio(request, named, resolved.terms.owner)
        running = Running()
        result: Result | None = None
        try:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(self._watch, sock, rest, running, nursery.cancel_scope)
                running.on_dispatched = functools.partial(_close_passed, fds, named.get("workspace", -1))
                result = await self._executor.performer.perform(resolved, stdio, running, begun=begun)
                nursery.cancel_scope.cancel()
        finally:
            stdio.close()
        if running.interrupted:
            return error_frame(128 + running.interrupted, "interrupted while it waited for its turn; nothing was run")
        if result is None:
            return None  # the client has gone, and its call with it
        if self._private:
            result = msgspec.structs.replace(result, private_runtime=True)
        if self._ending is not None and result.outcome is Outcome.CANCELLED:
            result = msgspec.structs.replace(result, verdict=_STOPPED)
        return result_frame(result.returncode, result.to_json(), result.verdict.message if result.verdict else None)

    async def _watch(self, sock: trio.socket.SocketType, rest: bytearray, running: Running, scope: trio.CancelScope) -> None:
        """The client's side of a running call: signals, or its end.

        Raises:
            ProtocolError: something else came; it ends the call.
        """
        while True:
            try:
                received = await receive_frame(sock, rest)
            except OSError:
                received = None
            if received is None:
                scope.cancel()
                return
            frame, fds = received
            _close_all(fds)
            message = decode(frame)
            if not isinstance(message, Signal) or not 0 < message.signal < signal.NSIG:
                continue
            if not running.send_signal(message.signal) and message.signal in _FATAL:
                running.interrupted = message.signal
                scope.cancel()
                return

    def _stdio(self, request: Exec, named: dict[str, int], owner: tuple[int, int]) -> Stdio:
        if "console" in named:
            return Stdio.for_terminal(named["console"])
        default: Output = None if request.options.capture else NULL
        stdin, stdout, stderr = named.get("stdin"), named.get("stdout", default), named.get("stderr", default)
        for name, fd in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if isinstance(fd, int):
                check_stream(name, fd)
                own_pipe(fd, owner)
        return Stdio.for_run(stdin, stdout, stderr, owner, self._executor.config.capture_limit)

    def _ask_of_container(self, request: Register | Unregister, peer: Peer) -> object:
        """A hook's request: root's, or of whoever owns the container's cgroup."""
        if self._private:
            raise UsageError("a private runtime controls no containers")
        if isinstance(request, Unregister):
            return {"known": self._containers.unregister(request.id, request.bundle, peer.uid)}
        policy, tenant = self._admission.policy(request.policy, peer.uid), self._admission.tenant(request.tenant, peer.uid)
        return self._containers.register(request, policy, tenant, peer.uid, peer.pid)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _close_passed(fds: list[int], keep: int) -> None:
    """What the tool has now is closed here, so that whoever reads behind it sees its end when the tool ends."""
    for fd in [fd for fd in fds if fd != keep]:
        fds.remove(fd)
        os.close(fd)
