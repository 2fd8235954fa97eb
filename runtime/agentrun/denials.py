"""What tools were refused: one task answers the seccomp listeners of all slots, and counts.

A call that is not refused never comes near this: its filter allows it, in the kernel. One that is refused waits for this task, so
what a tool can make the daemon do has to be bounded. Each turn answers one call of each listener that has any; and after
``most`` calls of one slot its listener is closed, from when on the kernel itself refuses, with ENOSYS. If its profile also logs
calls, which have to be let through for ever, it is answered once in a while instead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
from collections import Counter
from collections.abc import Hashable

import msgspec
import trio

from agentrun_shim import seccomp_notify
from agentrun_shim.seccomp_profile import Profile

MOST = 1000
"""Calls of one slot that are counted before its listener is closed."""
PAUSE = 0.002
"""Seconds between two calls of a slot that had more than that and whose profile logs."""
TICK = 0.003
"""Seconds between looks at the listeners. They are looked at, not waited for: the kernel also wakes who waits for one when its
tool exits (EPOLLHUP), just when the daemon has something better to do; that alone made short calls a tenth longer."""
SLOWER = 1.1
"""By how much the looks become rarer while no call begins and nothing is refused: what has not been refused at once seldom is."""
IDLE_TICK = 0.05
"""The same while no call runs, and the most while one does."""
QUICK = 0.005
"""Seconds after a refusal for which the next ones are waited for after all: refusals come in bursts."""
_TURN = 64
"""Listeners served before other tasks get a turn."""


class Denied(msgspec.Struct, frozen=True):
    """A system call that a tool made and its profile refused, or logged."""

    syscall: str
    count: int
    errno: int | None
    """What it failed with; ``None`` if it was logged and allowed."""


class _Listener:
    __slots__ = ("answered", "counts", "fd", "profile")

    def __init__(self, fd: int, profile: Profile) -> None:
        self.fd = fd
        """-1 once closed."""
        self.profile = profile
        self.counts: Counter[tuple[str, int | None]] = Counter()
        self.answered = 0


class Denials:
    """The listeners of all slots, by a key each: whatever the owner of a slot knows it by."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._running, self._tick = 0, IDLE_TICK
        self._epoll = select.epoll()
        self._by_key: dict[Hashable, _Listener] = {}
        self._by_fd: dict[int, _Listener] = {}
        self._slow: list[_Listener] = []

    @property
    def running(self) -> int:
        """Calls that run: their owner counts them here, and says so whenever one begins or ends."""
        return self._running

    @running.setter
    def running(self, count: int) -> None:
        self._running = count
        self._tick = TICK if count else IDLE_TICK

    def watch(self, fd: int, key: Hashable, profile: Profile) -> None:
        """Answer the listener ``fd`` as ``profile`` decides, and count under ``key``. It is ours from now on, but after an error.

        Raises:
            ValueError: the key is in use.
            OSError: ``fd`` cannot be watched.
        """
        if key in self._by_key:
            raise ValueError(f"key {key!r} is watched already")
        listener = _Listener(fd, profile)
        self._epoll.register(fd, select.EPOLLIN)
        self._by_key[key] = self._by_fd[fd] = listener

    def take(self, key: Hashable) -> tuple[Denied, ...]:
        """What was refused under ``key`` since it was last taken: most frequent first, nothing if the key is unknown."""
        listener = self._by_key.get(key)
        if listener is None or not listener.counts:
            return ()
        counts, listener.counts = listener.counts, Counter()
        return tuple(Denied(syscall, count, error) for (syscall, error), count in counts.most_common())

    def forget(self, key: Hashable) -> None:
        """Close the listener of ``key``; nothing happens if there is none."""
        listener = self._by_key.pop(key, None)
        if listener is not None:
            self._close(listener)

    def close(self) -> None:
        """Forget all, and take no more."""
        for key in list(self._by_key):
            self.forget(key)
        self._epoll.close()

    async def run(self) -> None:
        """Answer until cancelled; closes everything then, for a call that is held and not answered hangs."""
        try:
            quick = slow = 0.0
            while True:
                if trio.current_time() < quick:
                    with trio.move_on_after(PAUSE if self._slow else QUICK):
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                else:
                    await trio.sleep(PAUSE if self._slow else self._tick)
                    self._tick = min(IDLE_TICK, self._tick * SLOWER)
                now = trio.current_time()
                if self._slow and now >= slow:
                    slow = now + PAUSE
                    self._serve_slow()
                for fd, events in self._epoll.poll(0, _TURN):
                    listener = self._by_fd.get(fd)
                    if listener is not None:
                        if events & select.EPOLLIN:
                            quick, self._tick = now + QUICK, TICK
                        self._serve(listener, events)
        finally:
            self.close()

    def _serve(self, listener: _Listener, events: int) -> None:
        if not events & select.EPOLLIN:
            self._close(listener)  # no process has the filter any more
            return
        self._answer(listener)
        if listener.answered >= self._most:
            if any(action.kind == "log" for action in listener.profile.actions()):
                self._epoll.unregister(listener.fd)
                self._slow.append(listener)
            else:
                self._close(listener)

    def _serve_slow(self) -> None:
        poll = select.poll()
        for listener in self._slow:
            poll.register(listener.fd, select.POLLIN)
        for fd, events in poll.poll(0):
            if events & select.POLLIN:
                self._answer(self._by_fd[fd])
            else:
                self._close(self._by_fd[fd])

    def _answer(self, listener: _Listener) -> None:
        call = seccomp_notify.receive(listener.fd)
        if call is None:
            return
        action = listener.profile.decide(call.nr, call.args)
        # The filter asks for nothing but what the profile logs or gives an errno; if it did, it would be refused.
        error = None if action.kind == "log" else action.errno if action.kind == "errno" else errno.EPERM
        listener.answered += 1
        listener.counts[seccomp_notify.syscall_name(call.nr), error] += 1
        if error is None:
            seccomp_notify.let_continue(listener.fd, call.id)
        else:
            seccomp_notify.answer(listener.fd, call.id, error)

    def _close(self, listener: _Listener) -> None:
        if listener.fd < 0:
            return
        del self._by_fd[listener.fd]
        with contextlib.suppress(ValueError):
            self._slow.remove(listener)
        os.close(listener.fd)  # which takes it out of the epoll as well
        listener.fd = -1
