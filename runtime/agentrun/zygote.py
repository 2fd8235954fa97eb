"""The host end of a zygote: start it with a plan, ask it for slots, end it.

The zygote is posix_spawned (never forked: this process has threads), and because its clones use CLONE_PARENT, init and
runner of every slot are *our* children: their exits are ours to collect.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple, Self

import trio

from agentrun.errors import HostError, SandboxError
from agentrun_shim.native import slot_program
from agentrun_shim.plan import DONE_SIZE, Done, PlanError, SlotFlag, Step, pack_slot, pack_userns, unpack_done

IdMap = tuple[bool, int, int, int]
"""(is a gid map, first id inside, first id outside, count)"""


class Cloned(NamedTuple):
    """A slot's two processes, ours to reap."""

    init: int
    init_pidfd: int
    runner: int
    runner_pidfd: int
    used_clone3: bool


class Zygote:
    """A running zygote of one shape."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._sock = sock
        self._lock = trio.Lock()
        self._userns: dict[tuple[IdMap, ...], int] = {}

    @classmethod
    async def start(cls, plan: bytes, fds: Sequence[int], life_fd: int) -> Self:
        """Spawn a zygote and give it its plan. ``life_fd`` is the read end of the pipe whose end of file ends its slots.

        Raises:
            SandboxError: the plan failed; the step is named.
            HostError: the program could not be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (theirs.fileno(), life_fd)]
        try:
            program = slot_program()
            # A stack of file actions instead of a fork: 3 the socket, 4 the life pipe, nothing of ours at 0 and 1.
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, 0, 2),
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
            ]
            pid = os.posix_spawn(program, ["agentrun-zygote"], {}, file_actions=actions)
        except OSError as error:
            ours.close()
            raise HostError(f"starting the zygote {error.filename}: {error.strerror}") from error
        finally:
            theirs.close()
            for fd in high:
                os.close(fd)
        ours.setblocking(False)
        zygote = cls(pid, ours)
        try:
            await zygote._request(plan, fds)
        except BaseException:
            zygote.close()
            raise
        return zygote

    @property
    def alive(self) -> bool:
        """It has not exited."""
        try:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    async def clone(self, control: socket.socket, leaf_fd: int, maps: Sequence[IdMap], *, use_clone3: bool = True) -> Cloned:
        """Clone init and runner into a leaf. ``control`` becomes the runner's socket.

        Raises:
            SandboxError: a step failed; whatever had been cloned is dead and reaped.
        """
        flags = SlotFlag.LEAF if use_clone3 else SlotFlag.LEAF | SlotFlag.NO_CLONE3
        done, fds = await self._request(pack_slot(flags, maps, 2), [control.fileno(), leaf_fd])
        return Cloned(done.init, fds[0], done.runner, fds[1], SlotFlag.NO_CLONE3 not in done.flags)

    async def userns(self, maps: tuple[IdMap, ...]) -> int:
        """The fd of a user namespace with these maps, for an idmapped mount; kept, so never close it.

        Raises:
            SandboxError: the kernel refused the maps.
        """
        if maps not in self._userns:
            _, fds = await self._request(pack_userns(maps), [])
            self._userns[maps] = fds[0]
        return self._userns[maps]

    async def _request(self, message: bytes, fds: Sequence[int]) -> tuple[Done, list[int]]:
        # One request at a time: the zygote is serial, and an answer that cancellation left behind would be taken for the
        # next one's. So a request that was sent is always finished.
        async with self._lock:
            with trio.CancelScope(shield=True):
                return await self._exchange(message, fds)

    async def _exchange(self, message: bytes, fds: Sequence[int]) -> tuple[Done, list[int]]:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)
            while True:
                try:
                    data, ancillary, _, _ = self._sock.recvmsg(DONE_SIZE + 1, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._sock)
        except (OSError, trio.ClosedResourceError) as error:
            raise HostError(f"the zygote (pid {self._pid}) is gone: {error}") from error
        received = _received_fds(ancillary)
        if not data:
            raise HostError(f"the zygote (pid {self._pid}) died while it was building a sandbox")
        try:
            done = unpack_done(data)
        except PlanError as error:
            raise HostError(str(error)) from error
        if done.error:
            # The runner before init: see Slot.wait_dead.
            for pid, fd in reversed(list(zip((done.init, done.runner), received, strict=False))):
                if pid:
                    await _reap_killed(pid, fd)
            for fd in received:
                os.close(fd)
            raise SandboxError(step_name(done.step), done.error, _detail(done.step, done.op, done.error))
        return done, received

    def close(self) -> None:
        """End it and collect it. Slots it made live on."""
        for fd in self._userns.values():
            os.close(fd)
        self._userns.clear()
        trio.lowlevel.notify_closing(self._sock)  # a request that waits for its answer learns that none will come
        self._sock.close()
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def step_name(step: Step) -> str:
    """``Step.CLONE_INIT`` → ``clone init``, as it stands in messages."""
    return step.name.lower().replace("_", " ")


def _detail(step: Step, op: int, number: int) -> str:
    if number == errno.EPERM and step in (Step.CLONE_INIT, Step.MOUNTS, Step.TEMPLATE):
        return "namespaces are refused here: agentrun needs root, and a container around it must allow unshare and mount"
    if number == errno.ENOSPC and step is Step.CLONE_INIT:
        return "too many namespaces: see /proc/sys/user/max_*_namespaces"
    if step in (Step.PLAN, Step.TEMPLATE, Step.MOUNTS):
        return f"operation {op} of the plan"
    return ""


async def _reap_killed(pid: int, pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    await trio.lowlevel.wait_readable(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
