"""A slot: one warm sandbox, from its leaf to its removal. Single use."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence

import trio

from agentrun.cgroup.leaf import Leaf
from agentrun.cgroup.limits import Plan
from agentrun.cgroup.tree import Tree
from agentrun.egress.path import EgressPath
from agentrun.errors import HostError, SandboxError
from agentrun.zygote import Cloned, IdMap, Zygote, step_name
from agentrun_shim.plan import EVENT_SIZE, Event, Kind, unpack_event, unpack_events

_STARTED = int(Kind.STARTED)


class Slot:
    """init and runner inside their leaf, waiting. Whoever holds it must end it with ``dispose``."""

    __slots__ = (
        "_init",
        "_init_pidfd",
        "_reaped",
        "_runner",
        "control",
        "held",
        "id",
        "leaf",
        "listener",
        "network",
        "plan",
        "runner_pidfd",
        "used_clone3",
    )

    def __init__(self, name: str, leaf: Leaf, plan: Plan, control: socket.socket, cloned: Cloned) -> None:
        self.id = name
        self.leaf = leaf
        self.plan = plan
        """What its leaf is held to."""
        self.control = control
        self.runner_pidfd = cloned.runner_pidfd
        self.used_clone3 = cloned.used_clone3
        self._init, self._init_pidfd = cloned.init, cloned.init_pidfd
        self._runner = cloned.runner
        self._reaped = False
        self.listener = -1
        """Where the filter reports what it refuses, if the shape's does: seccomp_unotify(2). Whoever takes it closes it."""
        self.held: list[Callable[[], None]] = []
        """Called when it has ended: they let go of what has to be there until then, such as its image."""
        self.network: EgressPath | None = None
        """The way out, where the policy names hosts. Ended with the slot."""

    @property
    def init(self) -> int:
        """The pid of the sandbox's init; ours to reap, so nobody else's meanwhile."""
        return self._init

    def send(self, message: bytes, fds: Sequence[int]) -> int:
        """Send RUN with its descriptors; returns how many bytes went out (a long command line may need ``send_rest``).

        Raises:
            BrokenPipeError: the runner has died: take another slot.
        """
        return self.control.sendmsg(
            [message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], socket.MSG_NOSIGNAL
        )

    async def send_rest(self, message: bytes) -> None:
        """Send the part of a RUN message that did not fit into the socket's buffer at once."""
        view = memoryview(message)
        while view:
            try:
                view = view[self.control.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.control)

    def report(self) -> tuple[float | None, Event | None]:
        """What the runner said: the instant (monotonic, seconds) it was about to execve, and what failed. Does not wait."""
        started = failed = None
        try:
            data = self.control.recv(4 * EVENT_SIZE)
        except (BlockingIOError, ConnectionResetError):
            return None, None
        for event in unpack_events(data):
            if event[0] == _STARTED:
                started = event[4] / 1e9
            elif event[0] == Kind.FAILED:
                failed = Event.of(event)
        return started, failed

    def signal_group(self, number: int) -> None:
        """Signal the tool's process group. Safe from pid reuse: the runner is our unreaped child."""
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._runner, number)

    def reap_nowait(self) -> tuple[int, int] | None:
        """Collect the tool once its pidfd is readable: its wait status, and the largest RSS of one process, in bytes.

        None while it cannot be collected: a dead process is its tracer's first, and its own child may be that (ptrace(2)).
        """
        pid, status, usage = os.wait4(self._runner, os.WNOHANG)
        if pid == 0:
            return None
        self._reaped = True
        return status, usage.ru_maxrss * 1024

    async def reap(self) -> tuple[int, int]:
        """The same, if need be by ending everything else in the sandbox: a tracer that dies lets go."""
        collected = self.reap_nowait()
        if collected is None:
            self.leaf.kill()
        while collected is None:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.001)
            collected = self.reap_nowait()
        return collected

    def leftovers(self) -> bool:
        """Something of the call outlived the tool: anything in the leaf but init."""
        return not self.leaf.only(self._init)

    async def wait_dead(self) -> None:
        """Wait until everything in a killed sandbox has died; init is the last.

        The runner is collected first: init's exit waits until its whole pid namespace has been reaped
        (zap_pid_ns_processes), and the runner is our child, not init's.
        """
        if not self._reaped:
            await trio.lowlevel.wait_readable(self.runner_pidfd)
            await self.reap()
        await trio.lowlevel.wait_readable(self._init_pidfd)

    async def dispose(self) -> None:
        """Kill what is left, collect both processes, remove the leaf. Always completes; idempotent it is not."""
        with trio.CancelScope(shield=True):
            self.control.close()
            if self.listener >= 0:
                os.close(self.listener)
            with contextlib.suppress(ProcessLookupError):
                # The end of a pid namespace's init is the end of everything in it: pid_namespaces(7).
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
            await self.wait_dead()
            os.waitpid(self._init, 0)
            os.close(self._init_pidfd)
            os.close(self.runner_pidfd)
            if self.network is not None:
                await self.network.aclose()
            while self.held:
                self.held.pop()()
            await remove_leaf(self.leaf)


async def remove_leaf(leaf: Leaf, patience: float = 10.0) -> None:
    """rmdir a leaf whose processes are dying; the kernel may need a moment to let go of them (EBUSY).

    Raises:
        HostError: it is still busy after ``patience`` seconds.
    """
    delay = 0.0002
    deadline = trio.current_time() + patience
    while not leaf.remove_nowait():
        if trio.current_time() > deadline:
            where, pids = leaf.where, leaf.pids()
            leaf.close()
            raise HostError(f"removing {where}: still busy after {patience:g} s (processes: {pids or 'none'})")
        await trio.sleep(delay)
        delay = min(delay * 2, 0.05)


async def build_slot(
    zygote: Zygote,
    tree: Tree,
    tenant: str,
    name: str,
    plan: Plan,
    maps: Sequence[IdMap],
    *,
    use_clone3: bool = True,
) -> Slot:
    """Make a leaf, clone a sandbox into it, and wait until it is warm.

    Raises:
        SandboxError: a step failed. Nothing is left behind.
        HostError: the leaf or the zygote failed.
    """
    leaf = tree.leaf(tenant, f"call-{name}", plan.files)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        leaf.remove_nowait()
        raise HostError(f"making a sandbox's socket: {error.strerror} (raise LimitNOFILE, or keep fewer warm)") from error
    ours.setblocking(False)
    try:
        cloned = await zygote.clone(theirs, leaf.fd, maps, use_clone3=use_clone3)
    except BaseException:
        ours.close()
        with trio.CancelScope(shield=True):
            await _abandon(leaf)
        raise
    finally:
        theirs.close()
    slot = Slot(name, leaf, plan, ours, cloned)
    try:
        await _wait_ready(slot)
        leaf.mark_ready()
    except BaseException:
        await slot.dispose()
        raise
    return slot


async def _abandon(leaf: Leaf) -> None:
    """Remove a leaf whose sandbox nobody took over: a zygote that died may have left clones in it, and they are ours."""
    if leaf.pids():
        leaf.kill()
    # All of them at once: init cannot end before the runner has been collected, and which is which we were not told.
    while pids := _children_in(leaf):
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        await trio.sleep(0.001)
    await remove_leaf(leaf)


def _children_in(leaf: Leaf) -> list[int]:
    """Our children in a leaf. Also the dead, which its cgroup.procs does not list: cgroups(7)."""
    place, found = "/".join(["", *leaf.where.rsplit("/", 3)[1:]]).encode(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                if int(stat.read().rpartition(b")")[2].split()[1]) != os.getpid():
                    continue
                with open(f"/proc/{name}/cgroup", "rb") as cgroup:
                    # A dead process's may be followed by " (deleted)".
                    paths = [line.partition(b"::")[2].split(b" ")[0] for line in cgroup.read().splitlines()]
                if any(path.endswith(place) for path in paths):
                    found.append(int(name))
    return found


async def _wait_ready(slot: Slot) -> None:
    data = b""
    while len(data) < EVENT_SIZE:
        try:
            chunk, fds, _, _ = socket.recv_fds(slot.control, EVENT_SIZE - len(data), 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(slot.control)
            continue
        except ConnectionResetError:
            chunk, fds = b"", []
        if fds:
            slot.listener = fds[0]
        if not chunk:
            raise HostError("a sandbox died while it was being built (its memory limit may be below what it needs itself)")
        data += chunk
    event = unpack_event(data)
    if event.kind is not Kind.READY:
        raise SandboxError(step_name(event.step), event.error, f"operation {event.op} of the plan")
