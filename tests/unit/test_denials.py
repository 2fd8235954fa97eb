# SPDX-License-Identifier: Apache-2.0
"""The task that answers for refused calls, and what it counts: with real processes under real filters."""

import errno
import gc
import json
import os
import time
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from agentrun.denials import Denials, Denied
from agentrun_shim.seccomp import find_profile
from agentrun_shim.seccomp_profile import Profile
from agentrun_shim.syscall_table import NUMBERS
from tests.unit.listener_support import Child, child, is_open
from tests.unit.seccomp_support import needs_kernel, profile_of

pytestmark = needs_kernel
ACCT, KCMP, CHMOD, GETPPID, MOUNT = (NUMBERS[name] for name in ("acct", "kcmp", "chmod", "getppid", "mount"))
PROFILE = profile_of(
    {"names": ["acct", "kcmp"], "action": "SCMP_ACT_ERRNO"},
    {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13, "args": [{"index": 1, "op": "SCMP_CMP_EQ", "value": 7}]},
    {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
    {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
)
LOGS = profile_of({"names": ["getppid"], "action": "SCMP_ACT_LOG"}, {"names": ["acct"], "action": "SCMP_ACT_ERRNO"})


def with_denials(body: Callable[[Denials], Awaitable[None]], **options: int) -> None:
    async def main() -> None:
        denials = Denials(**options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(denials.run)
            with trio.fail_after(60):
                await body(denials)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def result(process: Child) -> object:
    """What the child printed, waited for without holding up the task that answers it."""
    process.go()
    out = await trio.to_thread.run_sync(process.process.communicate)
    assert process.process.returncode == 0, out
    return json.loads(out[0])


def test_refused_calls_get_the_profiles_errno_and_are_counted() -> None:
    async def body(denials: Denials) -> None:
        calls = (
            f"[call({ACCT}, 1), call({KCMP}), call({ACCT}, 1), call({CHMOD}, 0, 7), call({CHMOD}, 0, 8), call({MOUNT}, 0, 0, 0)]"
        )
        with child(PROFILE, calls) as process:
            denials.watch(process.listener, "one", PROFILE)
            assert await result(process) == [-errno.EPERM, -errno.EPERM, -errno.EPERM, -errno.EACCES, 0, -errno.ENOSYS]
            expected = {Denied("acct", 2, 1), Denied("kcmp", 1, 1), Denied("chmod", 1, 13), Denied("chmod", 1, 0)}
            found = denials.take("one")
            assert (found[0], set(found), len(found)) == (Denied("acct", 2, 1), expected, 4)
            assert denials.take("one") == ()
            denials.forget("one")
            assert not is_open(process.listener)

    with_denials(body)


def test_logged_calls_go_on_and_are_counted() -> None:
    async def body(denials: Denials) -> None:
        with child(LOGS, f"[call({GETPPID}), call({GETPPID}), call({ACCT}, 1)]") as process:
            denials.watch(process.listener, 1, LOGS)
            assert await result(process) == [os.getpid(), os.getpid(), -errno.EPERM]
            assert denials.take(1) == (Denied("getppid", 2, None), Denied("acct", 1, 1))

    with_denials(body)


@pytest.mark.parametrize("name", ["default", "strict"])
def test_a_shipped_profile_with_a_supervisor(name: str) -> None:
    profile = find_profile(name)
    calls = {"unshare": 0x10000000, "clone3": 0, "socket": 38, "ioctl": 0, "personality": 0x40000, "getpid": 0, "bpf": 0}

    async def body(denials: Denials) -> None:
        with child(
            profile, str([f"call({NUMBERS[call]}, {arg}, 0x5412)" for call, arg in calls.items()]).replace("'", "")
        ) as process:
            denials.watch(process.listener, "x", profile)
            found = await result(process)
            assert isinstance(found, list)
            eperm, pid = -errno.EPERM, process.process.pid
            assert found == [eperm, -errno.ENOSYS, -errno.EAFNOSUPPORT, eperm, eperm, pid, eperm]
            assert set(denials.take("x")) == {
                *(Denied(call, 1, errno.EPERM) for call in ("unshare", "ioctl", "personality", "bpf")),
                Denied("socket", 1, errno.EAFNOSUPPORT),
            }

    with_denials(body)


def test_many_tools_at_once_are_kept_apart() -> None:
    async def body(denials: Denials) -> None:
        async def one(key: int) -> None:
            with child(PROFILE, f"[call({ACCT if key % 2 else KCMP}, 1) for _ in range({key + 1})]") as process:
                denials.watch(process.listener, key, PROFILE)
                assert await result(process) == [-errno.EPERM] * (key + 1)
                assert denials.take(key) == (Denied("acct" if key % 2 else "kcmp", key + 1, 1),)
                denials.forget(key)

        async with trio.open_nursery() as nursery:
            for key in range(6):
                nursery.start_soon(one, key)

    with_denials(body)


def test_after_so_many_a_listener_is_closed() -> None:
    async def body(denials: Denials) -> None:
        with child(PROFILE, f"[call({ACCT}, 1) for _ in range(50)]") as process:
            denials.watch(process.listener, "busy", PROFILE)
            assert await result(process) == [-errno.EPERM] * 20 + [-errno.ENOSYS] * 30
            assert not is_open(process.listener)
            assert denials.take("busy") == (Denied("acct", 20, 1),)
            denials.forget("busy")

    with_denials(body, most=20)


def test_a_tool_whose_calls_are_logged_is_slowed_down_instead() -> None:
    async def body(denials: Denials) -> None:
        with child(LOGS, f"[call({GETPPID}) for _ in range(120)]") as process:
            denials.watch(process.listener, "busy", LOGS)
            begun = time.monotonic()
            assert await result(process) == [os.getpid()] * 120
            assert time.monotonic() - begun > 100 * 0.002
            assert denials.take("busy") == (Denied("getppid", 120, None),)
            with trio.fail_after(5):
                while is_open(process.listener):  # nobody has the filter any more
                    await trio.sleep(0.01)

    with_denials(body, most=20)


def test_other_tasks_run_while_a_tool_is_busy() -> None:
    async def body(denials: Denials) -> None:
        with child(PROFILE, f"len([call({ACCT}, 1) for _ in range(20000)])") as process:
            denials.watch(process.listener, "busy", PROFILE)
            worst = 0.0

            async def others() -> None:
                nonlocal worst
                while True:
                    before = trio.current_time()
                    await trio.sleep(0)
                    worst = max(worst, trio.current_time() - before)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(others)
                assert await result(process) == 20000
                nursery.cancel_scope.cancel()
            assert worst < 0.5

    with_denials(body, most=10**9)


def test_a_tool_killed_while_it_waits() -> None:
    async def body(denials: Denials) -> None:
        for _ in range(20):
            with child(PROFILE, f"[call({ACCT}, 1) for _ in range(100000)]") as process:
                denials.watch(process.listener, "killed", PROFILE)
                process.go()
                while not (told := denials.take("killed")):
                    await trio.sleep(0.002)
                process.process.kill()
                await trio.to_thread.run_sync(process.process.wait)
                with trio.fail_after(5):
                    while is_open(process.listener):
                        await trio.sleep(0.01)
                assert [(one.syscall, one.errno) for one in told] == [("acct", 1)]
                denials.forget("killed")

    with_denials(body, most=10**9)


def test_a_listener_nobody_used() -> None:
    async def body(denials: Denials) -> None:
        with child(PROFILE, "1") as process:
            denials.watch(process.listener, "idle", PROFILE)
            with pytest.raises(ValueError, match="'idle' is watched already"):
                denials.watch(process.listener, "idle", PROFILE)
            assert denials.take("idle") == denials.take("nobody") == ()
            denials.forget("nobody")
            assert await result(process) == 1

    with_denials(body)


def test_the_end_of_the_task_leaves_nobody_waiting() -> None:
    async def main() -> None:
        denials = Denials()
        with child(PROFILE, f"call({ACCT}, 1)") as process:
            denials.watch(process.listener, "x", PROFILE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(denials.run)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert not is_open(process.listener)
            process.go()
            assert process.result() == -errno.ENOSYS
        denials.close()

    trio.run(main)
    gc.collect()


def test_what_the_profile_would_allow_is_refused() -> None:
    """A filter of another profile: nobody can have meant that, so it must not become a way to be allowed something."""

    async def body(denials: Denials) -> None:
        other: Profile = profile_of()
        with child(PROFILE, f"call({ACCT}, 1)") as process:
            denials.watch(process.listener, "x", other)
            assert await result(process) == -errno.EPERM

    with_denials(body)
