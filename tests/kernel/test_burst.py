# SPDX-License-Identifier: Apache-2.0
"""Memory bursts on this host, whatever it has: with the programs in the kernel, every way to use memory is held to its budget.

How far each went beyond it, and how fast, is measured by ``python -m bench.burst``; here it only has to be held.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import trio

from agentrun import Limits, Outcome, Policy
from agentrun.burst.ladder import Mode
from tests.hog import GROWING, available, compile_hog
from tests.kernel.wall import public_directory
from tests.requirements import lacking
from tests.support import PYTHON, Blocking, Leaks, cgroup_of, eventually, missing_requirement, own_config

pytestmark = pytest.mark.host

MIB = 1 << 20
BUDGET = 64 * MIB
HUGE_PAGE = 2 * MIB


@pytest.fixture(scope="module")
def hog():
    """Where every sandbox sees it."""
    with public_directory() as directory:
        yield str(compile_hog(directory))


@pytest.fixture(scope="module")
def bursts():
    """An executor with its probes process; nothing of either may be left afterwards."""
    if reason := missing_requirement():
        lacking(reason)
    config = own_config(probes=True)
    before = Leaks(cgroup_of(config.name))
    running = Blocking(config)
    try:
        running.call(running.executor.memory.wait_ready)
        status = running.executor.memory.status()
        if not status.hook:
            lacking(f"no program could be attached: {status.refused}")
        yield running
        assert running.executor.memory.governor.lost == 0
    finally:
        running.close()
    before.check()


def policy(*, best_effort=False, **limits):
    chosen = {"memory_high": BUDGET, "memory_max": 1024 * MIB, **limits}
    return Policy(name="hog", best_effort=best_effort, limits=Limits(**chosen))


def run(bursts, hog, mode, total=256, **limits):
    result = bursts.run([hog, mode, str(total)], policy=policy(**limits))
    assert result.memory_mode in (Mode.BPF, Mode.CONTROLLER_BPF), result
    return result


def rungs(result):
    return [step.rung for step in result.bursts]


def overshoot(result):
    return result.usage.memory_peak - BUDGET


@pytest.mark.parametrize("mode", available(GROWING))
def test_a_writer_is_killed_at_its_budget(bursts, hog, mode):
    """Files are on the private tmpfs of the call: what is on disk is the kernel's to write back."""
    result = run(bursts, hog, mode)
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert rungs(result) == ["killed"], result
    assert result.verdict.reason == "memory"
    assert "above its memory budget" in result.verdict.message
    assert overshoot(result) <= MIB + (HUGE_PAGE if mode == "huge" else 0), result


@pytest.mark.parametrize("mode", ["anon", "populate", "mappopulate", "fork", "read"])
def test_a_stop_holds(bursts, hog, mode):
    """Also for system calls that populate memory, which no SIGSTOP and no freezer gets out of."""
    result = run(bursts, hog, mode, on_exhausted="stop", freeze_seconds=0.3)
    assert result.outcome is Outcome.MEMORY_KILLED, result
    # Frozen, and killed when its time is up; or, where a busy machine kept the governor waiting, killed at once.
    assert rungs(result)[-1] == "killed", result
    assert overshoot(result) <= MIB, result


def test_every_rung(bursts, hog):
    result = run(
        bursts, hog, "anon", 512, on_exhausted="throttle", memory_burst=64 * MIB, burst_seconds=0.01,
        throttle_seconds=0.3, freeze_seconds=0.3,
    )  # fmt: skip
    throttled = ["throttled"] if result.memory_mode == Mode.CONTROLLER_BPF else []
    assert rungs(result) == ["granted", *throttled, "frozen", "killed"], result
    assert [step.at for step in result.bursts] == sorted(step.at for step in result.bursts)
    assert result.bursts[-1].at - result.bursts[-2].at < 5


def test_a_burst_within_its_allowance(bursts, hog):
    result = run(bursts, hog, "anon", 128, memory_burst=128 * MIB, burst_seconds=30.0)
    assert result.ok, result
    assert rungs(result)[0] == "granted", result


def test_a_burst_ends_at_the_limit_and_the_verdict_names_that(bursts, hog):
    result = run(bursts, hog, "anon", 512, memory_burst=64 * MIB, burst_seconds=60.0, memory_max=200 * MIB)
    assert result.outcome is Outcome.MEMORY_KILLED, result
    if result.memory_mode == Mode.BPF:  # else it is the controller's own
        assert f"killed: above its memory limit ({200 * MIB} bytes);" in result.verdict.message, result
    assert f"{200 * MIB} bytes" in result.verdict.message, result


def test_knowing_is_all_that_notify_wants(bursts, hog):
    result = run(bursts, hog, "anon", 128, on_exhausted="notify")
    assert result.ok, result
    assert rungs(result)[0] == "noticed", result


@pytest.mark.parametrize("mode", ["cow", "churn"])
def test_what_is_shared_or_given_back_counts_once(bursts, hog, mode):
    """Eight processes that share an eighth of 256 MB, and one that takes and gives back as much again and again."""
    result = run(bursts, hog, mode)
    assert result.ok, result
    assert rungs(result) == []
    assert result.usage.memory_peak < BUDGET


def test_page_cache_is_no_burst(bursts, workspace):
    write = "dd if=/dev/zero of=big bs=1M count=192 status=none"
    result = bursts.run(["sh", "-c", f"{write} && cat big big > /dev/null"], policy=policy(), workspace=str(workspace))
    assert result.ok, result
    assert not {"frozen", "killed"} & set(rungs(result)), result


def test_the_limit_of_a_plain_policy_holds(bursts, hog):
    """``memory.max`` is enforced without a memory controller as well: it is no more among what is not."""
    result = bursts.run([hog, "anon", "256"], policy=Policy(name="plain", limits=Limits(memory_max=BUDGET)))
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert result.unenforced == () or all(not item.limit.startswith("memory.") for item in result.unenforced)
    assert overshoot(result) <= MIB, result


def test_the_whole_leaf_goes(bursts, hog):
    """Though the hog is in a pipe and the shell would end with 0."""
    result = bursts.run(["sh", "-c", f"sleep 98765 & {hog} anon 256 | cat; exit 0"], policy=policy())
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert result.returncode == 137


def test_the_dead_leave_nothing_to_the_rest(bursts, hog):
    """While the daemon sleeps: what one process gives back when it is struck is not for the others to go on with."""

    async def asleep():
        results = []

        async def one():
            script = f"sleep 0.3; {hog} anon 256; {hog} anon 40"
            results.append(await bursts.executor.run(["sh", "-c", script], policy=policy(), timeout=30))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.sleep(0.1)
            time.sleep(1)  # nothing of the executor moves
        return results[0]

    result = bursts.call(asleep)
    assert result.outcome is Outcome.MEMORY_KILLED, result
    assert result.stdout == b"", "the second one has run"
    assert rungs(result) == ["killed"], "its end may be seen before the event of what ended it"
    assert overshoot(result) <= MIB, result


def test_calls_at_the_same_time_have_accounts_of_their_own(bursts, hog):
    """Four that each stay below, and together are three times above; one that does not."""

    async def together():
        results = {}

        async def one(name, total):
            results[name] = await bursts.executor.run([hog, "anon", str(total)], policy=policy(), timeout=30)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, number, 48)
            nursery.start_soon(one, "greedy", 256)
        return results

    results = bursts.call(together)
    assert results.pop("greedy").outcome is Outcome.MEMORY_KILLED
    assert all(result.ok for result in results.values()), results


def bpf_objects():
    """What the kernel has of programs, maps and links, as bpftool counts them."""
    tool = shutil.which("bpftool") or "/usr/sbin/bpftool"
    if not Path(tool).exists():
        lacking("no bpftool: apt-get install bpftool")
    return {
        kind: len(json.loads(subprocess.run([tool, "-j", kind, "list"], check=True, capture_output=True).stdout or "[]"))
        for kind in ("prog", "map")
    }


def test_the_probes_process_may_die_at_any_time(hog):
    """Killed while calls run, again and again: they go on and say what held them; it comes back; nothing is left of the dead."""
    if reason := missing_requirement():
        lacking(reason)
    times = int(os.environ.get("AGENTRUN_PROBE_KILLS", "10"))
    before = bpf_objects()
    running = Blocking(own_config(probes=True))
    modes, ended = set(), 0
    try:
        memory = running.executor.memory
        running.call(memory.wait_ready)
        if not memory.status().hook:
            lacking(f"no program could be attached: {memory.status().refused}")
        attached = bpf_objects()
        assert all(attached[kind] > before[kind] for kind in before), "a count that does not move proves nothing"

        async def load(stop):
            nonlocal ended
            while not stop.is_set():
                result = await running.executor.run([hog, "anon", "16"], policy=policy(best_effort=True), timeout=20)
                assert result.ok, result
                modes.add(result.memory_mode)
                ended += 1

        async def kill_again_and_again():
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(load, stop)
                for number in range(times):
                    with trio.fail_after(60):
                        while not (memory.link.pid and memory.governor.mode in (Mode.BPF, Mode.CONTROLLER_BPF)):
                            await trio.sleep(0.01)
                    os.kill(memory.link.pid, signal.SIGKILL)
                    with trio.fail_after(60):
                        while memory.link.starts < number + 2:
                            await trio.sleep(0.005)
                    memory.link.hurry()
                stop.set()
            with trio.fail_after(60):
                while memory.governor.mode not in (Mode.BPF, Mode.CONTROLLER_BPF):
                    await trio.sleep(0.01)

        running.call(kill_again_and_again)
        assert memory.link.starts == times + 1
        assert ended > times
        assert len(modes) > 1, modes  # some calls had it all the time, others had not
        eventually(lambda: bpf_objects() == attached, "as many programs and maps as before")
        killed = running.run([hog, "anon", "256"], policy=policy())
        assert killed.outcome is Outcome.MEMORY_KILLED, killed
    finally:
        running.close()
    eventually(lambda: bpf_objects() == before, "nothing left in the kernel")


def test_what_is_not_known_is_not_said(bursts, hog):
    """A call above its budget whose programs die has not got below it, and its peak is none that others saw a part of."""
    memory = bursts.executor.memory
    pid, starts = memory.link.pid, memory.link.starts
    go, news, rows = Path(hog).with_name("go"), [], []
    script = f"import os, time\nheld = bytearray({2 * BUDGET})\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)"

    async def killed_meanwhile():
        async def kill():
            await trio.sleep(1)
            os.kill(pid, signal.SIGKILL)
            memory.governor.detach()  # as it will when the kernel has closed its socket, which may take seconds
            rows.extend(bursts.executor.usage(*item) for item in bursts.executor.calls().items())
            assert memory.status().hook is None
            with trio.fail_after(60):
                while memory.link.starts == starts or memory.governor.mode not in (Mode.BPF, Mode.CONTROLLER_BPF):
                    await trio.sleep(0.01)
            go.touch()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            return await bursts.executor.run([PYTHON, "-c", script], policy=policy(on_exhausted="notify"), timeout=90)

    memory.governor.listeners.add(news.append)
    try:
        result = bursts.call(killed_meanwhile)
    finally:
        memory.governor.listeners.discard(news.append)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "its programs are detached")
    assert result.ok, result
    if result.memory_mode == Mode.NONE:
        assert rungs(result) == ["noticed", "within"], result
        assert result.bursts[-1].reason == "nobody counts its memory any more"
        assert result.bursts[-1].usage > BUDGET
        assert (result.usage.memory_source, result.usage.memory_peak > BUDGET) == ("rusage", True), result
        assert [row["memory"] for row in rows] == [None]
        assert [one["mode"] for one in news if one["event"] == "mode"] == ["none", "bpf"]
