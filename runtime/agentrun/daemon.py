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
import socket
import stat
import struct
from collections.abc import Sequence
from time import monotonic, time
from typing import Any

import msgspec
import trio

from agentrun.changes.serving import answer_changes
from agentrun.config import DEFAULT_SOCKET, DaemonConfig
from agentrun.containers import Containers
from agentrun.errors import AgentrunError, UsageError
from agentrun.executor import Executor
from agentrun.hints import with_memory
from agentrun.nursery import open_plain_nursery
from agentrun.policy import Policy, parse_net
from agentrun.policystore import is_path
from agentrun.protocol import (
    Bursts,
    Changes,
    Exec,
    Kill,
    Latency,
    Options,
    ProtocolError,
    Ps,
    Register,
    Signal,
    Stats,
    Status,
    Top,
    Unregister,
    decode,
    error_frame,
    receive_frame,
    reply_frame,
    result_frame,
)  # fmt: skip
from agentrun.request import Request
from agentrun.running import Running
from agentrun.stdio import NULL, Output, Stdio, check_stream, own_pipe
from agentrun.types import Result
from agentrun.units import parse_number, parse_size

FIRST_FRAME_SECONDS = 10.0
"""A client that connects and says nothing is let go."""
LAST_FRAME_SECONDS = 30.0
"""A client that does not read its answer is let go."""
NEWS_KEPT = 1024
"""Steps of memory control that a slow reader may be behind."""
_FATAL = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_log = logging.getLogger("agentrun")
_PEERCRED = struct.Struct("iII")


class Daemon:
    """Serves connections with an executor."""

    def __init__(self, executor: Executor, config: DaemonConfig, *, private: bool = False) -> None:
        self._executor = executor
        self._config = config
        self._private = private
        self._containers = Containers(executor, config.socket)
        self._started = time()

    async def serve(self, listeners: Sequence[trio.socket.SocketType]) -> None:
        """Accept and handle connections until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._containers.run)
            for listener in listeners:
                nursery.start_soon(self._accept, listener, nursery)

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                connection, _ = await listener.accept()
            except OSError:
                await trio.sleep(0.1)  # out of descriptors: those that run now will give theirs back
                continue
            nursery.start_soon(self.handle, connection)

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
                    await _send_all(sock, answer)

    async def _answer(self, sock: trio.socket.SocketType, rest: bytearray, frame: bytes, fds: list[int]) -> bytes | None:
        try:
            if self._executor.owns(_peer(sock)[1]):
                # It found our socket in its workspace. With another policy it would have what its own keeps from it.
                raise UsageError("a tool call may not ask for tool calls")
            request = decode(frame)
            if isinstance(request, Exec):
                return await self._exec(sock, rest, request, fds)
            if isinstance(request, Signal):
                raise ProtocolError("a signal before a call")
            if isinstance(request, Bursts):
                await self._tell_bursts(sock, _peer(sock)[1])
                return None
            if isinstance(request, Changes):
                await answer_changes(sock, request, _peer(sock)[1])
                return None
            if isinstance(request, Register | Unregister):
                return reply_frame(self._ask_of_container(request, _peer(sock)))
            return reply_frame(self._ask(request, _peer(sock)[1]))
        finally:
            _close_all(fds)

    async def _exec(self, sock: trio.socket.SocketType, rest: bytearray, request: Exec, fds: list[int]) -> bytes | None:
        begun = monotonic()
        if len(request.fds) != len(fds):
            raise ProtocolError(f"{len(fds)} descriptors came, {len(request.fds)} are named: {', '.join(request.fds)}")
        if twice := {name for name in request.fds if request.fds.count(name) > 1}:
            raise ProtocolError(f"fds: named twice: {', '.join(sorted(twice))}")
        if request.options.workspace and "workspace" not in request.fds:
            raise ProtocolError("the option workspace without a descriptor of that name")
        named: dict[str, int] = dict(zip(request.fds, fds, strict=True))
        resolved = self._resolve(request, named.get("workspace", -1), _peer(sock))
        stdio = self._stdio(request, named, resolved.terms.owner)
        running = Running()
        result: Result | None = None
        try:
            async with open_plain_nursery() as nursery:
                nursery.start_soon(self._watch, sock, rest, running, nursery.cancel_scope)
                running.on_dispatched = functools.partial(_close_passed, fds, named.get("workspace", -1))
                result = await self._executor.perform(resolved, stdio, running, begun=begun)
                nursery.cancel_scope.cancel()
        finally:
            stdio.close()
        if running.interrupted:
            return error_frame(128 + running.interrupted, "interrupted while it waited for its turn; nothing was run")
        if result is None:
            return None  # the client has gone, and its call with it
        if self._private:
            result = msgspec.structs.replace(result, private_runtime=True)
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

    def _resolve(self, request: Exec, workspace_fd: int, peer: tuple[int, int, int]) -> Request:
        options = request.options
        _, uid, gid = peer
        if options.session is not None and uid != 0:
            raise UsageError("session: only root may use sessions, which are root's")
        return self._executor.resolver.resolve(
            request.argv,
            policy=apply_options(self._policy(options.policy, uid), options),
            tenant=self._tenant(options.tenant, uid),
            workspace_fd=workspace_fd,
            workspace_mode=options.workspace or "rw",
            cwd=options.cwd,
            env=request.env,
            hint=options.hint,
            image=options.image,
            session=options.session,
            timings=bool(options.timings),
            caller=(uid, gid),
        )

    def _policy(self, name: str, uid: int) -> Policy:
        """A policy by name; by path only for root, because it is read with the daemon's rights."""
        if uid != 0 and is_path(name):
            raise UsageError(f"policy: only root may name a file ({name}); a policy in /etc/agentrun/policies has a name")
        if not self._private and is_path(name) and not name.startswith("/"):
            raise UsageError(f"policy: {name} is a relative path, and the daemon is somewhere else; give the whole path")
        return self._executor.policies.find(name)

    def _tenant(self, named: str | None, uid: int) -> str:
        """Root calls for any tenant; others for their own, ``uid-<number>``, and for those that list them."""
        if uid == 0:
            return "default" if named is None else named
        own = f"uid-{uid}"
        if named in (None, own):
            return own
        tenant = self._config.tenants.get(str(named))
        if tenant is None or uid not in tenant.uids:
            raise UsageError(f"tenant: user {uid} may not call for {named!r} (yours is {own})")
        return str(named)

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

    async def _tell_bursts(self, sock: trio.socket.SocketType, uid: int) -> None:
        """Memory control's news, to whoever is connected; what he does not read in time is left out, and counted."""
        send, receive = trio.open_memory_channel[dict[str, Any]](NEWS_KEPT)
        missed = 0

        def listen(news: dict[str, Any]) -> None:
            nonlocal missed
            if uid != 0 and news["tenant"] != f"uid-{uid}":
                return
            call = self._executor.calls().get(news["call"])
            argv = call.describe()["argv"] if call is not None else []
            try:
                send.send_nowait({"time": time(), "argv": argv, "missed": missed, **news})
            except trio.WouldBlock:
                missed += 1

        async def watch(scope: trio.CancelScope) -> None:
            with contextlib.suppress(ProtocolError, OSError):
                await receive_frame(sock)
            scope.cancel()

        listeners = self._executor.memory.governor.listeners
        listeners.add(listen)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                await _send_all(sock, reply_frame({"event": "listening", "mode": self._executor.memory.governor.mode.value}))
                async for news in receive:
                    await _send_all(sock, reply_frame(news))
        finally:
            listeners.discard(listen)

    def _ask_of_container(self, request: Register | Unregister, peer: tuple[int, int, int]) -> object:
        """A hook's request: root's, or of whoever owns the container's cgroup."""
        pid, uid, _ = peer
        if self._private:
            raise UsageError("a private runtime controls no containers")
        if isinstance(request, Unregister):
            return {"known": self._containers.unregister(request.id, request.bundle, uid)}
        policy, tenant = self._policy(request.policy, uid), self._tenant(request.tenant, uid)
        return self._containers.register(request, policy, tenant, uid, pid)

    def _ask(self, request: Status | Ps | Stats | Latency | Top | Kill, uid: int) -> object:
        """The answer to a question. Root sees everything; others their own tenant's, and nothing that adds up everybody's."""
        executor, tenant = self._executor, f"uid-{uid}"
        calls = {name: call for name, call in executor.calls().items() if uid == 0 or call.request.tenant == tenant}
        if isinstance(request, Status):
            return {"pid": os.getpid(), "started": self._started, "cgroup": str(executor.tree.path),
                    "controllers": sorted(executor.tree.controllers), "running": len(calls),
                    "containers": len(self._containers.rows(uid)),
                    "memory": msgspec.to_builtins(executor.memory.status())}  # fmt: skip
        if isinstance(request, Top):
            rows = [row for name, call in calls.items() if (row := executor.usage(name, call)) is not None]
            return {"calls": rows, "containers": self._containers.usage(uid),
                    "memory": msgspec.to_builtins(executor.memory.status())}  # fmt: skip
        if isinstance(request, Ps):
            return {"calls": [call.describe() for call in calls.values()], "containers": self._containers.rows(uid)}
        if isinstance(request, Stats):
            if uid != 0:
                return {"running": len(calls), "pools": msgspec.to_builtins(executor.pools(tenant))}
            return msgspec.to_builtins(executor.statistics())
        if isinstance(request, Latency):
            if uid != 0:
                raise UsageError("latency: the histograms are of everybody's calls, so only root may see them")
            return msgspec.to_builtins(executor.latency.report())
        call = calls.get(request.id)
        if call is None or call.slot is None:
            raise UsageError(f"no call {request.id!r} runs")
        if request.signal is None:
            call.kill()
        elif 0 < request.signal < signal.NSIG:
            call.send_signal(request.signal)
        else:
            raise UsageError(f"signal: {request.signal} is none")
        return {"id": request.id}


def apply_options(policy: Policy, options: Options) -> Policy:
    """A policy with the command line's numbers laid over it.

    Raises:
        UsageError: naming the option and what would be right.
    """
    changes: dict[str, object] = {}
    limits: dict[str, object] = {}
    given = {"memory.max": options.memory, "cpu.max": options.cpus, "pids.max": options.pids}
    if options.memory is not None:
        policy = msgspec.structs.replace(policy, limits=with_memory(policy.limits, parse_size(options.memory, "--memory")))
    if options.cpus is not None:
        limits["cpus"] = parse_number(options.cpus, "--cpus", least=0.01, most=4096)
    if options.pids is not None:
        limits["pids_max"] = int(parse_number(options.pids, "--pids", least=1, most=4194304, whole=True))
    if options.timeout is not None:
        changes["timeout"] = parse_number(options.timeout, "--timeout", least=0.001, most=1e9)
    if options.net is not None:
        changes["net"] = net = parse_net(options.net)
        if net == "egress" and not policy.egress.allow:
            raise UsageError(f"--net: policy {policy.name} names no hosts for egress to reach (net.allow)")
    if insist := tuple(name for name, value in given.items() if value is not None):
        changes["insist"] = insist
    if options.best_effort:
        changes |= {"best_effort": True, "lenient": True}
    if limits:
        changes["limits"] = msgspec.structs.replace(policy.limits, **limits)
    return msgspec.structs.replace(policy, **changes) if changes else policy


def open_listener(path: str, group: int | None) -> trio.socket.SocketType:
    """Bind the socket: mode 0600, or 0660 for a group. A dead daemon's socket is replaced, a live one's is not.

    Of directories only our own below /run is made: another that is missing is a mistake in a path.

    Raises:
        UsageError: the path cannot be used, or a daemon answers there.
    """
    if not path:
        raise UsageError("socket: the path is empty")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.dirname(path) == os.path.dirname(DEFAULT_SOCKET):
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise UsageError(f"socket {path}: there is something else at that path, which is left alone")
            if _answers(path):
                raise UsageError(f"socket {path}: a daemon answers there already")
            os.unlink(path)
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o660)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise UsageError(f"socket {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


def _answers(path: str) -> bool:
    os.stat(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _peer(sock: trio.socket.SocketType) -> tuple[int, int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, gid = _PEERCRED.unpack(raw)
    return pid, uid, gid


async def _send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _close_passed(fds: list[int], keep: int) -> None:
    """What the tool has now is closed here, so that whoever reads behind it sees its end when the tool ends."""
    for fd in [fd for fd in fds if fd != keep]:
        fds.remove(fd)
        os.close(fd)
