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
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import trio

from agentrun.errors import HostError, SandboxError
from agentrun_shim.native import slot_program
from agentrun_shim.plan import DONE_SIZE, Done, SlotFlag, Step, pack_slot, pack_userns, unpack_done

IdMap = tuple[bool, int, int, int]
"""(is a gid map, first id inside, first id outside, count)"""


class Cloned(NamedTuple):
    """A slot's two processes, ours to reap."""

    init: int
    init_pidfd: int
    runner: int
    runner_pidfd: int
    used_clone3: bool


class ZygoteDied(HostError):
    """The zygote ended before it had answered; another one can be started."""


class Held(Protocol):
    """Something that is kept from going away."""

    def share(self) -> Self:
        """Another holder of the same."""

    def close(self) -> None:
        """Let go."""


class Zygote:
    """A running zygote of one shape."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self._pid = pid
        self._sock = sock
        self._answers: deque[_Answer] = deque()
        self._userns: dict[tuple[IdMap, ...], int] = {}
        self._hung_up = False
        self.lease: Held | None = None
        """Of the image that its slots have for a root. It ends with the zygote."""

    @classmethod
    def spawn(cls, life_fd: int, nursery: trio.Nursery) -> Self:
        """Spawn a zygote without a plan. ``life_fd`` is the read end of the pipe whose end of file ends its slots.

        Raises:
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
        nursery.start_soon(zygote.serve, name="agentrun zygote")
        return zygote

    async def shape(self, plan: bytes, fds: Sequence[int]) -> None:
        """Give it its plan; slots can be had from then on.

        Raises:
            SandboxError: the plan failed; the step is named.
        """
        await self._request(plan, fds)

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._pid

    @property
    def alive(self) -> bool:
        """It has neither exited nor hung up; dying, it hangs up first."""
        if self._hung_up:
            return False
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

    def forget_userns(self, first: int, count: int) -> None:
        """Close the user namespaces that map anything to these host ids; whoever needs one again gets a new one."""
        for maps in [maps for maps in self._userns if any(0 <= outside - first < count for _, _, outside, _ in maps)]:
            os.close(self._userns.pop(maps))

    async def _request(self, message: bytes, fds: Sequence[int]) -> tuple[Done, list[int]]:
        """Send one request and wait for its answer. Requests may overlap; the zygote answers in their order."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._hung_up = not isinstance(error, BlockingIOError)
            raise ZygoteDied(f"the zygote (pid {self._pid}) is gone: {error.strerror}") from error
        answer = _Answer()
        self._answers.append(answer)
        # A request that was sent is always finished: what it made has to be taken over by somebody.
        with trio.CancelScope(shield=True):
            await answer.event.wait()
        if answer.done is None:
            raise ZygoteDied(f"the zygote (pid {self._pid}) died while it was building a sandbox")
        if answer.done.error:
            await _undo(answer.fds)
            raise SandboxError(step_name(answer.done.step), answer.done.error, _detail(answer.done))
        return answer.done, answer.fds

    async def serve(self) -> None:
        """Receive the answers, until the zygote ends. Runs beside everything that uses it."""
        try:
            while True:
                try:
                    data, ancillary, _, _ = self._sock.recvmsg(DONE_SIZE + 1, socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC)
                except BlockingIOError:
                    # Cancelled with the executor it would leave those who wait for an answer alone; ``close`` ends it.
                    with trio.CancelScope(shield=True):
                        await trio.lowlevel.wait_readable(self._sock)
                    continue
                if not data:
                    return
                answer = self._answers.popleft()
                answer.done, answer.fds = unpack_done(data), _received_fds(ancillary)
                answer.event.set()
        except (OSError, trio.ClosedResourceError):
            return
        finally:
            self._hung_up = True
            while self._answers:
                self._answers.popleft().event.set()

    async def aclose(self) -> None:
        """Let it finish what it was asked, then end it and collect it. Slots it made live on."""
        while self._answers:
            await self._answers[-1].event.wait()
        self.close()

    def close(self) -> None:
        """End it and collect it, whatever it is doing."""
        if self.lease is not None:
            self.lease.close()
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


def _detail(done: Done) -> str:
    step, number = done.step, done.error
    if number == errno.EPERM and step in (Step.CLONE_INIT, Step.MOUNTS, Step.TEMPLATE):
        return "namespaces are refused here: agentrun needs root, and a container around it must allow unshare and mount"
    if number == errno.ENOSPC and step is Step.CLONE_INIT:
        return "too many namespaces: see /proc/sys/user/max_*_namespaces"
    if step in (Step.PLAN, Step.TEMPLATE, Step.MOUNTS):
        return f"operation {done.op} of the plan"
    return ""


async def _undo(fds: list[int]) -> None:
    """Kill and collect what a request had cloned before it failed; the runner before init: see Slot.wait_dead."""
    with trio.CancelScope(shield=True):
        for pidfd in reversed(fds):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    for fd in fds:
        os.close(fd)


class _Answer:
    """One request's place in the line; ``done`` stays None if the zygote died."""

    __slots__ = ("done", "event", "fds")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.done: Done | None = None
        self.fds: list[int] = []


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
