"""The executor: queue, pools, zygotes and leaves behind one ``run``.

One call, one pass::

    run      check and resolve the request; a place among the running calls, or in the bounded queue
    lease    a warm slot of (tenant, shape); a cold one is built and the result says so
    leaf     the limits that differ from the shape's
    call     one message into the slot; wait for its pidfd, its streams, the deadline
    end      kill what outlived the tool, read the leaf once, answer; the slot is taken down in the background

Everything lives in one nursery: closing the executor ends every call and removes every cgroup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

import msgspec
import trio

from agentrun import rootfs
from agentrun.call import Call
from agentrun.cgroup.tree import Tree, find_base, remove_stale
from agentrun.errors import AgentrunError, HostError, Overloaded, UsageError
from agentrun.policy import DEFAULT, Limits, Policy, find_policy
from agentrun.pool import Pool, PoolStats
from agentrun.request import Request, Text, check_enforced, check_tenant, encode_argv, encode_env
from agentrun.shape import ID_RANGE, Shape, plan_shape, shape_of
from agentrun.slot import Slot, build_slot
from agentrun.stdio import PIPE, Input, Output, Stdio
from agentrun.types import Result
from agentrun.workspace import Workspace, clone_mount, open_directory, real_path
from agentrun.zygote import Zygote

_log = logging.getLogger("agentrun")
_NO_LIMITS = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
_LIFTED = {"memory.max": "max", "memory.oom.group": "0", "memory.swap.max": "max", "pids.max": "max"}
"""What takes back a limit the pool's shape has and the call has not."""


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an executor is run."""

    name: str = ""
    """Of its cgroup, ``agentrun-<name>``; empty: one made from the pid and the time."""
    max_running: int = 64
    """Calls at once; more wait."""
    max_queued: int = 1024
    """Calls that may wait; more are refused with ``Overloaded``."""
    pool_least: int = 1
    """Warm slots each pool keeps, however quiet it is."""
    pool_most: int = 32
    """Warm slots a pool keeps at most. 0: build every slot when it is asked for."""
    capture_limit: int = 1 << 20
    """Bytes kept of each captured stream."""
    id_base: int = 0x60000000
    """First host uid and gid of the ranges given to tenants, 65,536 each."""
    tenant_limits: Mapping[str, Limits] = {}
    """Budgets of tenants: what all calls of one may use together."""


class ExecutorStats(msgspec.Struct, frozen=True, kw_only=True):
    """An executor at one moment."""

    running: int
    queued: int
    completed: int
    refused: int
    stuck: int
    """Sandboxes that could not be removed; each was logged."""
    pools: dict[str, PoolStats]


class Executor:
    """Runs tool calls. Made by ``open_executor``."""

    def __init__(self, config: ExecutorConfig, tree: Tree, nursery: trio.Nursery, life_read: int) -> None:
        self.config = config
        self.tree = tree
        self._nursery = nursery
        self._life_read = life_read
        self._zygotes: dict[Shape, Zygote] = {}
        self._zygote_lock = trio.Lock()
        self._pools: dict[tuple[str, Shape], Pool] = {}
        self._tenant_index: dict[str, int] = {}
        self._calls: dict[str, Call] = {}
        self._queue = trio.lowlevel.ParkingLot()
        self._running = self._count = self._completed = self._refused = self._stuck = 0
        self._closing = False
        self.null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    async def run(
        self,
        argv: Sequence[Text],
        *,
        policy: Policy | str = DEFAULT,
        tenant: str = "default",
        workspace: Workspace | str | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run one command in a fresh sandbox and wait for it.

        Args:
            argv: the command; a name without a slash is looked up on the sandbox's PATH.
            policy: what it may do, or the name of one.
            workspace: a host directory to mount at its own path; also the default ``cwd``.
            env: variables laid over the minimal environment; the caller's own is not passed on.
            stdin: bytes to read, a descriptor, or nothing (/dev/null).
            stdout, stderr: a descriptor to write to; else captured, up to ``capture_limit`` bytes each.
            timeout: seconds, instead of the policy's.

        Cancelling it kills the call's leaf, waits for it, and goes on cancelling.

        Raises:
            UsageError: the request is not one.
            Overloaded: too many calls run and wait.
            HostError: the host failed; also LimitError and SandboxError.
        """
        with self._opened(workspace) as (workspace_fd, mode):
            request = self.resolve(
                argv, policy=policy, tenant=tenant, workspace_fd=workspace_fd, workspace_mode=mode, cwd=cwd,
                env=env, timeout=timeout,
            )  # fmt: skip
            stdio = Stdio.for_run(stdin, stdout, stderr, self.owner(tenant), self.config.capture_limit, self.null_fd)
            try:
                return await self.perform(request, stdio)
            finally:
                stdio.close()

    @contextlib.asynccontextmanager
    async def start(
        self, argv: Sequence[Text], *, stdin: Input = None, stdout: Output = PIPE, stderr: Output = PIPE, **options: Any
    ) -> AsyncIterator[Running]:
        """Start a command and stream: ``async with executor.start([...]) as call``. Options are those of ``run``.

        Leaving the block kills what still runs; ``await call.wait()`` first for the result.
        """
        workspace: Workspace | str | None = options.pop("workspace", None)
        tenant: str = options.get("tenant", "default")
        with self._opened(workspace) as (workspace_fd, mode):
            request = self.resolve(argv, workspace_fd=workspace_fd, workspace_mode=mode, **options)
            stdio = Stdio.for_run(stdin, stdout, stderr, self.owner(tenant), self.config.capture_limit, self.null_fd)
            try:
                async with trio.open_nursery() as nursery:
                    running = Running()
                    await nursery.start(running._run, self, request, stdio)
                    try:
                        yield running
                    finally:
                        running.kill()
                        await running.aclose()
            finally:
                stdio.close()

    def resolve(
        self,
        argv: Sequence[Text],
        *,
        policy: Policy | str = DEFAULT,
        tenant: str = "default",
        workspace_fd: int = -1,
        workspace_mode: str = "rw",
        cwd: str | None = None,
        env: Mapping[str, str] | Sequence[bytes] | None = None,
        timeout: float | None = None,
        caller: tuple[int, int] | None = None,
    ) -> Request:
        """Check a request and fill in its defaults.

        Raises:
            UsageError: something in it cannot be.
        """
        rules = find_policy(policy) if isinstance(policy, str) else policy
        if timeout is not None:
            if not timeout > 0:
                raise UsageError(f"timeout: {timeout!r} is not a positive number of seconds")
            rules = msgspec.structs.replace(rules, timeout=timeout)
        path = real_path(workspace_fd) if workspace_fd >= 0 else ""
        return Request(
            argv=encode_argv(argv),
            env=encode_env(env),
            cwd=os.fsencode(cwd or path or rootfs.HOME),
            policy=rules,
            tenant=check_tenant(tenant),
            workspace_fd=workspace_fd,
            workspace_path=path,
            workspace_mode="ro" if workspace_mode == "ro" else "rw",
            caller=caller if caller is not None else (os.geteuid(), os.getegid()),
        )

    async def perform(self, request: Request, stdio: Stdio, running: Running | None = None) -> Result:
        """Carry out a resolved request; ``run`` and the daemon come together here."""
        started = monotonic()
        await self._enter_queue()
        try:
            queued = monotonic()
            files, missing = self.tree.plan(request.policy.limits)
            check_enforced(missing, request.policy, DEFAULT)
            mount_fd = await self._mount_workspace(request)
            try:
                nproc = request.policy.limits.pids_max or 0
                call = Call(request, stdio, mount_fd, nproc)
                call.started, call.queued, call.unenforced = started, queued, missing
                return await self._in_slot(call, files, running)
            finally:
                if mount_fd >= 0:
                    os.close(mount_fd)
        finally:
            self._leave_queue()

    async def _in_slot(self, call: Call, files: Mapping[str, str], running: Running | None) -> Result:
        message, fds = call.pack()
        # A call's own limits do not make another pool: the leaf is adjusted instead, before the tool exists.
        pooled = msgspec.structs.replace(call.request.policy, limits=DEFAULT.limits)
        pool = self._pool(call.request.tenant, shape_of(pooled))
        while True:
            slot, call.warm = await pool.lease()
            try:
                if call.request.policy.limits != DEFAULT.limits:
                    slot.leaf.write(self._difference(files))
                try:
                    await call.dispatch(slot, message, fds)
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it died while it waited, say by the tenant's memory limit: the next one
                self._calls[slot.id] = call
                if running is not None:
                    running._started(call)
                return await call.finish(call.request.policy.timeout)
            finally:
                self._calls.pop(slot.id, None)
                pool.release(slot)

    def _difference(self, files: Mapping[str, str]) -> dict[str, str]:
        default, _ = self.tree.plan(DEFAULT.limits)
        lifted = {name: _LIFTED[name] for name in default if name not in files and name in _LIFTED}
        return lifted | {name: text for name, text in files.items() if default.get(name) != text}

    async def _enter_queue(self) -> None:
        if self._closing:
            raise HostError("the executor is closing")
        if self._running < self.config.max_running:
            self._running += 1
            return
        if len(self._queue) >= self.config.max_queued:
            self._refused += 1
            raise Overloaded(f"{self._running} calls run and {len(self._queue)} wait; try again later")
        # Whoever leaves hands its place on: _running stays as it is.
        await self._queue.park()

    def _leave_queue(self) -> None:
        self._completed += 1
        if not self._queue.unpark():
            self._running -= 1

    def owner(self, tenant: str) -> tuple[int, int]:
        """The tool's uid and gid as the host sees them."""
        base = self._base(tenant)
        return base + rootfs.UID, base + rootfs.GID

    def _base(self, tenant: str) -> int:
        index = self._tenant_index.setdefault(tenant, len(self._tenant_index))
        return self.config.id_base + index * ID_RANGE

    async def _mount_workspace(self, request: Request) -> int:
        if request.workspace_fd < 0:
            return -1
        zygote = await self._zygote(shape_of(DEFAULT))
        uid, gid = self.owner(request.tenant)
        caller_uid, caller_gid = request.caller
        userns = await zygote.userns(((False, caller_uid, uid, 1), (True, caller_gid, gid, 1)))
        return clone_mount(request.workspace_fd, request.workspace_path, request.workspace_mode, userns)

    def _pool(self, tenant: str, shape: Shape) -> Pool:
        key = (tenant, shape)
        if key not in self._pools:
            base = self._base(tenant)
            maps = ((False, 0, base, ID_RANGE), (True, 0, base, ID_RANGE))
            budget, _ = self.tree.plan(self.config.tenant_limits.get(tenant, _NO_LIMITS))
            self.tree.tenant(tenant, budget)
            files, _ = self.tree.plan(shape.limits)

            async def build() -> Slot:
                self._count += 1
                name = f"{self._count:x}"
                return await build_slot(await self._zygote(shape), self.tree, tenant, name, files, maps)

            self._pools[key] = Pool(build, self._discard, self._nursery, least=self.config.pool_least, most=self.config.pool_most)
        return self._pools[key]

    async def _zygote(self, shape: Shape) -> Zygote:
        async with self._zygote_lock:
            zygote = self._zygotes.get(shape)
            if zygote is None or not zygote.alive:
                if zygote is not None:
                    zygote.close()
                root = rootfs.open_host_root()
                try:
                    zygote = await Zygote.start(plan_shape(shape, root), root.fds, self._life_read, self._nursery)
                finally:
                    root.close()
                self._zygotes[shape] = zygote
            return zygote

    def _discard(self, slot: Slot) -> None:
        self._nursery.start_soon(self._dispose, slot)

    async def _dispose(self, slot: Slot) -> None:
        try:
            await slot.dispose()
        except HostError as error:
            # Nobody waits for this; the calls go on, and the count in the statistics says that something is left.
            self._stuck += 1
            _log.error("%s", error)

    async def _keep_house(self) -> None:
        while True:
            await trio.sleep(1)
            for pool in self._pools.values():
                pool.shrink()

    async def warm_up(self, policy: Policy | str = DEFAULT, tenant: str = "default", count: int = 1) -> None:
        """Have ``count`` warm slots ready for calls of this policy and tenant.

        Raises:
            HostError: they could not be built.
        """
        rules = find_policy(policy) if isinstance(policy, str) else policy
        shape = shape_of(msgspec.structs.replace(rules, limits=DEFAULT.limits))
        await self._pool(check_tenant(tenant), shape).fill(count)

    def calls(self) -> dict[str, Call]:
        """The calls that run now, by id."""
        return dict(self._calls)

    def statistics(self) -> ExecutorStats:
        """The executor at this moment."""
        pools = {f"{tenant}/{shape.net}": pool.statistics() for (tenant, shape), pool in self._pools.items()}
        return ExecutorStats(
            running=self._running, queued=len(self._queue), completed=self._completed, refused=self._refused,
            stuck=self._stuck, pools=pools,
        )  # fmt: skip

    async def _close(self) -> None:
        self._closing = True
        os.close(self.null_fd)
        for call in self._calls.values():
            call.kill()
        for pool in self._pools.values():
            pool.close()
        for zygote in self._zygotes.values():
            await zygote.aclose()

    @contextlib.contextmanager
    def _opened(self, workspace: Workspace | str | None) -> Iterator[tuple[int, str]]:
        if workspace is None:
            yield -1, "rw"
            return
        chosen = Workspace(workspace) if isinstance(workspace, str) else workspace
        fd = open_directory(chosen)
        try:
            yield fd, chosen.mode
        finally:
            os.close(fd)


class Running:
    """A call that runs. Its streams are trio's; ``None`` where the call has no pipe of that name."""

    def __init__(self) -> None:
        self.stdin: trio.abc.SendStream | None = None
        self.stdout: trio.abc.ReceiveStream | None = None
        self.stderr: trio.abc.ReceiveStream | None = None
        self._call: Call | None = None
        self._begun = trio.Event()
        self._ended = trio.Event()
        self._result: Result | None = None
        self._error: AgentrunError | None = None
        self.on_dispatched: Callable[[], None] | None = None
        """Called once the tool has its descriptors."""

    @property
    def id(self) -> str:
        """The call's name."""
        return self._call.slot.id if self._call and self._call.slot else ""

    async def wait(self) -> Result:
        """Wait for the call to end.

        Raises:
            HostError: the sandbox failed before the tool could start.
        """
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def send_signal(self, number: int) -> None:
        """Signal the tool's process group; nothing happens if it has ended."""
        if self._call is not None and self._call.slot is not None and not self._ended.is_set():
            self._call.slot.signal_group(number)

    def kill(self) -> None:
        """End the call: everything in its leaf dies, the outcome is ``cancelled``. Nothing happens if it has ended."""
        if self._call is not None and not self._ended.is_set():
            self._call.kill()

    async def aclose(self) -> None:
        """Close the streams."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)

    def _started(self, call: Call) -> None:
        self._call = call
        if self.on_dispatched is not None:
            self.on_dispatched()
        self._begun.set()

    async def _run(
        self, executor: Executor, request: Request, stdio: Stdio, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._perform, executor, request, stdio)
            await self._begun.wait()
            if self._error is not None and self._call is None:
                raise self._error
            for name in tuple(stdio.parent):
                setattr(self, name, trio.lowlevel.FdStream(stdio.give_parent(name)))
            task_status.started()

    async def _perform(self, executor: Executor, request: Request, stdio: Stdio) -> None:
        try:
            self._result = await executor.perform(request, stdio, self)
        except AgentrunError as error:
            self._error = error
        finally:
            self._ended.set()
            self._begun.set()


@contextlib.asynccontextmanager
async def open_executor(config: ExecutorConfig | None = None) -> AsyncIterator[Executor]:
    """An executor for the time of the block: ``async with open_executor() as executor``.

    Must be entered as root, on Linux 5.14 or newer with a cgroup2 mount. Leaving the block ends every call and removes every
    process, mount and cgroup the executor made; so does the death of this process, but for empty cgroups, which the next
    executor removes.

    Raises:
        HostError: the host cannot do it; ``agentrun doctor`` says what is missing.
    """
    chosen = config or ExecutorConfig()
    if os.geteuid() != 0:
        raise HostError("agentrun needs root to make sandboxes (rootless operation is not supported yet)")
    base = find_base()
    remove_stale(base.path)
    tree = Tree(base, chosen.name or f"{os.getpid()}-{time.monotonic_ns():x}")
    try:
        life_read, life_write = os.pipe2(os.O_CLOEXEC)
        try:
            async with trio.open_nursery() as nursery:
                executor = Executor(chosen, tree, nursery, life_read)
                nursery.start_soon(executor._keep_house, name="agentrun housekeeping")
                try:
                    yield executor
                finally:
                    with trio.CancelScope(shield=True):
                        await executor._close()
                    nursery.cancel_scope.cancel()
        finally:
            os.close(life_write)
            os.close(life_read)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(tree.close)
