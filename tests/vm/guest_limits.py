"""What agentrun promises about limits, tried on a kernel with all of cgroup v2: run in a guest by test_limits.py.

    python -m tests.vm.run --ext4 6.1 -- .venv/bin/python -m tests.vm.guest_limits [NAME...]

One process does it all, because importing trio takes a guest four seconds: checks that need a process of their own
are forked from this one before its event loop starts, the others share one executor. Each prints one JSON object,
``{"name", "passed", "detail", "seconds"}``, as soon as it is done; all else goes to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import trio
import trio.testing

from agentrun import PIPE, Executor, ExecutorConfig, HostError, Limits, Outcome, Policy, Result, Running, Workspace, cli
from agentrun import open_executor as open_plain_executor
from agentrun.zygote import Cloned, IdMap, Zygote
from agentrun_shim import syscalls as sc

MIB = 1 << 20
MOUNT = Path("/sys/fs/cgroup")
EXT4 = Path("/mnt/ext4")
CHECK_TIMEOUT = 40.0
CONTROLLERS = {"cpu", "io", "memory", "pids"}
CONFIG = ExecutorConfig(
    pool_most=2,
    tenant_limits={"small": Limits(memory_max=96 * MIB), "few": Limits(memory_max=None, pids_max=24)},
)
HOG = "dd if=/dev/zero bs={}M count=1 status=none"
"""Fills that much anonymous memory, in one read."""

InSandbox = Callable[[Executor], Awaitable[str]]
InProcess = Callable[[], str]
CHECKS: dict[str, InSandbox | InProcess] = {}
CLEAN = "clean"
AnyCheck = TypeVar("AnyCheck", bound=InSandbox | InProcess)


def check(function: AnyCheck) -> AnyCheck:
    """Coroutine functions get the shared executor, others a process of their own. What they return is the detail."""
    CHECKS[function.__name__] = function
    return function


def open_executor() -> contextlib.AbstractAsyncContextManager[Executor]:
    return open_plain_executor(CONFIG)


# --- memory ---------------------------------------------------------------------------------------------------


@check
async def memory_max_kills_the_leaf(executor: Executor) -> str:
    """The hog is in the middle of a pipe, another process is in the background, and the shell would exit with 0."""
    limit = 64 * MIB
    marker = "987651"
    result = await shell(executor, f"sleep {marker} & {HOG.format(300)} | cat; exit 0", memory_max=limit)
    survivors = processes(marker)
    events = flat(leaf_of(executor, result.id) / "memory.events")
    check_memory_killed(result, limit)
    assert not survivors, survivors
    assert events.get("oom_group_kill", 1) == 1, events  # Linux 5.17: it was the kernel that killed them all
    return f"peak {result.usage.memory_peak} of {limit}; {result.verdict.message if result.verdict else ''}"


@check
async def scratch_counts_as_memory(executor: Executor) -> str:
    limit = 32 * MIB
    result = await shell(executor, "dd if=/dev/zero of=/dev/shm/x bs=1M count=64 status=none; exit 0", memory_max=limit)
    check_memory_killed(result, limit)
    return f"peak {result.usage.memory_peak}"


@check
async def tenant_budget_bounds_its_calls_together(executor: Executor) -> str:
    """Each call is far below its own limit; one of another tenant does the same at the same time.

    All of them hold their memory until somebody was killed, and the other tenant's call has all it wants.
    """
    tenant, other = executor.tree.path / "tenant-small", executor.tree.path / "tenant-default"
    results: dict[str, Result] = {}
    ids: dict[str, str] = {}
    enough = trio.Event()

    async def one(name: str, tenant: str, size: int) -> None:
        # The pipe has a reader that never reads, and ends when the call's own stdin does.
        script = f"exec 3<&0; {HOG.format(size)} | cat 4<&0 <&3"
        async with executor.start(["sh", "-c", script], stdin=PIPE, tenant=tenant) as call:
            ids[name] = call.id
            await enough.wait()
            assert call.stdin is not None
            await call.stdin.aclose()
            results[name] = await call.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "bystander", "small", 1)
        nursery.start_soon(one, "first", "small", 64)
        nursery.start_soon(one, "second", "small", 64)
        nursery.start_soon(one, "other", "default", 64)
        while len(ids) < 4 or not flat(tenant / "memory.events")["oom_kill"]:
            await trio.sleep(0.05)
        while number(other / f"call-{ids['other']}" / "memory.current") < 64 * MIB:
            await trio.sleep(0.05)
        enough.set()
    outcomes = {name: result.outcome.value for name, result in results.items()}
    assert list(outcomes.values()).count("memory_killed") == 1, results
    assert results["bystander"].ok, results["bystander"]
    killed = next(result for result in results.values() if result.outcome == "memory_killed")
    assert killed.verdict is not None, killed
    assert "tenant's memory budget" in killed.verdict.message, killed.verdict
    assert results["other"].ok, results["other"]
    after = await shell(executor, "exit 0", tenant="small")
    assert after.ok, after
    assert number(tenant / "memory.peak") <= 97 * MIB, number(tenant / "memory.peak")
    killed = next(result for result in results.values() if result.outcome is Outcome.MEMORY_KILLED)
    return f"{outcomes}; {killed.verdict.message if killed.verdict else ''}"


# --- processes ------------------------------------------------------------------------------------------------


@check
async def leaves_that_wait_have_the_limits_of_the_call_before(executor: Executor) -> str:
    """And a call with others finds its own. The default's have nothing of most of these."""
    names = ("memory.max", "memory.high", "memory.oom.group", "pids.max", "cpu.max", "cpu.max.burst", "cpu.weight")
    expected = {
        "one": ["67108864", "33554432", "1", "51", "50000 100000", "40000", "7"],
        "two": ["max", "max", "0", "max", "20000 100000", "0", "100"],
        "default": ["2147483648", "max", "1", "513", "max 100000", "0", "100"],
    }
    limits = {
        "one": Limits(memory_max=64 * MIB, memory_high=32 * MIB, pids_max=50, cpus=0.5, cpu_burst=0.04, cpu_weight=7),
        "two": Limits(memory_max=None, pids_max=None, cpus=0.2),
        "default": Limits(),
    }
    policies = {name: Policy(name=name, limits=one) for name, one in limits.items()}
    ready = 0
    for name in ("one", "one", "one", "two", "one", "default", "two", "two", "default", "default"):
        result = await executor.run(["sh", "-c", "cd /sys/fs/cgroup; cat " + " ".join(names)], policy=policies[name])
        assert (result.stdout or b"").decode().split("\n")[:-1] == expected[name], (name, result)
        used = leaf_of(executor, result.id)
        await trio.sleep(0.5)  # the next one is built
        waiting = [leaf for leaf in used.parent.glob("call-*") if leaf != used]
        found = [[(leaf / file).read_text().strip() for file in names] for leaf in waiting]
        assert expected[name] in found, (name, found)
        ready += found.count(expected[name])
    return f"{ready} times a leaf had the next call's limits before it came"


@check
async def pids_max_stops_a_fork_storm(executor: Executor) -> str:
    storm = "i=0; while [ $i -lt 60 ]; do sleep 987652 & i=$((i+1)); done; echo unreachable"
    result = await shell(executor, storm, pids_max=20)
    survivors = processes("987652")
    assert result.outcome is Outcome.EXITED, result
    assert result.exit_code, result
    assert result.stdout == b"", result
    assert b"fork" in (result.stderr or b""), result
    assert result.usage.pids_peak is not None, result
    assert 19 <= result.usage.pids_peak <= 21, result
    assert not survivors, survivors
    return f"peak {result.usage.pids_peak}; {(result.stderr or b'').decode().strip()}"


@check
async def fork_bomb_is_contained(executor: Executor) -> str:
    """It forks faster than anything is killed one by one; what ends it is the deadline."""
    started = trio.current_time()
    result = await shell(executor, "b() { b | b & }; b; sleep 987653", pids_max=20, timeout=1.5)
    took = trio.current_time() - started
    survivors = processes("b() { b | b")
    assert result.outcome in (Outcome.TIMED_OUT, Outcome.EXITED), result  # dash may give up by itself: "Cannot fork"
    assert (result.usage.pids_peak or 0) <= 21, result
    assert not survivors, survivors
    return f"{result.outcome.value} after {took:.2f} s, peak {result.usage.pids_peak}"


@check
async def tenant_pids_budget_holds_by_itself(executor: Executor) -> str:
    """Of a call's own limits RLIMIT_NPROC is always reached first; here only the controller can be what says no."""
    result = await shell(executor, "i=0; while [ $i -lt 60 ]; do sleep 987654 & i=$((i+1)); done", tenant="few")
    peak = number(executor.tree.path / "tenant-few" / "pids.peak")
    assert result.exit_code, result
    assert b"fork" in (result.stderr or b""), result
    assert peak == 24, peak
    assert (result.usage.pids_peak or 0) < 25, result  # the warm sandboxes have the rest
    after = await shell(executor, "exit 0", tenant="few")
    assert after.ok, after
    return f"peak {peak}, the call's {result.usage.pids_peak}; the next call: {after.outcome.value}"


# --- CPU ------------------------------------------------------------------------------------------------------


@check
async def cpus_is_a_share_of_a_processor(executor: Executor) -> str:
    result = await shell(executor, "while :; do :; done", cpus=0.5, timeout=2.0)
    usage = result.usage
    share = (usage.cpu_user + usage.cpu_system) / usage.wall
    assert result.outcome is Outcome.TIMED_OUT, result
    assert 0.35 <= share <= 0.65, result
    assert usage.throttled, result  # how much of it the kernel books depends on how the emulator gets to run
    return f"share {share:.3f}, throttled {usage.throttled:.2f} s of {usage.wall:.2f} s"


# --- the leaf's files -----------------------------------------------------------------------------------------


@check
async def leaf_has_the_policys_numbers(executor: Executor) -> str:
    """Three policies, one pool: a call's own limits are written over the pool's, or lifted."""
    default = {"memory.oom.group": "1", "memory.max": str(2048 * MIB), "memory.swap.max": "0", "pids.max": "513"}
    own = Limits(memory_max=100 * MIB, memory_swap_max=8 * MIB, pids_max=50, cpus=0.75, cpu_weight=50)
    none = Limits(memory_max=None, memory_swap_max=None, pids_max=None)
    cases = (
        (Limits(), {**default, "cpu.max": "max 100000", "cpu.weight": "100"}),
        (own, {"memory.oom.group": "1", "memory.max": str(100 * MIB), "memory.swap.max": str(8 * MIB), "pids.max": "51",
               "cpu.max": "75000 100000", "cpu.weight": "50"}),
        (none, {"memory.oom.group": "0", "memory.max": "max", "memory.swap.max": "max", "pids.max": "max"}),
        (Limits(), default),
    )  # fmt: skip
    pools = set(executor.statistics().pools)
    for limits, expected in cases:
        async with held(executor, ":", Policy(limits=limits)) as (call, leaf):
            files = {name: text(leaf / name) for name in expected if name != "memory.swap.max" or (leaf / name).exists()}
            result = await call.release()
        assert result.unenforced == (), result
        assert files == {name: expected[name] for name in files}, (limits, files)
    assert set(executor.statistics().pools) - pools <= {"default/none"}
    return f"{len(cases)} calls; swap: {'memory.swap.max' in files}"


@check
async def nothing_is_unenforced(executor: Executor) -> str:
    limits = Limits(memory_max=64 * MIB, memory_swap_max=0, pids_max=20, cpus=0.5, cpu_weight=200)
    result = await executor.run(["true"], policy=Policy(limits=limits))
    assert result.ok, result
    assert result.unenforced == (), result
    assert executor.tree.controllers == CONTROLLERS, executor.tree.controllers
    return " ".join(sorted(executor.tree.controllers))


# --- accounting -----------------------------------------------------------------------------------------------


async def idle_cpu(executor: Executor) -> dict[str, float]:
    """The processor time that building each warm sandbox took, by the name of its leaf: it is not the tool's."""
    await executor.warm_up()
    while any(pool.building for pool in executor.statistics().pools.values()):
        await trio.sleep(0.01)
    return {leaf.name: account(leaf).cpu for leaf in Path(executor.tree.path).glob("tenant-*/call-*")}


@check
async def usage_is_what_the_kernel_says(executor: Executor) -> str:
    """Read just before the tool ends (it waits for its stdin), and at once after the result, when all are dead."""
    work = f"{HOG.format(16)} | cat > /dev/null; i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done"
    idle = await idle_cpu(executor)
    async with held(executor, work, Policy()) as (call, leaf):
        before = account(leaf)
        usage = (await call.release()).usage
    assert 0 <= usage.cpu_user + usage.cpu_system - (before.cpu - idle[leaf.name]) < 0.3, (usage, before, idle)
    assert usage.cpu_user > 0, usage
    assert usage.memory_source == "memory.peak", usage
    assert 16 * MIB < before.memory_peak <= (usage.memory_peak or 0) < before.memory_peak + MIB, (usage, before)
    assert usage.pids_peak == before.pids_peak == 4, (usage, before)  # init, the shell, dd, cat
    assert usage.throttled == 0, usage

    idle = await idle_cpu(executor)
    result = await executor.run(["sh", "-c", work])
    leaf = leaf_of(executor, result.id)
    after = account(leaf)  # it is removed in the background, so it is still there
    usage, spent = result.usage, after.cpu - idle[leaf.name]
    assert abs(usage.cpu_user + usage.cpu_system - spent) < 0.02, (usage, after, idle)
    assert usage.memory_peak == after.memory_peak, (usage, after)
    assert usage.pids_peak == after.pids_peak, (usage, after)
    assert (usage.io_read, usage.io_written) == (after.read, after.written), (usage, after)
    return f"cpu {usage.cpu_user + usage.cpu_system:.6f} and {spent:.6f}, memory {after.memory_peak}, pids {after.pids_peak}"


@check
async def io_is_what_the_kernel_says(executor: Executor) -> str:
    directory = made(EXT4 / "io")
    script = (
        "dd if=/dev/zero of=f bs=1M count=6 conv=fsync status=none && dd if=f of=/dev/null bs=1M count=4 iflag=direct status=none"
    )
    result = await executor.run(["sh", "-c", script], workspace=str(directory))
    after = account(leaf_of(executor, result.id))
    usage = result.usage
    assert result.ok, result
    assert (usage.io_read, usage.io_written) == (after.read, after.written), (usage, after)
    assert 4 * MIB <= after.read < 5 * MIB, after
    assert 6 * MIB <= after.written < 8 * MIB, after
    return f"read {after.read}, written {after.written}"


# --- files ----------------------------------------------------------------------------------------------------


@check
async def scratch_is_bounded(executor: Executor) -> str:
    policy = Policy(scratch_size=8 * MIB)
    script = "dd if=/dev/zero of=/tmp/x bs=1M count=16 status=none; echo $?; stat -c %s /tmp/x; head -c 1 /dev/zero > /dev/shm/y"
    result = await executor.run(["sh", "-c", script], policy=policy)
    status, size = (result.stdout or b"").split()
    assert result.outcome is Outcome.EXITED, result
    assert result.exit_code, result
    assert status == b"1", result
    assert 7 * MIB <= int(size) <= 8 * MIB, result
    assert (result.stderr or b"").count(b"No space left on device") == 2, result
    script = "ls /tmp /dev/shm; dd if=/dev/zero of=/tmp/x bs=1M count=4 status=none"
    fresh = await executor.run(["sh", "-c", script], policy=policy)
    assert fresh.ok, fresh
    assert fresh.stdout == b"/dev/shm:\n\n/tmp:\n", fresh
    return f"{int(size)} of {policy.scratch_size}"


@check
async def workspace_on_ext4(executor: Executor) -> str:
    return await use_workspace(executor, made(EXT4 / "workspace"))


@check
async def workspace_on_tmpfs(executor: Executor) -> str:
    """Works where tmpfs can be idmapped (Linux 6.3); else it is refused in clear words, and read-only still works."""
    directory = made(Path("/tmp/agentrun-workspace"))
    if can_map_owners(directory):
        return await use_workspace(executor, directory)
    try:
        await executor.run(["true"], workspace=str(directory))
    except HostError as error:
        message = str(error)
    else:
        raise AssertionError("not refused")
    assert str(directory) in message, message
    assert "cannot map owners" in message, message
    assert "read-only" in message, message
    (directory / "seen").write_text("seen")
    (directory / "seen").chmod(0o644)
    result = await executor.run(["sh", "-c", "cat seen; echo > new"], workspace=Workspace(str(directory), "ro"))
    assert result.stdout == b"seen", result
    assert b"Read-only file system" in (result.stderr or b""), result
    return f"refused: {message}"


@check
async def copy_on_write_on_ext4(executor: Executor) -> str:
    """Overlay over idmapped layers; on kernels that want them attached, too. All that it leaves is in the store, and applied."""
    directory, store = made(EXT4 / "cow"), made(EXT4 / "changes")
    os.environ["AGENTRUN_CHANGES"] = str(store)
    for name in ("kept", "edited", "gone"):
        (directory / name).write_text(name)
    (directory / "tree" / "inner").mkdir(parents=True)
    (directory / "tree" / "inner" / "file").write_text("file")
    before = {str(path): path.lstat() for path in directory.rglob("*")}
    script = "echo more >> edited; rm -r gone tree; mkdir new tree; echo x > new/file; ln -s file new/link; stat -c ' %u:%g' new"
    result = await executor.run(["sh", "-c", script], workspace=Workspace(str(directory), "cow"))
    assert result.ok, result
    assert result.stdout == b" 1000:1000\n", result
    assert {str(path): path.lstat() for path in directory.rglob("*")} == before
    assert result.changes is not None, result
    counts = (result.changes.added, result.changes.modified, result.changes.deleted)
    assert counts == (3, 1, 3), result.changes
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(["apply", result.changes.id])
    assert code == 0, said.getvalue()
    found = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    assert found == {"kept", "edited", "tree", "new", "new/file", "new/link"}, found
    assert (directory / "edited").read_text() == "editedmore\n"
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in directory.rglob("*")}
    assert owners == {(os.geteuid(), os.getegid())}, owners
    left = [path.name for path in store.iterdir()]
    assert left == ["lock"], left
    return f"{result.changes}; in {result.timings.total:.3f} s"


# --- in a process of its own ----------------------------------------------------------------------------------


@check
def base_named_by_the_environment() -> str:
    base = made(MOUNT / "named")
    os.environ["AGENTRUN_CGROUP"] = str(base)
    tree = trio.run(run_below, base)
    assert not tree.exists(), list(base.iterdir())
    base.rmdir()
    return str(tree)


@check
def base_delegated_by_user_xattr() -> str:
    return run_delegated("user.delegate")


@check
def base_delegated_by_trusted_xattr() -> str:
    return run_delegated("trusted.delegate")


@check
def works_without_clone3() -> str:
    """Seccomp profiles of old container engines refuse clone3: the leaf is then joined, not born into."""
    direct: list[bool] = []
    clone = Zygote.clone

    async def without(self: Zygote, control: socket.socket, leaf_fd: int, maps: Sequence[IdMap], **_: bool) -> Cloned:
        cloned = await clone(self, control, leaf_fd, maps, use_clone3=False)
        direct.append(cloned.used_clone3)
        return cloned

    Zygote.clone = without  # type: ignore[method-assign]  # this process is ours alone

    async def main() -> tuple[Result, Result]:
        async with open_executor() as executor:
            return await shell(executor, "echo out"), await shell(executor, HOG.format(64), memory_max=32 * MIB)

    plain, killed = trio.run(main)
    assert plain.stdout == b"out\n", plain
    check_memory_killed(killed, 32 * MIB)
    assert direct, "no sandbox was built"
    assert not any(direct), direct
    return f"{len(direct)} sandboxes"


@check
def doctor_finds_everything() -> str:
    """The command's own entry point, but without the six seconds in which another Python would import it."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = cli.main(["doctor", "--json"])
    report = msgspec.json.decode(output.getvalue())
    state = {finding["feature"]: finding["state"] for finding in report["findings"]}
    must = ["root", "native slot", "cgroup v2", *(f"controller {name}" for name in CONTROLLERS)]
    must += ["cgroup.kill", "mount API", "sandbox", "fallback without clone3"]
    assert status == 0, report
    assert report["usable"], report
    assert {name: state.get(name) for name in must} == dict.fromkeys(must, "works"), report
    for name in ("memory.peak", "pids.peak"):
        assert state[name] == ("works" if has_file(name) else "degraded"), report
    assert state["writable workspaces"] == ("works" if can_map_owners(Path("/tmp")) else "degraded"), report
    return " ".join(f"{name}={value}" for name, value in state.items() if value != "works")


@check
def killed_owner_leaves_nothing() -> str:
    """SIGKILL to the executor's process: its sandboxes die with it, and the next executor removes the cgroups."""
    marker = "987655"
    read, write = os.pipe()
    owner = os.fork()
    if owner == 0:

        async def main() -> None:
            async with open_executor() as executor, held(executor, f"sleep {marker} &"):
                os.write(write, os.fsencode(executor.tree.path))
                await trio.sleep_forever()

        try:
            trio.run(main)
        finally:
            os._exit(1)
    os.close(write)
    tree = Path(os.read(read, 4096).decode())
    running = processes(marker)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    began = time.monotonic()
    while flat(tree / "cgroup.events")["populated"]:
        assert time.monotonic() < began + 10, processes("agentrun")
        time.sleep(0.01)
    took = time.monotonic() - began
    assert running, "there was nothing to kill"
    assert not processes(marker)
    assert list(tree.glob("tenant-*/call-*")), "there was nothing to remove"

    async def successor() -> None:
        async with open_executor():
            assert not tree.exists(), "the next executor did not remove it"

    trio.run(successor)
    return f"all dead {took * 1000:.0f} ms after their owner"


# --- helpers --------------------------------------------------------------------------------------------------


async def shell(
    executor: Executor,
    script: str,
    *,
    tenant: str = "default",
    timeout: float = 30.0,
    memory_max: int | None = Limits().memory_max,
    pids_max: int | None = Limits().pids_max,
    cpus: float | None = None,
) -> Result:
    policy = Policy(limits=Limits(memory_max=memory_max, pids_max=pids_max, cpus=cpus), timeout=timeout)
    return await executor.run(["sh", "-c", script], policy=policy, tenant=tenant)


class Held:
    """A call that waits for its stdin to be closed."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def release(self) -> Result:
        assert self._running.stdin is not None
        await self._running.stdin.aclose()
        return await self._running.wait()


@contextlib.asynccontextmanager
async def held(executor: Executor, script: str, policy: Policy | None = None) -> AsyncIterator[tuple[Held, Path]]:
    """A call that has run `script` and does nothing until it is released, and its leaf."""
    argv = ["sh", "-c", f"{script}\necho held; read line; exit 0"]
    async with executor.start(argv, stdin=PIPE, policy=policy or Policy()) as running:
        assert running.stdout is not None
        with trio.fail_after(20):
            said = await running.stdout.receive_some()
        assert said == b"held\n", said
        yield Held(running), leaf_of(executor, running.id)


def leaf_of(executor: Executor, name: str) -> Path:
    return executor.tree.path / "tenant-default" / f"call-{name}"


def check_memory_killed(result: Result, limit: int) -> None:
    peak = result.usage.memory_peak
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert result.exit_code is None, result
    assert result.returncode == 137, result
    assert result.usage.memory_source == "memory.peak", result
    assert peak is not None, result
    assert 0.9 * limit <= peak <= limit, result
    assert result.verdict is not None, result
    assert result.verdict.reason == "memory", result
    assert str(limit) in result.verdict.message, result
    assert str(peak) in result.verdict.message, result


class Account(NamedTuple):
    """A leaf's account, read without agentrun's help."""

    cpu: float
    memory_peak: int
    pids_peak: int
    read: int
    written: int


def account(leaf: Path) -> Account:
    fields = [field.split("=") for line in text(leaf / "io.stat").splitlines() for field in line.split()[1:]]
    cpu = flat(leaf / "cpu.stat")
    return Account(
        cpu=(cpu["user_usec"] + cpu["system_usec"]) / 1e6,
        memory_peak=number(leaf / "memory.peak"),
        pids_peak=number(leaf / "pids.peak"),
        read=sum(int(value) for key, value in fields if key == "rbytes"),
        written=sum(int(value) for key, value in fields if key == "wbytes"),
    )


def text(path: Path) -> str:
    return path.read_text().strip()


def number(path: Path) -> int:
    return int(text(path))


def flat(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


def has_file(name: str) -> bool:
    probe = made(MOUNT / "probe")
    try:
        return (probe / name).exists()
    finally:
        probe.rmdir()


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def processes(*needles: str) -> list[str]:
    """Command lines of living processes that contain a needle; never our own, nor those of zombies (they are empty)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if path.parent.name != str(os.getpid()) and any(needle in line for needle in needles):
            found.append(f"{path.parent.name} {line}")
    return found


async def use_workspace(executor: Executor, directory: Path) -> str:
    """The tool reads, writes and owns what is the caller's; on the disk it is still the caller's."""
    (directory / "given").write_text("given")
    (directory / "given").chmod(0o600)
    result = await executor.run(
        ["sh", "-c", "pwd; cat given; stat -c ' %u:%g' given; echo new > new; mkdir sub; touch sub/file; rm given"],
        workspace=str(directory),
    )
    assert result.ok, result
    assert result.stdout == f"{directory}\ngiven 1000:1000\n".encode(), result
    owners = {str(path.relative_to(directory)): (path.stat().st_uid, path.stat().st_gid) for path in directory.rglob("*")}
    mine = (os.geteuid(), os.getegid())
    assert owners == {"new": mine, "sub": mine, "sub/file": mine}, owners
    assert (directory / "new").read_text() == "new\n"
    return str(owners)


def can_map_owners(directory: Path) -> bool:
    """Ask the kernel, not its version. Any user namespace will do; util-linux makes one."""
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"\n"
        userns = os.open(f"/proc/{other.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        mount = sc.open_tree(sc.AT_FDCWD, str(directory), sc.OPEN_TREE_CLONE)
        try:
            sc.mount_setattr(mount, sc.MOUNT_ATTR_IDMAP, userns_fd=userns)
        except OSError:
            return False
        finally:
            os.close(mount)
            os.close(userns)
    return True


async def run_below(base: Path) -> Path:
    """A call in an executor whose tree must be below `base`; returns where the tree was."""
    async with open_executor() as executor:
        tree = executor.tree.path
        assert tree.parent == base, tree
        result = await shell(executor, HOG.format(64), memory_max=32 * MIB, pids_max=20, cpus=2.0)
        check_memory_killed(result, 32 * MIB)
        assert result.unenforced == (), result
        assert set(text(base / "cgroup.subtree_control").split()) >= CONTROLLERS
    return tree


def run_delegated(attribute: str) -> str:
    """What systemd does for Delegate=yes: a cgroup with the mark, and us in it."""
    base = made(MOUNT / attribute)
    os.setxattr(base, attribute, b"1")
    (base / "cgroup.procs").write_text(str(os.getpid()))
    tree = trio.run(run_below, base)
    own = Path("/proc/self/cgroup").read_text().strip()
    assert own == f"0::/{base.name}/supervisor", own
    assert not tree.exists(), list(base.iterdir())
    (MOUNT / "cgroup.procs").write_text(str(os.getpid()))
    (base / "supervisor").rmdir()
    base.rmdir()
    return f"{tree}, we were moved to {own}"


# --- running them ---------------------------------------------------------------------------------------------


class Traces(NamedTuple):
    """What an executor could leave behind."""

    cgroups: list[str]
    mounts: list[str]
    processes: list[str]
    descriptors: list[str]


def traces() -> Traces:
    return Traces(
        cgroups=sorted(str(path) for path in MOUNT.rglob("*") if path.is_dir()),
        mounts=[line.split(" ", 2)[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()],
        processes=processes("agentrun-zygote", "agentrun-slot", "98765"),
        descriptors=sorted(os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()),
    )


class Verdict(msgspec.Struct):
    name: str
    passed: bool
    detail: str
    seconds: float


@contextlib.contextmanager
def verdict(name: str) -> Iterator[list[str]]:
    """Print one check's verdict when the block ends; the block appends the detail."""
    began = time.monotonic()
    details: list[str] = []
    passed = True
    try:
        yield details
    except (Exception, BaseExceptionGroup):  # noqa: BLE001 - whatever goes wrong is this check's verdict
        passed, details = False, [traceback.format_exc()]
    line = msgspec.json.encode(Verdict(name, passed, "\n".join(details), round(time.monotonic() - began, 3)))
    print(line.decode(), flush=True)


def in_process(name: str, function: InProcess) -> None:
    """Fork, so that the check can change its environment, its cgroup and its modules."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            with verdict(name) as details:
                details.append(function())
        finally:
            sys.stderr.flush()
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    ended, _, _ = select.select([pidfd], [], [], CHECK_TIMEOUT)
    os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        detail = f"its process ended with {status} after {time.monotonic() - began:.1f} s"
        print(msgspec.json.encode(Verdict(name, False, detail, CHECK_TIMEOUT)).decode(), flush=True)


async def in_executor(checks: Mapping[str, InSandbox]) -> None:
    async with open_executor() as executor:
        for name, function in checks.items():
            with verdict(name) as details, trio.fail_after(CHECK_TIMEOUT):
                details.append(await function(executor))
        stuck = executor.statistics().stuck
        assert stuck == 0, f"{stuck} sandboxes could not be removed"


def main(names: Sequence[str]) -> None:
    chosen = {name: function for name, function in CHECKS.items() if not names or name in names}
    sandboxed: dict[str, InSandbox] = {}
    before = traces()
    for name, function in chosen.items():
        if inspect.iscoroutinefunction(function):
            sandboxed[name] = function
        else:
            in_process(name, function)  # type: ignore[arg-type]
    with verdict(CLEAN) as details:
        if sandboxed:
            trio.run(functools.partial(in_executor, sandboxed))
        after = traces()
        for field in Traces._fields:
            assert getattr(after, field) == getattr(before, field), (field, before, after)
        details.append(", ".join(f"{field}: {len(getattr(after, field))}" for field in Traces._fields))


if __name__ == "__main__":
    main(sys.argv[1:])
