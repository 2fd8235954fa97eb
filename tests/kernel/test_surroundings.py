# SPDX-License-Identifier: Apache-2.0
"""A host that changes under a running executor, or that is not all it seems: what goes on working, and how."""

import subprocess
import sys

import pytest
import trio.testing

from agentrun import Policy, UsageError
from agentrun.policy import Limits
from agentrun.units import MIB
from tests.support import with_executor

pytestmark = pytest.mark.host

RENAMED = """
import os, shutil, trio
from pathlib import Path
from agentrun import open_executor
from tests.support import own_config

async def main():
    async with open_executor(own_config(pool_least=2)) as executor:
        async def who():
            return (await executor.run(["sh", "-c", "whoami; id -gn; grep -c ^newbie: /etc/passwd"])).stdout.decode().split()
        assert await who() == ["tool", "tool", "0"], await who()
        for name, line in (("passwd", "newbie:x:1000:1000::/:/bin/sh"), ("group", "newbie:x:1000:")):
            new = Path("/etc", f"{name}.new")
            shutil.copyfile(f"/etc/{name}", new)
            new.open("a").write(line + chr(10) + line.replace("1000", "4711") + chr(10))
            new.rename(f"/etc/{name}")
        with trio.fail_after(20):
            # ours goes before any of the host's with the same number; the other is there as it is
            while await who() != ["tool", "tool", "1"]:
                await trio.sleep(0.05)
trio.run(main)
"""

LISTENED = """
import ctypes, trio
from agentrun import open_executor
from agentrun_shim.seccomp import compile_profile
from agentrun_shim.seccomp_profile import load_profile
from tests.support import own_config

around = load_profile(b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["nfsservctl"], "action": "SCMP_ACT_ERRNO"}]}')
program = compile_profile(around, notify=True)
libc = ctypes.CDLL(None, use_errno=True)
text = ctypes.create_string_buffer(program)

class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

listener = libc.syscall(317, 1, 8, ctypes.byref(Fprog(len(program) // 8, ctypes.addressof(text))))  # NEW_LISTENER
assert listener >= 0, ctypes.get_errno()
script = "import ctypes; print(ctypes.CDLL(None).syscall(321, 0, 0, 0))"

async def main():
    async with open_executor(own_config(pool_least=4)) as executor:
        results = []
        async def call():
            results.append(await executor.run(["/usr/bin/python3", "-c", script]))
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(call)
        print(*((result.stdout.decode().strip(), len(result.denied)) for result in results))
        print(sum(pool.failed for pool in executor.statistics().pools.values()))
trio.run(main)
"""


def run(script: str, *front: str) -> str:
    done = subprocess.run([*front, sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_accounts_that_are_renamed_into_place(tmp_path):
    """As useradd does it, on an /etc of our own; the kernel detaches what was bound over the old file, everywhere."""
    subprocess.run(["cp", "-a", "/etc", tmp_path / "etc"], check=True)
    run(RENAMED, "unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc && exec "$@"', str(tmp_path / "etc"))


def test_a_listener_around_us_costs_the_reports_and_nothing_else():
    """The kernel takes one listener for all filters of a process: EBUSY, and for several builds at once."""
    assert run(LISTENED) == " ".join(["('-1', 0)"] * 8) + "\n0\n"


def test_a_request_that_is_none_makes_nothing():
    async def body(executor):
        for argv, tenant in (([], "stranger"), (["a\0b"], "stranger"), (["true"], "no/name")):
            with pytest.raises(UsageError):
                await executor.run(argv, tenant=tenant)
        assert not list(executor.tree.path.glob("tenant-*"))
        assert executor.statistics().pools == {}

    with_executor(body)


def test_what_is_remembered_of_policies_is_bounded():
    async def body(executor):
        for number in range(1, 1200):
            executor.resolver.resolve(["true"], hint=f"memory:{number}m")
        assert len(executor._terms._equal) <= 1024
        for number in range(1, 1200):
            limits = Limits(memory_max=MIB * (number + 100))
            executor.resolver.resolve(["true"], policy=Policy(name="own", limits=limits, best_effort=True))
        book = executor._terms
        assert len(book._met) <= 1024
        assert len(book._equal) <= 1024
        assert len(executor.statistics().pools) == 1, "limits make no pool of their own"

    with_executor(body)


def test_what_is_ready_for_tenants_is_bounded():
    async def body(executor):
        for number in range(20):
            await executor.run(["true"], tenant=f"t{number}")
            await trio.testing.wait_all_tasks_blocked()  # the chores of the call are done
        assert len(executor._kits._ready) == 16

    with_executor(body, pool_least=0, pool_most=0)
