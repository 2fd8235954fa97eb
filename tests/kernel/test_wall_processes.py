# SPDX-License-Identifier: Apache-2.0
"""The escape suite: other processes, and what a call leaves to the next. See wall.py; docs/security.md has the table."""

import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import threading

import pytest

from agentrun import Outcome
from agentrun_shim import landlock
from tests.kernel.attacker import Attacker, Said, libc
from tests.kernel.wall import (
    DISPOSABLE,
    Hole,
    alone_outside,
    attackers_inside,
    compare,
    outcomes,
    program,
    request,
    token,
)
from tests.support import PATIENCE, eventually, processes

pytestmark = pytest.mark.host


def named(name: str) -> list[int]:
    """Processes of the whole host that gave themselves this name."""
    return [pid for pid, (_, _, found) in processes().items() if found == name]


# ---------------------------------------------------------------- memory of others


def keep_secret(a, name, word):
    libc.prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME: so that the test finds this process
    Attacker.secret = ctypes.create_string_buffer(word.encode())
    a.step("address", lambda: Said(ctypes.addressof(Attacker.secret)))


def look_into(a, pid, address, word):
    """Process ``pid``, 0 for the attacker's parent, which has the word at this address."""
    pid = pid or os.getppid()
    copy = ctypes.create_string_buffer(len(word))
    local, remote = struct.pack("QQ", ctypes.addressof(copy), len(word)), struct.pack("QQ", address, len(word))

    def read():
        a.sys("process_vm_readv", pid, local, 1, remote, 1, 0)
        return Said("ok" if copy.raw == word.encode() else "something else")

    a.step("read", read)
    a.step("write", a.sys, "process_vm_writev", pid, local, 1, remote, 1, 0)
    a.step("mem", lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)))
    a.step("environ", lambda: os.close(os.open(f"/proc/{pid}/environ", os.O_RDONLY)))
    a.step("maps", lambda: os.close(os.open(f"/proc/{pid}/maps", os.O_RDONLY)))
    pidfd = a.call("pidfd_open", pid, 0)
    a.call("pidfd_getfd", -1 if pidfd is None else pidfd, 0, 0)
    a.call("ptrace", 0x4206, pid, 0, 0)  # PTRACE_SEIZE


LOOKS = ("read", "write", "mem", "environ", "maps", "pidfd_open", "pidfd_getfd", "ptrace")


def test_memory_of_another_sandbox(walls):
    """the memory of a call of the same tenant, whose uid on the host is the same — ptrace(2), process_vm_readv(2), proc(5)"""
    word = token()
    victim = attackers_inside(walls.executor)
    try:
        address = int(victim.attack(keep_secret, stay=True, name=word[-15:], word=word)["address"])
        (pid,) = named(word[-15:])
        without = walls.outside.attack(look_into, pid=pid, address=address, word=word)
        within = walls.inside.attack(look_into, pid=pid, address=address, word=word)
    finally:
        victim.close()
    absent = dict.fromkeys(("mem", "environ", "maps"), "ENOENT") | {"pidfd_getfd": "EPERM"}
    compare(without, within, {step: ("ok", absent.get(step, "ESRCH")) for step in LOOKS})


def test_memory_of_init(walls):
    """the sandbox's own init, which has more rights than the tool — CVE-2016-9962 (runc), ptrace(2)

    Inside, the same attack on a process of the tool's own gets as far as outside: it is init that is closed.
    """
    found = {}
    for name, attackers, pid in (("without", walls.outside, 0), ("own", walls.inside, 0), ("within", walls.inside, 1)):
        word = token()
        address = int(attackers.attack(keep_secret, stay=True, name="attackers", word=word)["address"])
        found[name] = attackers.attack(look_into, pid=pid, address=address, word=word)
    denied = dict.fromkeys(("mem", "environ", "maps"), "EACCES") | {"pidfd_open": "ok"}
    compare(found["without"], found["within"], {step: ("ok", denied.get(step, "EPERM")) for step in LOOKS})
    compare(found["without"], found["own"], {step: ("ok", "EPERM" if step == "pidfd_getfd" else "ok") for step in LOOKS})


# ---------------------------------------------------------------- signals


def send_signals(a, pid):
    """Signal 0 asks for the right and sends nothing."""
    a.step("kill", os.kill, pid, 0)
    a.step("kill a group", os.killpg, pid, 0)
    a.call("tgkill", pid, pid, 0)
    a.call("rt_sigqueueinfo", pid, 0, struct.pack("iii", 0, 0, -1) + bytes(116))
    pidfd = a.call("pidfd_open", pid, 0)
    a.call("pidfd_send_signal", -1 if pidfd is None else pidfd, 0, 0, 0)
    read, _ = os.pipe()
    a.step("SIGIO", a.sys, "fcntl", read, 8, pid)  # F_SETOWN
    a.call("setpriority", 0, pid, 10)
    a.call("sched_setaffinity", pid, 8, b"\xff" * 8)
    a.call("prlimit64", pid, 7, 0, ctypes.create_string_buffer(16))


def kill_everyone(a):
    a.step("kill", os.kill, -1, signal.SIGKILL)


def test_signals_and_processes_of_the_host(walls):
    """signals to the host's processes, and their priority and limits — kill(2), F_SETOWN in fcntl(2), prlimit(2)"""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as victim:
        try:
            names = ("kill", "kill a group", "tgkill", "rt_sigqueueinfo", "pidfd_open", "pidfd_send_signal", "SIGIO",
                     "setpriority", "sched_setaffinity", "prlimit64")  # fmt: skip
            expected = {name: ("ok", "EBADF" if name == "pidfd_send_signal" else "ESRCH") for name in names}
            walls.check(send_signals, expected, outside={"pid": victim.pid}, inside={"pid": victim.pid})
        finally:
            victim.kill()


def test_killing_everyone(walls):
    """kill(-1) as a uid that other processes of the host have too — kill(2)"""
    tenant = "killer"
    tools = int(walls.executor.text("cat /proc/self/uid_map", tenant=tenant).split()[1]) + 1000
    nobodys = (1 << 30) + os.getpid()  # of this run alone: others may share the machine

    def canary(uid: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["setpriv", f"--reuid={uid}", "--clear-groups", "sleep", "600"])

    with canary(tools) as bystander, canary(nobodys) as victim:
        try:
            eventually(lambda: all(processes()[sleeper.pid][2] == "sleep" for sleeper in (bystander, victim)))
            within = walls.alone(kill_everyone, tenant=tenant)
            # Without the wall is what a change of uid alone would be.
            command = ["setpriv", f"--reuid={nobodys}", "--clear-groups", *program("alone", "here", request(kill_everyone, {}))]
            done = subprocess.run(command, check=True, capture_output=True)
            without = outcomes([eval(line) for line in done.stdout.splitlines()], 0)
            assert victim.wait(PATIENCE) == -signal.SIGKILL
            assert bystander.poll() is None
        finally:
            bystander.kill()
            victim.kill()
    compare(without, within, {"kill": ("ok", "ESRCH")})


# ---------------------------------------------------------------- outliving the call


def stay_behind(a, name):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in {*range(1, 65)} - {signal.SIGKILL, signal.SIGSTOP}:
                libc.signal(number, ctypes.c_void_p(1))  # SIG_IGN
            libc.prctl(15, name.encode(), 0, 0, 0)
            os.closerange(0, 3)
            os.write(write, b"y")
            while True:
                signal.pause()
        os._exit(0)
    a.step("detached", os.read, read, 1)


def test_daemonised_orphans(walls):
    """a double fork, a session of its own, every signal ignored — daemon(3), the reason for cgroup.kill"""
    names = token()[-15:], token()[-15:]
    without = alone_outside(stay_behind, params={"name": names[0]})
    within = walls.alone(stay_behind, params={"name": names[1]})
    (survivor,) = named(names[0])
    os.kill(survivor, signal.SIGKILL)
    assert without == within == {"detached": "ok"}
    assert named(names[1]) == []


def die_traced(a):
    """Exit with a child as the tracer: the kernel then tells the tracer and nobody else, and this one never listens."""
    read, write = os.pipe()
    victim = os.getpid()
    if os.fork() == 0:
        libc.prctl(15, b"wall-tracer", 0, 0, 0)
        a.sys("ptrace", 0x4206, victim, 0, 0)  # PTRACE_SEIZE
        os.closerange(0, 3)
        os.write(write, b"y")
        while True:
            signal.pause()
    os.close(write)
    a.step("traced", lambda: Said("ok" if os.read(read, 1) else "no"))


def test_an_exit_that_cannot_be_collected(walls):
    """stopping the daemon itself: a dead tool whose exit only its tracer may collect — ptrace(2), wait(2)"""
    with subprocess.Popen(program("alone", "outside", request(die_traced, {})), stdout=subprocess.DEVNULL) as process:
        pidfd = os.pidfd_open(process.pid)
        assert select.select([pidfd], [], [], PATIENCE)[0], "it has exited"
        assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None, "and cannot be collected"
        os.close(pidfd)
        for tracer in named("wall-tracer"):
            os.kill(tracer, signal.SIGKILL)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(walls.executor.run(program("alone", "inside", request(die_traced, {}))))
    )
    thread.start()
    thread.join(6 if DISPOSABLE else 4)
    stuck = thread.is_alive()
    for tracer in named("wall-tracer"):
        os.kill(tracer, signal.SIGKILL)
    thread.join(PATIENCE)
    assert [result.outcome for result in found] == [Outcome.EXITED]
    assert b"'traced', 'ok'" in found[0].stdout
    if stuck:
        raise Hole("no call was answered until the tracer was killed from outside")


def have_sibling(a):
    def clone():
        if a.sys("clone", 0x8000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:  # CLONE_PARENT
            os._exit(0)

    a.step("clone", clone)


def test_children_for_the_daemon(walls):
    """processes whose parent is the daemon — CLONE_PARENT in clone(2), zombies in wait(2)"""

    def children() -> set[int]:
        return {pid for pid, (parent, _, name) in processes().items() if parent == os.getpid() and name.startswith("python")}

    def attack(how, *args) -> tuple[dict[str, str], int]:
        before = children()
        found = how(*args, have_sibling)
        new = children() - before
        for pid in new:  # ours to collect: the sandbox could not be taken down else
            os.waitpid(pid, 0)
        return found, len(new)

    without, extra = attack(alone_outside)
    assert extra == 1
    within, _ = attack(walls.alone)
    compare(without, within, {"clone": ("ok", "EPERM")})


# ---------------------------------------------------------------- what is shared


def leave_messages(a, word, key):
    """Wherever two processes of a host may meet without having been introduced."""
    import socket

    with open(f"/dev/shm/{word}", "w") as file:
        file.write(word)
    for number, name in ((1, "shmget"), (1, "semget")):
        a.call(name, key, number, 0o1666)  # IPC_CREAT
    queue = a.call("msgget", key, 0o1666)
    a.call("msgsnd", queue, struct.pack("q8s", 1, b"message"), 8, 0)
    a.call("mq_open", word.encode(), os.O_RDWR | os.O_CREAT, 0o666, 0)
    Attacker.sockets = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    Attacker.sockets[0].bind(f"\0{word}")
    Attacker.sockets[0].listen()
    Attacker.sockets[1] = socket.create_server(("127.0.0.1", 20000 + key % 10000))


def find_messages(a, word, key):
    import socket

    a.step("file", lambda: os.close(os.open(f"/dev/shm/{word}", os.O_RDONLY)))
    a.call("shmget", key, 1, 0)
    a.call("semget", key, 1, 0)
    queue = a.call("msgget", key, 0)
    a.call("msgrcv", -1 if queue is None else queue, ctypes.create_string_buffer(16), 8, 0, 0o4000)  # IPC_NOWAIT
    a.call("mq_open", word.encode(), os.O_RDONLY | os.O_NONBLOCK, 0, 0)
    with socket.socket(socket.AF_UNIX) as sock:
        a.step("abstract socket", sock.connect, f"\0{word}")
    with socket.socket() as sock:
        a.step("loopback", sock.connect, ("127.0.0.1", 20000 + key % 10000))


@pytest.mark.parametrize("tenant", ["default", "other"])
def test_messages_between_sandboxes(walls, tenant):
    """two calls at the same time, of one tenant or of two — shm_overview(7), sysvipc(7), mq_overview(7), unix(7)"""
    params = {"word": token(), "key": int.from_bytes(os.urandom(3), "little") + 1}
    refused = {"mq_open"} if landlock.version() else set()  # it knows no place that a queue would be below
    for attackers in (walls.outside, walls.inside):
        left = attackers.attack(leave_messages, stay=True, **params)
        assert {name for name, outcome in left.items() if outcome != "ok"} <= refused, left
    without = walls.outside.attack(find_messages, **params)
    within = walls.alone(find_messages, params=params, tenant=tenant)
    own = walls.inside.attack(find_messages, **params)
    assert {name for name, outcome in own.items() if outcome != "ok"} <= refused, "in the sandbox itself they are found"
    absent = {"msgrcv": "EINVAL", "abstract socket": "ECONNREFUSED", "loopback": "ECONNREFUSED"}
    steps = ("file", "shmget", "semget", "msgget", "msgrcv", "mq_open", "abstract socket", "loopback")
    compare(without, within, {step: ("ok", absent.get(step, "ENOENT")) for step in steps})


def set_flags(a):
    a.step("flags", fcntl.fcntl, 0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_APPEND)


def see_flags(a):
    a.step("flags", lambda: Said("marked" if fcntl.fcntl(0, fcntl.F_GETFL) & os.O_APPEND else "clean"))


def test_flags_of_a_shared_descriptor(walls):
    """a bit for the next call, of another tenant too, in the flags of an open file description — fcntl(2), F_SETFL, F_SETOWN"""
    found = []
    shared = os.open("/dev/null", os.O_RDWR)
    try:
        for attack in (set_flags, see_flags):
            found.append((alone_outside(attack, stdin=shared), walls.alone(attack, tenant=attack.__name__.replace("_", "-"))))
    finally:
        os.close(shared)
    assert found[0] == ({"flags": "ok"}, {"flags": "ok"})
    compare(*found[1], {"flags": ("marked", "clean")})
