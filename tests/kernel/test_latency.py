# SPDX-License-Identifier: Apache-2.0
"""Phases as the kernel sees them: real programs, real calls, and another tracer that looks at the same calls."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from agentrun.cgroup.tree import find_mount
from agentrun.config import DaemonConfig
from agentrun.daemon import Daemon
from agentrun.histogram import Histogram, since
from agentrun.latency import PHASES, Report
from agentrun.metrics import respond
from agentrun.unixsocket import open_listener
from agentrun_shim import data
from tests.requirements import lacking
from tests.support import BIN, PATIENCE, eventually, unique_name, with_executor

pytestmark = pytest.mark.host

PROBES = """
import json, socket, sys
from agentrun.probes.phases import attach_phases
from agentrun.probes.tracefs import see_tracefs
sock = socket.socket(fileno=int(sys.argv[1]))
see_tracefs()
found = attach_phases()
socket.send_fds(sock, [json.dumps(list(found.maps)).encode()], list(found.maps.values()))
sock.recv(1)
"""
RECORDED = {"setup", "cgroup_mkdir", "namespaces", "clone", "id_maps", "mounts", "seccomp", "landlock", "exec", "first_syscall"}
"""Phases every sandbox of the default policy has by the time its tool runs."""


@contextlib.contextmanager
def probes():
    """A process that records phases, and its maps; it ends with the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        root = Path(data.__file__).parents[2]
        env = {**os.environ, "PYTHONPATH": f"{root}/runtime:{root}/shim"}
        process = subprocess.Popen(
            [sys.executable, "-c", PROBES, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        with process:
            message, fds, _, _ = socket.recv_fds(ours, 4096, 32)
            if not message:
                lacking(f"phases cannot be recorded here: {process.stderr.read().splitlines()[-1:]}")
            try:
                yield dict(zip(json.loads(message), fds, strict=True))
            finally:
                ours.close()
                if process.poll() is None:
                    eventually(lambda: process.poll() is not None, "the probes end with their socket")
                assert process.returncode == 0


def recorded(function, *args, seconds: float = 60, **config):
    """``await function(executor, *args)`` while phases are recorded."""
    with probes() as maps:

        async def body(executor):
            executor.latency.attach(maps)
            return await function(executor, *args)

        return with_executor(body, seconds=seconds, **config)


async def settled(executor, calls: int) -> Report:
    """The report when so many sandboxes are in it: each is added when its leaf is removed."""
    deadline = trio.current_time() + PATIENCE
    while (report := executor.latency.report()).calls < calls:
        assert trio.current_time() < deadline, f"{report.calls} of {calls}"
        await trio.sleep(0.01)
    return report


def counts(report: Report) -> dict[tuple[str, str], int]:
    return {(one.kind, one.phase): one.count for one in report.histograms}


def test_a_call_carries_its_own_phases():
    async def body(executor):
        for _ in range(3):
            result = await executor.run(["/bin/sh", "-c", "sleep 0.05; echo x"], timings=True)
        plain = await executor.run(["true"])
        return result, plain

    result, plain = recorded(body)
    phases = result.phases
    assert tuple(phases) == PHASES
    assert {name for name, value in phases.items() if value is not None} == RECORDED | {"first_write", "run"}
    assert all(value is None or 0 < value < 5 for value in phases.values())
    assert 0.05 < phases["first_write"] < phases["run"] < result.usage.wall + 0.001
    assert phases["first_syscall"] < phases["first_write"]
    assert sum(phases[name] for name in ("cgroup_mkdir", "namespaces", "clone", "id_maps", "mounts", "seccomp")) < phases["setup"]
    assert plain.phases is None
    assert json.loads(result.to_json())["phases"] == phases


def test_warm_cold_and_template_are_apart():
    async def body(executor):
        cold = await executor.run(["true"])
        while executor.statistics().pools["default/none"].idle == 0:
            await trio.sleep(0.01)
        warm = await executor.run(["true"])
        return cold, warm, await settled(executor, 2)

    cold, warm, report = recorded(body)
    assert (cold.warm, warm.warm) == (False, True)
    found = counts(report)
    assert (report.lost, report.recording) == (0, True)
    assert found["cold", "exec"] == found["cold", "teardown"] == found["cold", "setup"] == 1
    assert found["warm", "exec"] == found["warm", "teardown"] == 1
    assert found["template", "pivot_root"] == found["template", "mounts"] == 1
    assert ("warm", "pivot_root") not in found


def test_a_template_is_counted_once_whatever_its_zygote_does_later(tmp_path):
    async def body(executor):
        for _ in range(3):  # the first needs a user namespace of the zygote's
            await executor.run(["true"], workspace=str(tmp_path))
        return await settled(executor, 3)

    report = recorded(body)
    assert {one.count for one in report.histograms if one.kind == "template"} == {1}
    assert report.lost == 0


def test_without_programs_there_is_nothing_and_no_harm():
    async def body(executor):
        return await executor.run(["true"], timings=True), executor.latency.report()

    result, report = with_executor(body)
    assert result.phases == dict.fromkeys(PHASES)
    assert (report.recording, report.calls, report.lost, report.histograms) == (False, 0, 0, [])


def test_programs_that_come_later_know_what_is_there_and_keep_what_was_counted():
    async def body(executor, first):
        executor.latency.attach(first)
        await executor.run(["true"])
        await settled(executor, 1)
        await executor.warm_up(count=2)
        before = executor.latency.report()
        executor.latency.detach()
        assert executor.latency.report() == msgspec.structs.replace(before, recording=False)
        with probes() as second:
            executor.latency.attach(second)
            result = await executor.run(["true"], timings=True)  # in a slot that is older than the programs
            after = await settled(executor, 2)
            executor.latency.detach()
        return before, result, after

    with probes() as maps:
        before, result, after = with_executor(body, maps)
    assert result.warm
    assert result.phases["exec"] is not None
    assert result.phases["run"] is not None
    assert result.phases["mounts"] is None
    total = {phase: sum(one.count for one in after.histograms if one.phase == phase) for phase in PHASES}
    assert total["exec"] == 2
    assert total["mounts"] >= sum(one.count for one in before.histograms if one.phase == "mounts")
    assert after.lost == 0


def test_programs_that_come_later_do_not_take_a_tool_for_its_setting_up():
    script = "sleep 0.3; /bin/true; sleep 0.1"

    async def body(executor, maps):
        results = []

        async def one(argv):
            results.append(await executor.run(argv, timings=True))

        await executor.warm_up(count=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, ["/bin/sh", "-c", script])
            await trio.sleep(0.1)
            executor.latency.attach(maps)
            await one(["true"])
        report = await settled(executor, 1)
        return results, report

    with probes() as maps:
        (quick, older), report = with_executor(body, maps)
    assert quick.phases["exec"] is not None
    assert older.phases == dict.fromkeys(PHASES)
    assert report.lost == 0
    assert [one.count for one in report.histograms if one.phase == "exec"] == [1]


def test_a_tool_cannot_add_to_its_own_phases():
    """What the tool does after its start is its own business, even if it is what setting up is made of."""
    script = "import os\nfor _ in range(200): os.fork() or os._exit(0)\ntry: os.execv('/bin/false', ['x'])\nfinally: os._exit(3)"

    async def body(executor):
        result = await executor.run(["/usr/bin/python3", "-c", script], timings=True)
        assert result.exit_code == 1, result
        return result, await settled(executor, 1)

    result, report = recorded(body)
    assert result.phases["clone"] < result.phases["run"] / 4
    assert [one.count for one in report.histograms if one.phase == "exec"] == [1]
    assert report.lost == 0


def test_a_container_of_another_runtime_is_recorded_once_registered():
    mount = find_mount()

    async def body(executor):
        path = Path(mount, unique_name())
        path.mkdir()
        try:
            executor.latency.register(path.stat().st_ino, 'crun "x"')
            script = 'echo 0 > "$1/cgroup.procs"; exec /bin/sh -c "sleep 0.02; echo hello"'
            await trio.to_thread.run_sync(partial(subprocess.run, ["sh", "-c", script, "sh", path], check=True, stdout=-3))
            live = executor.latency.phases(path.stat().st_ino)
        finally:
            await trio.to_thread.run_sync(eventually, partial(removed, path))
        return live, await settled(executor, 1)

    live, report = recorded(body)
    assert {name for name, value in live.items() if value is not None} == {"exec", "first_syscall", "first_write", "run"}
    assert live["first_write"] > 0.02
    found = {one.phase: one for one in report.histograms if one.shape == 'crun "x"'}
    assert set(found) == {"exec", "first_syscall", "first_write", "run", "teardown"}
    assert all((one.kind, one.count) == ("cold", 1) for one in found.values())


THREADS = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
static void *busy(void *nothing) { for (int i = 0; i < 100000; i++) unshare(0); return nothing; }
static void *go(void *argv) { execv(((char **)argv)[0], argv); return argv; }
int main(int argc, char **argv) {
    pthread_t thread[4];
    if (argc < 3 || write(open(argv[1], O_WRONLY), "0", 1) != 1) return 1;
    for (int i = 0; i < 4; i++) pthread_create(&thread[i], NULL, busy, NULL);
    for (int i = 0; i < 4; i++) pthread_join(thread[i], NULL);
    pthread_create(&thread[0], NULL, go, argv + 2);
    for (;;) pause();
}
"""


def test_a_container_may_be_set_up_by_many_threads(tmp_path):
    """Which make system calls at the same moment, and of which any may become the tool."""
    program = tmp_path / "threads"
    subprocess.run(["cc", "-pthread", "-xc", "-", "-o", program], input=THREADS, text=True, check=True)
    mount = find_mount()

    async def body(executor):
        path = Path(mount, unique_name())
        path.mkdir()
        try:
            executor.latency.register(path.stat().st_ino, "threads")
            argv = [program, path / "cgroup.procs", "/bin/sh", "-c", "sleep 0.05; exit 7"]
            done = await trio.run_process(argv, check=False)
            assert done.returncode == 7
        finally:
            await trio.to_thread.run_sync(eventually, partial(removed, path))
        return await settled(executor, 1)

    report = recorded(body)
    assert report.lost == 0
    found = {one.phase: one for one in report.histograms if one.shape == "threads"}
    assert set(found) >= {"clone", "namespaces", "exec", "run"}, found
    assert found["run"].sum > 0.05, "the program that the thread became, not one that it started"


def removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def test_nothing_is_lost_under_load():
    async def body(executor, workers: int, seconds: float):
        done = 0

        async def work():
            nonlocal done
            end = trio.current_time() + seconds
            while trio.current_time() < end:
                assert (await executor.run(["/bin/true"])).ok
                done += 1

        await executor.warm_up(count=workers)
        begun = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(workers):
                nursery.start_soon(work)
        rate = done / (time.monotonic() - begun)
        return done, rate, await settled(executor, done)

    done, rate, report = recorded(body, 8, 4.0)
    print(f"{done} calls, {rate:.0f} calls/s, {report.lost} events lost")
    assert report.lost == 0
    for phase in ("exec", "run", "first_syscall", "teardown"):
        assert sum(one.count for one in report.histograms if one.phase == phase) == done, phase
    for phase in RECORDED - {"exec", "first_syscall"}:
        assert sum(one.count for one in report.histograms if one.phase == phase and one.kind != "template") >= done, phase


# ---------------------------------------------------------------- another tracer

BPFTRACE = """
tracepoint:syscalls:sys_enter_execve /comm == "agentrun-slot"/ { @exec[tid] = nsecs; }
tracepoint:syscalls:sys_exit_execve /@exec[tid]/
    { if (args->ret == 0) { printf("exec %llu %llu\\n", nsecs, nsecs - @exec[tid]); } delete(@exec[tid]); }
tracepoint:syscalls:sys_enter_clone3 /pid == ZYGOTE/
    { @flags[tid] = *uptr((uint64 *)args->uargs); @clone[tid] = nsecs; }
tracepoint:syscalls:sys_exit_clone3 /@clone[tid]/
    { if ((@flags[tid] & 0x7e020080) == 0) { printf("clone %llu %llu\\n", nsecs, nsecs - @clone[tid]); } delete(@clone[tid]); }
tracepoint:syscalls:sys_enter_seccomp /comm == "agentrun-slot"/ { @seccomp[tid] = nsecs; }
tracepoint:syscalls:sys_exit_seccomp /@seccomp[tid]/
    { printf("seccomp %llu %llu\\n", nsecs, nsecs - @seccomp[tid]); delete(@seccomp[tid]); }
tracepoint:syscalls:sys_enter_mkdirat /pid == DAEMON/ { @mkdir[tid] = nsecs; }
tracepoint:syscalls:sys_exit_mkdirat /@mkdir[tid]/
    { printf("cgroup_mkdir %llu %llu\\n", nsecs, nsecs - @mkdir[tid]); delete(@mkdir[tid]); }
"""
COMPARED = ("exec", "clone", "seccomp", "cgroup_mkdir")
"""Phases that are one system call each, so that both see the same thing."""


@contextlib.contextmanager
def bpftrace(directory: Path, zygote: int):
    """The file that bpftrace writes to, once it is attached."""
    program, output = directory / "phases.bt", directory / "out"
    program.write_text(BPFTRACE.replace("ZYGOTE", str(zygote)).replace("DAEMON", str(os.getpid())))
    script = '[ -d /sys/kernel/tracing/events ] || mount -t tracefs t /sys/kernel/tracing; exec bpftrace -B line -o "$1" "$2"'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", output, program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield output, process
        finally:
            process.kill()


@pytest.mark.skipif(os.environ.get("CI") is None and shutil.which("bpftrace") is None, reason="bpftrace is not installed")
def test_medians_agree_with_bpftrace(tmp_path):
    async def body(executor):
        await executor.run(["/bin/true"])
        zygote = executor.latency._zygotes[0][0].pid
        with bpftrace(tmp_path, zygote) as (output, process):

            async def calls(number: int) -> None:
                for _ in range(number):
                    await executor.run(["/bin/true"])
                    await trio.sleep(0.003)

            with trio.fail_after(PATIENCE):
                while not (output.exists() and "exec" in output.read_text()):
                    if process.poll() is not None:
                        lacking(f"bpftrace does not work here: {process.stderr.read()[-300:]}")
                    await calls(1)
                    await trio.sleep(0.05)
            await trio.sleep(0.5)
            before, begun = executor.latency.report(), time.monotonic_ns()
            await calls(300)
            await settled(executor, before.calls + 300)
            report = executor.latency.report()
            process.send_signal(signal.SIGINT)  # and it writes what it has kept back
            while process.poll() is None:
                await trio.sleep(0.01)
            return since(report.histograms, before.histograms), begun, output.read_text()

    histograms, begun, text = recorded(body)
    theirs: dict[str, list[int]] = {}
    for phase, at, nanoseconds in re.findall(r"^(\w+) (\d+) (\d+)$", text, re.MULTILINE):
        if int(at) > begun:
            theirs.setdefault(phase, []).append(int(nanoseconds))
    table = {}
    for phase in COMPARED:
        ours = median(histograms, phase)
        table[phase] = (ours, statistics.median(theirs[phase]) / 1e9, len(theirs[phase]))
    print({phase: f"{ours * 1e6:.1f} us, bpftrace {other * 1e6:.1f} us of {n}" for phase, (ours, other, n) in table.items()})
    for phase, (ours, other, number) in table.items():
        assert number >= 290, phase
        assert math.isclose(ours, other, rel_tol=0.1), table


def median(histograms: list[Histogram], phase: str) -> float:
    (one,) = [one for one in histograms if one.phase == phase and one.kind == "warm"]
    return one.p50


# ---------------------------------------------------------------- through the daemon


def test_lat_stats_and_metrics_tell_the_same(tmp_path):
    async def body(executor):
        path = str(tmp_path / "s")
        async with trio.open_nursery() as nursery:
            with open_listener(path, None) as listener:
                nursery.start_soon(Daemon(executor, DaemonConfig()).serve, [listener])

                async def cli(*args: str) -> str:
                    command = [BIN / "agentrun-cli", *args, "--socket", path]
                    done = await trio.to_thread.run_sync(
                        partial(subprocess.run, command, capture_output=True, text=True, timeout=30)
                    )
                    assert (done.returncode, done.stderr) == (0, "")
                    return done.stdout

                for _ in range(3):
                    await executor.run(["echo", "x"])
                await settled(executor, 3)
                said = {
                    "text": await cli("lat", "-p", "exec"),
                    "json": await cli("lat", "-j"),
                    "stats": await cli("stats", "--json"),
                }
                said["metrics"] = respond(b"GET /metrics HTTP/1.1\r\n\r\n", executor).decode()
                async with trio.open_nursery() as inner:

                    async def intervals() -> None:
                        said["intervals"] = await cli("lat", "0.7", "2", "-j")

                    inner.start_soon(intervals)
                    await trio.sleep(0.9)
                    await executor.run(["true"])
                nursery.cancel_scope.cancel()
        return said

    said = recorded(body)
    document = json.loads(said["json"])
    total = {one["phase"]: 0 for one in document["histograms"]}
    for one in document["histograms"]:
        total[one["phase"]] += one["count"] if one["kind"] != "template" else 0
    assert (document["calls"], document["lost"], document["recording"], total["exec"], total["first_write"]) == (3, 0, True, 3, 3)
    assert json.loads(said["stats"])["latency"]["histograms"] == document["histograms"]
    titles = [line for line in said["text"].splitlines() if "times" in line]
    assert sum(int(re.search(r": (\d+) times", line)[1]) for line in titles) == 3
    assert "     usecs               : count     distribution" in said["text"]
    assert "3 sandboxes, 0 events lost" in said["text"]
    scraped = re.findall(r'^agentrun_phase_seconds_count\{phase="exec",.*\} (\d+)$', said["metrics"], re.MULTILINE)
    assert sum(map(int, scraped)) == 3
    intervals = [json.loads(line) for line in said["intervals"].splitlines()]
    assert len(intervals) == 2
    assert sum(one["count"] for line in intervals for one in line["histograms"] if one["phase"] == "exec") <= 1
