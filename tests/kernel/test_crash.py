# SPDX-License-Identifier: Apache-2.0
"""Killed without a chance to clean up: nothing goes on running, everybody is told, and the next one starts clean."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from agentrun.cgroup.tree import find_mount, remove_stale
from tests.support import Daemon, Leaks, Watched, cgroup_of, descendants, eventually, is_init, pids_below, processes, unique_name

pytestmark = pytest.mark.host

WENT_AWAY = b"agentrun: the daemon went away during the call; the tool call was killed with it\n"
TOOLS = (
    ["sleep", "300"],
    ["sh", "-c", "for i in 1 2 3 4 5; do (setsid sh -c 'sleep 300 & exec sleep 300' &) ; done; exec sleep 300"],
    ["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 0.1; done"],
    ["cat"],
)


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory(prefix="agentrun-test-") as path:
        yield Path(path)


def start_calls(daemon, count):
    """Clients in every state of a call, all of them running; stdin stays open for those that read it."""
    clients = [daemon.popen("--", *TOOLS[number % len(TOOLS)], stdin=subprocess.PIPE) for number in range(count)]
    eventually(lambda: len(daemon.calls()) == count)
    trees = count // len(TOOLS)
    eventually(lambda: len(pids_below(daemon.cgroup)) >= 2 * count + 10 * trees, "the fork trees have grown")
    return clients


def end(client):
    """Its exit status and standard error; its stdout must be empty."""
    out, err = client.communicate(timeout=20)
    assert out == b""
    return client.returncode, err


def test_the_daemon_is_killed_in_the_middle_of_32_calls(directory):
    leaks = Leaks(directory)
    daemon = Daemon(directory)
    clients = start_calls(daemon, 32)
    members = pids_below(daemon.cgroup)
    assert sum(map(is_init, members)) >= 32
    watched = Watched([*members, *descendants(daemon.pid)])
    daemon.kill()
    watched.all_die()
    assert [end(client) for client in clients] == [(125, WENT_AWAY)] * 32
    assert Path(daemon.socket).exists()
    assert daemon.cgroup.exists()
    assert daemon.log() == ""

    again = Daemon(directory, name=daemon.name)
    try:
        again.works()
        assert again.ask(op="status")["data"]["cgroup"] == str(daemon.cgroup)
        leaves = len(list(again.cgroup.glob("tenant-*/call-*")))
        assert leaves <= 32, "those of the daemon before are gone; these are warm"
    finally:
        again.stop()
    leaks.check()


def test_one_client_at_a_time_is_told(directory):
    """The same for a client that has a pipe of its own on both sides, and one that wants JSON."""
    daemon = Daemon(directory)
    clients = [daemon.popen("--json", "--", "sleep", "300"), daemon.popen("--", "cat", stdin=subprocess.PIPE)]
    eventually(lambda: len(daemon.calls()) == 2)
    daemon.kill()
    assert [end(client) for client in clients] == [(125, WENT_AWAY)] * 2
    remove_stale(daemon.cgroup.parent)


def test_the_zygote_is_killed_in_the_middle_of_calls(directory):
    daemon = Daemon(directory)
    try:
        clients = start_calls(daemon, 4)
        victims = [pid for pid, (parent, _, _) in processes().items() if parent == daemon.pid and not is_init(pid)
                   and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"agentrun-zygote")
                   and pid not in pids_below(daemon.cgroup)]  # fmt: skip
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for _ in range(8):
            daemon.works()
        assert [client.poll() for client in clients] == [None] * 4
        assert len(daemon.calls()) == 4
        for client in clients:
            client.kill()
            end(client)
    finally:
        daemon.stop()


def test_the_daemon_is_asked_to_end_in_the_middle_of_calls(directory):
    daemon = Daemon(directory)
    clients = start_calls(daemon, 8)
    watched = Watched(pids_below(daemon.cgroup))
    daemon.stop()
    watched.all_die()
    for code, err in map(end, clients):
        assert code in (125, 137)
        assert err.count(b"\n") == 1
        assert err.startswith(b"agentrun: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_ends_the_daemon(directory, number):
    daemon = Daemon(directory)
    daemon.works()
    daemon.process.send_signal(number)
    assert daemon.process.wait(20) == 0
    daemon.kill()
    assert not daemon.cgroup.exists()
    assert not Path(daemon.socket).exists()
    assert daemon.log() == ""


def test_the_name_and_the_socket_of_a_live_daemon_are_taken(directory):
    daemon = Daemon(directory)
    try:
        other = daemon.cli("daemon", "--name", daemon.name, "--socket", str(directory / "other"))
        assert other.returncode == 125
        assert other.stderr == f"agentrun: {daemon.cgroup} belongs to an agentrun that is running\n"
        other = daemon.cli("daemon", "--name", unique_name(), "--socket", daemon.socket)
        assert other.returncode == 2
        assert other.stderr == f"agentrun: socket {daemon.socket}: a daemon answers there already\n"
        daemon.works()
    finally:
        daemon.stop()


def test_what_cannot_be_removed_of_a_dead_one_stops_nobody(directory, monkeypatch):
    """An ``agentrun-*`` that nobody holds, with a process right in it; in a base of our own, since all are looked at."""
    mount = find_mount()
    base = mount / unique_name()
    stale = base / "agentrun-stale"
    stale.mkdir(parents=True)
    monkeypatch.setenv("AGENTRUN_CGROUP", str(base))
    try:
        with subprocess.Popen(["sleep", "300"]) as sleeper:
            (stale / "cgroup.procs").write_text(str(sleeper.pid))
            try:
                daemon = Daemon(directory)
                daemon.works()
                daemon.stop()
            finally:
                sleeper.kill()
    finally:
        for path in (stale, base / "supervisor", base):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()


EMBEDDED = """
import sys, trio
from agentrun import ExecutorConfig, open_executor

async def main(name):
    async with open_executor(ExecutorConfig(name=name)) as executor, trio.open_nursery() as nursery:
        for number in range(8):
            script = "for i in 1 2 3 4; do (setsid sleep 300 &) ; done; exec sleep 300"
            nursery.start_soon(executor.run, ["sh", "-c", script])
        while len(executor.calls()) < 8:
            await trio.sleep(0.005)
        print("ready", flush=True)
        await trio.sleep_forever()

trio.run(main, sys.argv[1])
"""


def test_a_program_with_an_executor_is_killed(directory):
    name = unique_name()
    cgroup = cgroup_of(name)
    with subprocess.Popen([sys.executable, "-c", EMBEDDED, name], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"ready\n"
        eventually(lambda: len(pids_below(cgroup)) >= 8 * 6)
        watched = Watched([*pids_below(cgroup), *descendants(program.pid)])
        assert len(watched) >= 48
        program.kill()
    watched.all_die()
    assert pids_below(cgroup) == []
    # Whatever starts next removes the empty cgroups.
    daemon = Daemon(directory)
    try:
        assert not cgroup.exists()
        daemon.works()
    finally:
        daemon.stop()
