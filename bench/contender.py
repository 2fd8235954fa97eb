"""What is measured: the interface of a contender, and the contenders that are programs.

A program is timed from just before ``posix_spawn`` to the moment its exit has been collected. One at a time that is
``posix_spawn`` and ``waitpid`` in the benchmark's own thread: no thread hop, no event loop. Many at a time it is
``posix_spawn``, a pidfd in trio's epoll, and ``waitpid``: the lightest driver there is, the same for peers and for
``agentrun exec``, so that nobody is slowed by its driver (``trio.run_process`` would spawn from a worker thread).
"""

from __future__ import annotations

import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import FrameType

import trio

CALL_LIMIT = 30
"""Seconds after which a call counts as hung: it is killed and has failed."""
ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
Action = tuple[int, int, str, int, int] | tuple[int, int, int]


class CallError(Exception):
    """One call did not do what it should; the text is the contender's own words where it has any."""


class Contender(ABC):
    """Something that runs /bin/true."""

    name: str
    note: str = ""
    """What a reader must know about how it was run."""

    @abstractmethod
    async def call_alone(self) -> float:
        """Run it while nothing else runs; returns seconds.

        Raises:
            CallError: it did not exit with status 0.
        """

    async def call_shared(self) -> float:
        """Run it beside other calls; returns seconds.

        Raises:
            CallError: it did not exit with status 0.
        """
        return await self.call_alone()

    async def settle(self) -> None:  # noqa: B027 -- most leave nothing behind
        """Wait until what its earlier calls left to the background is done. Never timed."""


class Program(Contender):
    """A program that is spawned for each call."""

    def __init__(
        self,
        name: str,
        argv: Callable[[], list[str]],
        *,
        env: Mapping[str, str] = ENV,
        note: str = "",
        actions: Sequence[Action] = (),
    ) -> None:
        """``argv`` is asked before each call, off the clock: containers need a fresh name. Standard streams are /dev/null."""
        self.name, self.note = name, note
        self._argv, self._env = argv, env
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._actions: list[Action] = [(os.POSIX_SPAWN_DUP2, self._null, fd) for fd in (0, 1, 2)]
        self._actions += actions

    async def call_alone(self) -> float:
        argv = self._argv()
        watch = _Watch()
        started = perf_counter()
        watch.pid = self._spawn(argv)
        status = _collect(watch.pid)
        elapsed = perf_counter() - started
        watch.stop()
        _check(status)
        return elapsed

    async def call_shared(self) -> float:
        argv = self._argv()
        started = perf_counter()
        pid = self._spawn(argv)
        pidfd = os.pidfd_open(pid)
        try:
            # Shielded: whoever is cancelled here leaves no child behind.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CALL_LIMIT) as scope:
                await trio.lowlevel.wait_readable(pidfd)
            if scope.cancelled_caught:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
            status = _collect(pid)
        elapsed = perf_counter() - started
        _check(status)
        return elapsed

    def _spawn(self, argv: list[str]) -> int:
        return os.posix_spawn(argv[0], argv, self._env, file_actions=self._actions)

    def try_once(self, scratch: Path) -> str:
        """Call it once; returns "" or, if it failed, what it had to say about it."""
        argv = self._argv()
        errors = scratch / "stderr"
        actions = [*self._actions, (os.POSIX_SPAWN_OPEN, 2, str(errors), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)]
        watch = _Watch()
        try:
            watch.pid = os.posix_spawn(argv[0], argv, self._env, file_actions=actions)
            _, status = os.waitpid(watch.pid, 0)
        except OSError as error:
            return str(error)
        finally:
            watch.stop()
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return ""
        lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1] if lines else 'nothing on stderr'} (exit status {code})"


def _collect(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def _check(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise CallError(f"exit status {code}")


class _Watch:
    """Kills a child that hangs: waitpid(2) in our one thread would wait for ever. One setitimer(2) before, one after."""

    def __init__(self) -> None:
        self.pid = 0
        self._before = signal.signal(signal.SIGALRM, self._kill)
        signal.alarm(CALL_LIMIT)

    def _kill(self, _number: int, _frame: FrameType | None) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # waitpid goes on by itself and collects it

    def stop(self) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._before)


class SubprocessRun(Contender):
    """What most agents do today: ``subprocess.run`` with captured output."""

    name = "subprocess.run"
    note = "stdout and stderr captured, as agentrun library does"

    async def call_alone(self) -> float:
        started = perf_counter()
        # In-line on purpose: a worker thread would be measured too. No timeout=: with one, subprocess polls in growing sleeps.
        done = subprocess.run(["/bin/true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        elapsed = perf_counter() - started
        if done.returncode:
            raise CallError(f"exit status {done.returncode}")
        return elapsed


def plain_spawn() -> Program:
    """The yardstick: no sandbox."""
    return Program("posix_spawn", lambda: ["/bin/true"], note="no sandbox: the yardstick")
