# SPDX-License-Identifier: Apache-2.0
"""The escape suite: limits, cgroups, and what the whole host has only so much of. See wall.py; docs/security.md has the table.

The budgets of the host are really used up only in a guest of the VM lane, where they are nobody else's.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import tempfile
from pathlib import Path

import pytest

from agentrun.cgroup.tree import find_mount
from tests.kernel.attacker import CLONE_NEWNS, CLONE_NEWUSER, Attacker, Said
from tests.kernel.wall import DISPOSABLE, Hole, alone_outside, attackers_inside, hole, token
from tests.support import cgroup_of, eventually, pids_below

pytestmark = pytest.mark.host


# ---------------------------------------------------------------- cgroups


CONTROL_FILES = [
    "cgroup.procs",
    "cgroup.threads",
    "cgroup.kill",
    "cgroup.freeze",
    "cgroup.max.descendants",
    "pids.max",
    "cpu.max",
]


def leave_cgroup(a, base, names):
    for name in names:
        if os.path.exists(f"{base}/{name}"):
            a.step(name, lambda path: os.close(os.open(path, os.O_WRONLY)), f"{base}/{name}")
    a.step("a child", os.mkdir, f"{base}/child")
    a.step("move", a.put, f"{base}/child/cgroup.procs", "0")
    a.step("move back", a.put, f"{base}/cgroup.procs", "0")
    a.step("mount", a.mount, "none", "/tmp", "cgroup2")
    a.step("unshare", a.sys, "unshare", 0x02000000)  # CLONE_NEWCGROUP


def test_cgroups(walls):
    """leaving one's cgroup, and raising its limits — cgroups(7), cgroup_namespaces(7)"""
    base = Path(find_mount(), token().removeprefix("agentrun-"))  # whose name would have every executor sweep it away
    base.mkdir()
    try:
        expected = dict.fromkeys(CONTROL_FILES, ("ok|-", "EROFS|EACCES|-"))  # "-": without controllers there are no limits either
        expected |= dict.fromkeys(("cgroup.procs", "cgroup.max.descendants", "a child", "move back"), ("ok", "EROFS|EACCES"))
        expected |= {"move": ("ok", "ENOENT"), "mount": ("ok", "EPERM"), "unshare": ("ok", "EPERM")}
        common = {"names": CONTROL_FILES}
        walls.check(leave_cgroup, expected, outside={"base": str(base), **common}, inside={"base": "/sys/fs/cgroup", **common})
    finally:
        for made in (base / "child", base):
            with contextlib.suppress(FileNotFoundError):
                made.rmdir()


def name_release_agent(a, name):
    """A cgroup v1 hierarchy has a program that the kernel runs, as root on the host, when a cgroup of it is empty."""
    os.makedirs("/dev/shm/v1", exist_ok=True)
    a.step("user namespace", a.sys, "unshare", CLONE_NEWUSER | CLONE_NEWNS) if not name else None
    a.step("mount", a.mount, "none", "/dev/shm/v1", "cgroup", 0, f"none,name={name or 'inside'}")
    a.step("release_agent", lambda: os.close(os.open("/dev/shm/v1/release_agent", os.O_WRONLY)))


def test_release_agent(walls):
    """a program of the attacker's run by the kernel on the host — CVE-2022-0492, release_agent in cgroups(7)"""
    expected = {"mount": ("ok", "EPERM"), "release_agent": ("ok", "ENOENT"), "user namespace": ("-", "EPERM")}
    walls.check(name_release_agent, expected, outside={"name": token()}, inside={"name": ""})


# ---------------------------------------------------------------- limits and priorities


def raise_limits(a):
    def hard(number):
        limit = ctypes.create_string_buffer(16)
        a.sys("prlimit64", 0, number, 0, limit)
        return struct.unpack("QQ", limit.raw)[1]

    def exceed(number, least):
        a.sys("prlimit64", 0, number, struct.pack("QQ", least + 1, least + 1), 0)
        if hard(number) <= least:
            raise PermissionError(errno.EPERM, "it only seemed so")

    for name, number in (("nofile", 7), ("core", 4), ("nproc", 6)):
        if hard(number) > 1 << 32:  # none: first one has to be set that can be exceeded
            a.sys("prlimit64", 0, number, struct.pack("QQ", 1000, 1000), 0)
        a.step(f"raise {name}", exceed, number, hard(number))
    a.step("nice", os.setpriority, os.PRIO_PROCESS, 0, -20)
    a.call("sched_setscheduler", 0, 1, struct.pack("i", 1))  # SCHED_FIFO
    deadline = struct.pack("IIQiIQQQ", 48, 6, 0, 0, 0, 10**6, 10**7, 10**7)
    a.call("sched_setattr", 0, deadline, 0)
    a.step("ioprio", a.sys, "ioprio_set", 1, 0, 1 << 13)  # IOPRIO_CLASS_RT
    a.step("oom_score_adj", a.put, "/proc/self/oom_score_adj", "-1000")
    a.step("a large pipe", fcntl.fcntl, os.pipe()[0], 1031, 1 << 22)  # F_SETPIPE_SZ


def test_limits_and_priorities(walls):
    """one's own limits, and a place before everybody else — setrlimit(2), nice(2), sched(7), ioprio_set(2), proc(5)"""
    # A root without CAP_SYS_RESOURCE, as in some containers and virtual machines, may not raise limits outside either.
    expected = {f"raise {name}": ("ok|EPERM", "EPERM") for name in ("nofile", "core", "nproc")}
    expected |= {"nice": ("ok", "EACCES|EPERM"), "sched_setscheduler": ("ok", "EPERM"), "sched_setattr": ("ok", "EPERM")}
    expected |= {"ioprio": ("ok", "EPERM"), "oom_score_adj": ("ok|EACCES", "EACCES"), "a large pipe": ("ok|EPERM", "EPERM")}
    walls.check(raise_limits, expected)


# ---------------------------------------------------------------- what the host has only so much of


def set_up_aio(a):
    a.call("io_setup", 1, ctypes.byref(ctypes.c_ulong()))


def test_asynchronous_io(walls):
    """every AIO context of the host taken by one call: databases do not start — io_setup(2), fs.aio-max-nr"""
    walls.check(set_up_aio, {"io_setup": ("ok", "EPERM|ENOSYS")})


def open_terminals(a):
    def attempt():
        for number in range(300):
            try:
                os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
            except OSError:
                return Said("bounded" if number else "none")
        return Said("300 and more")

    a.step("terminals", attempt)


def test_pseudoterminals(walls):
    """every terminal of the host taken by one call — pts(4), devpts: max=, kernel.pty.max"""
    walls.check(open_terminals, {"terminals": ("300 and more", "bounded")})


def test_who_pays_for_a_sandbox(walls):
    """limits that are counted for the owner of a user namespace, who is shared — ioctl_ns(2), user.max_* in namespaces(7)

    What it leads to is shown by test_budgets_of_root, where that harms nobody.
    """
    walls.inside.attack(set_up_nothing)
    owners = set()
    for pid in pids_below(cgroup_of(walls.executor.config.name)):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/ns/user", "rb") as namespace:
            owners.add(struct.unpack("I", fcntl.ioctl(namespace, 0xB704, bytes(4)))[0])  # NS_GET_OWNER_UID
    assert owners
    if 0 in owners:
        raise Hole(f"owned by {owners}")


def set_up_nothing(a):
    a.step("nothing", os.getpid)


def take(a, what, most):
    """Up to so many of a kind, kept as long as the process lives."""
    Attacker.kept = []

    def one(number):
        if what == "inotify":
            return a.sys("inotify_init1", 0)
        if what == "aio":
            context = ctypes.c_ulong()
            return context, a.sys("io_setup", 1024, ctypes.byref(context))
        if what == "queues":
            return a.sys("mq_open", f"agentrun-wall-{os.getpid()}-{number}".encode(), os.O_RDONLY | os.O_CREAT, 0o600, 0)
        return a.sys("rt_sigqueueinfo", os.getpid(), 40, struct.pack("iii", 40, 0, -1) + bytes(116))

    def several():
        for number in range(most):
            try:
                Attacker.kept.append(one(number))
            except OSError:
                if not number:
                    raise
                return

    if what == "signals":
        a.sys("rt_sigprocmask", 0, struct.pack("Q", 1 << 39), 0, 8)
    a.step("take", several)


@pytest.mark.skipif(not DISPOSABLE, reason="takes what this machine has: tried in the guests of the VM lane")
@pytest.mark.parametrize("what", ["inotify", "aio", "queues", "signals"])
def test_budgets_of_root(walls, what):
    """a budget of the host's root, and so of every tenant, used up by one call — inotify(7), io_setup(2), mq_overview(7)"""
    assert walls.outside.attack(take, what=what, most=1) == {"take": "ok"}
    greedy = attackers_inside(walls.executor)
    try:
        taken = greedy.attack(take, stay=True, what=what, most=200_000)
        left = walls.outside.attack(take, what=what, most=1)
    finally:
        greedy.close()
    assert walls.outside.attack(take, what=what, most=1) == {"take": "ok"}
    if left != {"take": "ok"}:
        raise Hole(f"{taken} inside, then {left} for the host's root")


# ---------------------------------------------------------------- what the host does when asked from inside


def crash(a):
    a.step("limit", a.sys, "prlimit64", 0, 4, struct.pack("QQ", 0, 0), 0)  # at 1 the kernel starts no handler, at 0 it does
    a.step("crash", os.kill, os.getpid(), 11)


@pytest.mark.skipif(not DISPOSABLE, reason="sets the host's handler of core dumps: tried in the guests of the VM lane")
def test_core_dump_handlers(walls):
    """input for a program that the host runs as root, outside every leaf — CVE-2025-4598, CVE-2015-1318 (apport), core(5)"""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    with tempfile.TemporaryDirectory() as directory:
        pattern.write_text(f"|/usr/bin/touch {directory}/%h")
        try:
            within = walls.alone(crash)
            without = alone_outside(crash)
            assert without == {"limit": "ok", "crash": "SIGSEGV"}
            assert within["crash"] == "SIGSEGV"
            name = os.uname().nodename
            eventually(lambda: Path(directory, name).exists())
            dumped = set(os.listdir(directory)) - {name}
        finally:
            pattern.write_text(before)
    if dumped:
        raise Hole(f"the handler was run for {dumped}")


def load_modules(a):
    for name, kind, protocol in (("sctp", 1, 132), ("dccp", 6, 33), ("l2tp", 2, 115), ("udplite", 2, 136)):
        a.step(name, a.sys, "socket", 2, kind, protocol)
    for name, protocol in (("xfrm", 6), ("crypto", 21), ("netfilter", 12), ("rdma", 20)):
        a.step(f"netlink {name}", a.sys, "socket", 16, 3, protocol)
    _, slave = os.openpty()
    for name, number in (("hdlc", 13), ("slip", 1), ("gsm", 21), ("ppp", 3)):
        a.step(f"discipline {name}", a.sys, "ioctl", slave, 0x5423, struct.pack("i", number))  # TIOCSETD


def start_loader(a):
    """The same without knowing a name: what there is not has to be looked for."""
    import socket

    a.step("protocol", a.sys, "socket", 2, 1, 99)
    a.step("netlink protocol", a.sys, "socket", 16, 3, 25)
    for name, protocol, message in (
        # CTRL_CMD_GETFAMILY by the name of a family of generic netlink; SOCK_DIAG_BY_FAMILY of a family that nobody has
        ("generic netlink", 16, struct.pack("IHHII", 32, 16, 5, 1, 0) + struct.pack("BBHHH8s", 3, 1, 0, 12, 2, b"wall-xy")),
        ("socket diagnosis", 4, struct.pack("IHHII", 24, 20, 5, 1, 0) + struct.pack("BB6x", 43, 0)),
    ):
        sock = a.step(name, socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        if sock is not None:
            a.step(f"{name} message", sock.send, message)


def execute_garbage(a):
    with open("/dev/shm/garbage", "wb") as file:
        file.write(b"\1\2\3\4 no format there is")
        os.fchmod(file.fileno(), 0o755)
    a.step("binary format", os.execv, "/dev/shm/garbage", ["x"])


def asked_for(walls, attack) -> tuple[set[str], set[str]]:
    """The modules that the kernel starts the host's loader for, outside and inside."""
    setting = Path("/proc/sys/kernel/modprobe")
    before = setting.read_text()
    asked = []
    with tempfile.TemporaryDirectory() as directory:
        record, loader = Path(directory, "asked"), Path(directory, "modprobe")
        loader.write_text(f'#!/bin/sh\necho "$*" >> {record}\n')
        loader.chmod(0o755)
        setting.write_text(str(loader))
        try:
            for attackers in (walls.outside, walls.inside):
                record.write_text("")
                attackers.attack(attack)
                asked.append({line.split()[-1] for line in record.read_text().splitlines()})
        finally:
            setting.write_text(before)
    return asked[0], asked[1]


@pytest.mark.skipif(not DISPOSABLE, reason="sets the host's loader of modules: tried in the guests of the VM lane")
def test_loading_modules_by_name(walls):
    """rarely tested kernel code, loaded because a tool asks — CVE-2017-6074 (dccp), CVE-2017-2636 (n_hdlc), CVE-2023-6546"""
    outside, inside = asked_for(walls, load_modules)
    assert outside
    assert not inside


@pytest.mark.skipif(not DISPOSABLE, reason="sets the host's loader of modules: tried in the guests of the VM lane")
def test_starting_the_loader(walls):
    """processes of the host's root, outside every leaf, at a tool's command — "Houdini's Escape" (CCS 2019), request_module"""
    outside, inside = asked_for(walls, start_loader)
    assert outside
    if inside:
        raise Hole(f"the loader was started for {sorted(inside)}")


@pytest.mark.skipif(not DISPOSABLE, reason="sets the host's loader of modules: tried in the guests of the VM lane")
@hole("before Linux 6.14 the kernel looks for a module for a program of no known format, and nothing in a sandbox can hinder it")
def test_binary_formats_nobody_has(walls):
    """the same by executing a file of garbage — "Houdini's Escape" (CCS 2019), search_binary_handler in fs/exec.c"""
    outside, inside = asked_for(walls, execute_garbage)
    assert outside
    if inside:
        raise Hole(f"the loader was started for {sorted(inside)}")
