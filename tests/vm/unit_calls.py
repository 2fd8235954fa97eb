# SPDX-License-Identifier: Apache-2.0
"""Calls under the unit, its hardening and its programs in the kernel: steps of guest_systemd.py, which build on each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vm.unit import HOMES, SERVICE, SOCKET, Step, Unit, below, same

CALLS: dict[str, Step] = {}


def calls(function: Step) -> Step:
    CALLS[function.__name__] = function
    return function


@calls
def the_first_call_starts_the_service(unit: Unit) -> Any:
    unit.systemctl("enable", "agentrun.socket", "agentrun.service")
    unit.systemctl("start", "agentrun.socket")
    same(unit.show("ActiveState"), ["inactive"])
    same((SOCKET.parent.stat().st_mode & 0o777, SOCKET.stat().st_mode & 0o777), (0o700, 0o600))
    unit.inside.must("ls", "/sys/kernel/debug/tracing")  # the kernel mounts it for whoever looks, as the probes process does
    unit.mounted = unit.mounts()
    done = unit.exec("--", "true")
    same((done.returncode, done.stdout, done.stderr), (0, "", ""))
    same(unit.show("ActiveState", "SubState", "Type", "Result", "NRestarts"), ["active", "running", "notify", "success", "0"])
    same(unit.show("StatusText"), [f"serving on {SOCKET}"])
    same(unit.show("ControlGroup"), ["/agentrun.slice/agentrun.service"])


@calls
def its_cgroup_is_delegated(unit: Unit) -> Any:
    """The daemon's own processes are in supervisor/, its calls beside it, and nobody is in the unit's own cgroup."""
    same((SERVICE / "cgroup.procs").read_text(), "")
    assert unit.main_pid() in below(SERVICE / "supervisor")
    controllers = {"cpu", "io", "memory", "pids"}
    for path in (SERVICE, SERVICE / "agentrun-daemon", SERVICE / "agentrun-daemon" / "tenant-default"):
        assert controllers <= set((path / "cgroup.subtree_control").read_text().split()), path
    warm = [path for path in (SERVICE / "agentrun-daemon" / "tenant-default").glob("call-*") if below(path)]
    assert warm
    return len(warm)


@calls
def a_tool_that_is_too_big_is_a_result(unit: Unit) -> Any:
    """Of its own limit, and of a ceiling over everything, as one puts it on the slice. The service does not mind."""
    before = unit.main_pid()
    big = ("dd", "if=/dev/zero", "of=/dev/null", "count=1", "bs=400M")
    done = unit.exec("--json", "--memory", "64M", "--", *big)
    own = json.loads(done.stdout)
    same((done.returncode, own["outcome"], own["verdict"]["reason"]), (137, "memory_killed", "memory"))
    same(own["usage"]["memory_peak"], 64 << 20)
    ceiling = int((SERVICE / "memory.current").read_text()) + (100 << 20)
    unit.systemctl("set-property", "--runtime", "agentrun.slice", f"MemoryMax={ceiling}")
    try:
        above = unit.result("--", *big)
    finally:
        unit.systemctl("set-property", "--runtime", "agentrun.slice", "MemoryMax=infinity")
    same((above["outcome"], above["verdict"]["reason"]), ("memory_killed", "memory"))
    assert above["usage"]["memory_peak"] < ceiling, above
    events = dict(line.split() for line in (SERVICE / "memory.events").read_text().splitlines())
    assert int(events["oom_kill"]) >= 2, events  # systemd saw them
    same((unit.prints("--", "echo", "well"), unit.main_pid()), ("well\n", before))
    same(unit.show("ActiveState", "Result", "NRestarts"), ["active", "success", "0"])


@calls
def tools_inherit_nothing_of_the_unit(unit: Unit) -> Any:
    """Its priority, its descriptors, its capabilities: the daemon has them, the tools have what is theirs."""
    script = "nice; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status"
    nothing = ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
    same(unit.prints("--", "sh", "-c", script).splitlines(), ["0", "1024", "524288", "200", *nothing])
    pid = unit.main_pid()
    same(os.getpriority(os.PRIO_PROCESS, pid), -10)
    limits = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files"))
    same(limits.split()[3:5], ["1048576", "1048576"])
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    same((status["NoNewPrivs"], status["Seccomp"]), ("1", "0"))
    bounding = int(status["CapBnd"], 16)
    numbers = {"CAP_SYS_MODULE": 16, "CAP_SYS_RAWIO": 17, "CAP_SYS_BOOT": 22, "CAP_SYS_TIME": 25, "CAP_MAC_ADMIN": 33}
    same([name for name, bit in numbers.items() if bounding >> bit & 1], [])
    assert bounding >> 21 & 1  # CAP_SYS_ADMIN


@calls
def workspaces_are_the_callers_own(unit: Unit) -> Any:
    """Below homes and /tmp: those the caller sees, not those of a mount namespace of the unit."""
    for home in HOMES:
        work = Path(home, "project")
        work.mkdir()
        (work / "file").write_text("old\n")
        same(unit.prints("--workspace", ".", "--", "sh", "-c", "pwd; cat file; echo new > made", cwd=str(work)), f"{work}\nold\n")
        same((work / "made").read_text(), "new\n")
        same((work / "made").owner(), "root")
    copy = unit.result("--workspace", f"{HOMES[0]}/project:cow", "--", "sh", "-c", "rm made; echo other > file")
    same((copy["changes"]["modified"], copy["changes"]["deleted"]), (1, 1))
    same(Path(HOMES[0], "project", "file").read_text(), "old\n")


@calls
def networks_are_as_asked_for(unit: Unit) -> Any:
    devices = "grep -c : /proc/net/dev; grep -c lo: /proc/net/dev"
    same(unit.prints("--net", "none", "--", "sh", "-c", devices).split(), ["1", "1"])
    with said_at("10.99.0.2", 8080, b"from the host\n"):
        script = "exec 3<>/dev/tcp/{} && cat <&3"
        there = unit.prints("--policy", "fetch", "--", "bash", "-c", script.format("files.test/8080"))
        same(there, "from the host\n")
        other = unit.result("--policy", "fetch", "--", "bash", "-c", script.format("files.test/22"))
        same((other["outcome"], [one["what"] for one in other["denied"]]), ("exited", ["files.test:22"]))
        assert other["exit_code"] != 0, other


@contextlib.contextmanager
def said_at(address: str, port: int, what: bytes) -> Iterator[None]:
    """A server on the host's side that says one thing to everybody."""
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(what)

    with socket.create_server((address, port)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


@calls
def programs_in_the_kernel_strike(unit: Unit) -> Any:
    """The probes process has what it needs: a burst ends in the kernel, and the result says what held the call.

    What `agentrun status` prints is asked for by hand: starting that takes a guest ten seconds.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(SOCKET))
        connection.sendall(b"\x0e\0\0\0\x82\xa1v\1\xa2op\xa6status")
        answer = connection.recv(4096)
    assert b"\xa4mode\xaecontroller+bpf" in answer, answer
    assert os.fsencode(SERVICE / "agentrun-daemon") in answer, answer
    found = unit.result("--policy", "bursty", "--", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
    same((found["outcome"], found["memory_mode"], found["bursts"][-1]["rung"]), ("memory_killed", "controller+bpf", "killed"))
    assert found["usage"]["memory_peak"] < 72 << 20, found
    return found["usage"]["memory_peak"]


@calls
def nothing_was_mounted_where_systemd_is(unit: Unit) -> Any:
    """Mounts are shared on a host with systemd; none of a sandbox may get out of it."""
    same(unit.mounts(), unit.mounted)
