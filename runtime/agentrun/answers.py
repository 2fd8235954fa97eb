"""Answers to questions about what runs. Root sees everything; others their own, and nothing that adds up everybody's."""

from __future__ import annotations

import contextlib
import os
import signal
from time import time
from typing import Any

import msgspec
import trio

from agentrun.admission import own_tenant
from agentrun.containers import Containers
from agentrun.errors import UsageError
from agentrun.executor import Executor
from agentrun.protocol import Kill, Latency, ProtocolError, Ps, Stats, Status, Top, receive_frame, reply_frame
from agentrun.unixsocket import send_all

NEWS_KEPT = 1024
"""Steps of memory control that a slow reader may be behind."""

Question = Status | Ps | Stats | Latency | Top | Kill


class Answers:
    """Knows what an executor runs, and the containers beside it."""

    def __init__(self, executor: Executor, containers: Containers) -> None:
        self._executor, self._containers = executor, containers
        self._started = time()

    def answer(self, question: Question, uid: int) -> object:
        """The answer to one question, for a user. ``kill`` is one as well: it is about a call that runs.

        Raises:
            UsageError: he may not know, or asks for a call that is not his.
        """
        executor, tenant = self._executor, own_tenant(uid)
        calls = {name: call for name, call in executor.calls().items() if uid == 0 or call.request.tenant == tenant}
        if isinstance(question, Status):
            return {"pid": os.getpid(), "started": self._started, "cgroup": str(executor.tree.path),
                    "controllers": sorted(executor.tree.controllers), "running": len(calls),
                    "containers": len(self._containers.rows(uid)),
                    "memory": msgspec.to_builtins(executor.memory.status())}  # fmt: skip
        if isinstance(question, Top):
            rows = [row for name, call in calls.items() if (row := executor.usage(name, call)) is not None]
            return {"calls": rows, "containers": self._containers.usage(uid),
                    "memory": msgspec.to_builtins(executor.memory.status())}  # fmt: skip
        if isinstance(question, Ps):
            return {"calls": [call.describe() for call in calls.values()], "containers": self._containers.rows(uid)}
        if isinstance(question, Stats):
            if uid != 0:
                return {"running": len(calls), "pools": msgspec.to_builtins(executor.pools(tenant))}
            return msgspec.to_builtins(executor.statistics())
        if isinstance(question, Latency):
            if uid != 0:
                raise UsageError("latency: the histograms are of everybody's calls, so only root may see them")
            return msgspec.to_builtins(executor.latency.report())
        call = calls.get(question.id)
        if call is None or call.slot is None:
            raise UsageError(f"no call {question.id!r} runs")
        if question.signal is None:
            call.kill()
        elif 0 < question.signal < signal.NSIG:
            call.send_signal(question.signal)
        else:
            raise UsageError(f"signal: {question.signal} is none")
        return {"id": question.id}

    async def tell_bursts(self, sock: trio.socket.SocketType, uid: int) -> None:
        """Memory control's news, to whoever is connected; what he does not read in time is left out, and counted."""
        send, receive = trio.open_memory_channel[dict[str, Any]](NEWS_KEPT)
        missed = 0

        def listen(news: dict[str, Any]) -> None:
            nonlocal missed
            if uid != 0 and news["tenant"] not in ("", own_tenant(uid)):
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
                await send_all(sock, reply_frame({"event": "listening", "mode": self._executor.memory.governor.mode.value}))
                async for news in receive:
                    await send_all(sock, reply_frame(news))
        finally:
            listeners.discard(listen)
