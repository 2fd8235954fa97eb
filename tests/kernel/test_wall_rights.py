# SPDX-License-Identifier: Apache-2.0
"""The escape suite: gaining rights, keys, the kernel's files in /proc, terminals. See wall.py; docs/security.md has the table."""

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentrun import Policy
from agentrun.policy import Filesystem
from agentrun_shim.syscall_table import NUMBERS
from tests.kernel.attacker import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, NR, Said, libc
from tests.kernel.wall import Hole, alone_outside, compare, token
from tests.support import PYTHON, Blocking, Leaks, cgroup_of, own_config

pytestmark = pytest.mark.host


# ---------------------------------------------------------------- credentials and namespaces


def become_root(a):
    a.step("setuid", os.setresuid, 0, 0, 0)
    a.step("setgid", os.setresgid, 0, 0, 0)
    a.step("setgroups", os.setgroups, [0, 4, 42])
    a.step("securebits", a.sys, "prctl", 28, 0x10, 0, 0, 0)  # PR_SET_SECUREBITS: SECBIT_KEEP_CAPS
    a.step("keep capabilities", a.sys, "prctl", 8, 1, 0, 0, 0)
    a.call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 1 << 21, 1 << 21, 1 << 21, 0, 0, 0))  # CAP_SYS_ADMIN
    a.step("ambient", a.sys, "prctl", 47, 2, 21, 0, 0)  # PR_CAP_AMBIENT_RAISE
    a.step("new privileges again", a.sys, "prctl", 38, 0, 0, 0, 0)
    a.step("locked", lambda: Said(a.sys("prctl", 27, 0, 0, 0, 0) & 0xEF == 0xEF))  # PR_GET_SECUREBITS


def test_becoming_root(walls):
    """ids and capabilities asked for directly — setuid(2), capset(2), capabilities(7), PR_SET_SECUREBITS"""
    names = ("setuid", "setgid", "setgroups", "capset", "ambient", "securebits", "keep capabilities")
    expected = dict.fromkeys(names, ("ok", "EPERM")) | {"new privileges again": ("EINVAL", "EINVAL"), "locked": ("False", "True")}
    walls.check(become_root, expected)


def nest_namespaces(a):
    def clone():
        if (pid := a.sys("clone", CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)) == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def clone3():
        args = struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
        if (pid := a.sys("clone3", args, len(args))) == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    a.step("clone", clone)
    a.step("clone3", clone3)
    for name in ("mnt", "uts", "ipc", "net", "pid", "cgroup"):
        a.step(f"setns {name}", a.sys, "setns", os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0)
    own = ctypes.create_string_buffer(4)
    a.step("owner", fcntl.ioctl, os.open("/proc/self/ns/user", os.O_RDONLY), 0xB704, own)  # NS_GET_OWNER_UID
    a.step("parent", fcntl.ioctl, os.open("/proc/self/ns/pid", os.O_RDONLY), 0xB702)  # NS_GET_PARENT
    a.step("unshare user", a.sys, "unshare", CLONE_NEWUSER)
    for name, flag in (("mnt", CLONE_NEWNS), ("net", CLONE_NEWNET), ("pid", 0x20000000), ("cgroup", 0x02000000), ("time", 0x80)):
        a.step(f"unshare {name}", a.sys, "unshare", flag)


def test_nested_namespaces(walls):
    """all capabilities in a namespace of one's own — CVE-2022-0185, CVE-2023-0386, CVE-2024-1086, user_namespaces(7)"""
    unshares = ("user", "mnt", "net", "pid", "cgroup", "time")
    setns = ("mnt", "uts", "ipc", "net", "pid", "cgroup")
    expected = {f"unshare {name}": ("ok", "EPERM") for name in unshares} | {f"setns {name}": ("ok", "EPERM") for name in setns}
    expected |= {"clone": ("ok", "EPERM"), "clone3": ("ok", "ENOSYS"), "owner": ("ok", "ok"), "parent": ("EPERM", "EPERM")}
    walls.check(nest_namespaces, expected)


def stack_filters(a):
    """Filters that allow everything, on top; then a call that the one below refuses."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))  # BPF_RET, SECCOMP_RET_ALLOW
    allow = struct.pack("HxxxxxxQ", 1, ctypes.addressof(code))
    if not a.sys("prctl", 39, 0, 0, 0, 0):
        a.sys("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    a.step("filter", a.sys, "seccomp", 1, 0, allow)
    a.step("listener", a.sys, "seccomp", 1, 8, allow)  # SECCOMP_FILTER_FLAG_NEW_LISTENER
    a.call("unshare", CLONE_NEWUSER)


def test_another_filter_on_top(walls):
    """a seccomp filter of the tool's own that allows what the first refuses — seccomp(2)"""
    # EBUSY: the first filter has a listener, and there can be only one.
    walls.check(stack_filters, {"filter": ("ok", "ok"), "listener": ("ok", "ok|EBUSY"), "unshare": ("ok", "EPERM")})


def change_call_in_flight(a):
    """A tracer turns its child's getppid into unshare(CLONE_NEWUSER) after the filter has seen getppid."""
    child = os.fork()
    if child == 0:
        a.sys("ptrace", 0, 0, 0, 0)  # PTRACE_TRACEME
        os.kill(os.getpid(), signal.SIGSTOP)
        result = libc.syscall(ctypes.c_long(NR["getppid"]))
        os._exit(ctypes.get_errno() if result < 0 else 200 if result > 0 else 0)
    os.waitpid(child, 0)
    number = ctypes.c_long()
    changed = False
    while True:
        a.sys("ptrace", 24, child, 0, 0)  # PTRACE_SYSCALL
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            break
        a.sys("ptrace", 3, child, 120, ctypes.byref(number))  # PTRACE_PEEKUSER, orig_rax
        if number.value == NR["getppid"] and not changed:
            changed = True
            a.sys("ptrace", 6, child, 112, CLONE_NEWUSER)  # PTRACE_POKEUSER, rdi
            a.sys("ptrace", 6, child, 120, NR["unshare"])

    def result():
        if (code := os.waitstatus_to_exitcode(status)) != 0:
            raise OSError(code, "unshare")

    a.step("unshare", result)


def test_a_call_changed_in_flight(walls):
    """a tracer that changes a system call's number — seccomp(2), what it says about kernels before 4.8"""
    walls.check(change_call_in_flight, {"unshare": ("ok", "EPERM")})


# ---------------------------------------------------------------- keys


def use_keys(a):
    key = a.call("add_key", b"user", b"agentrun-wall", b"secret", 6, -3)  # KEY_SPEC_SESSION_KEYRING
    a.step("session keyring", a.sys, "keyctl", 0, -3, 0)  # KEYCTL_GET_KEYRING_ID
    a.step("user keyring", a.sys, "keyctl", 0, -4, 1)
    a.step("read", a.sys, "keyctl", 11, -1 if key is None else key, ctypes.create_string_buffer(8), 8)
    a.call("request_key", b"user", b"agentrun-wall", 0, -3)
    a.step("join another's", a.sys, "keyctl", 1, b"agentrun-wall-ring")
    a.read("/proc/keys")


def test_kernel_keyrings(walls):
    """keys of the host's users, and bugs of the key service — CVE-2016-0728, keyrings(7), keyctl(2)"""
    names = ("add_key", "session keyring", "user keyring", "read", "request_key", "join another's")
    walls.check(use_keys, dict.fromkeys(names, ("ok", "EPERM")) | {"/proc/keys": ("ok", "empty")})


class Keyed(Blocking):
    """An executor whose own session keyring holds a key."""

    def __init__(self, config, name: str) -> None:
        self._name = name
        super().__init__(config)

    async def _serve(self) -> None:
        assert libc.syscall(NUMBERS["keyctl"], 1, None) > 0  # of this thread: KEYCTL_JOIN_SESSION_KEYRING
        assert libc.syscall(NUMBERS["add_key"], b"user", self._name.encode(), b"secret", 6, -3) > 0
        self.seen = Path("/proc/thread-self/../../../keys").read_text()
        await super()._serve()


def test_the_daemons_session_keyring():
    """keys of whoever started the daemon: possession is inherited, whatever the uid — session-keyring(7)

    /proc/keys lists the keys one possesses; here it is not masked, so that the keyring itself is what is asked for.
    """
    name, config = token(), own_config()
    before = Leaks(cgroup_of(config.name))
    keyed = Keyed(config, name)
    try:
        unmasked = Policy(fs=Filesystem(masked=()))
        inside = keyed.text("cat /proc/keys; echo end", policy=unmasked)
    finally:
        keyed.close()
    before.check()
    assert name in keyed.seen
    assert inside.endswith("end")
    if name in inside:
        raise Hole(inside)


# ---------------------------------------------------------------- the kernel's files


CONTROLS = (
    "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hotplug", "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/panic", "/proc/sys/kernel/randomize_va_space", "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/kernel/yama/ptrace_scope", "/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/shmmax", "/proc/sys/vm/drop_caches",
    "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/protected_symlinks", "/proc/sys/fs/suid_dumpable",
    "/proc/sys/fs/binfmt_misc/register", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/user/max_user_namespaces",
    "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr", "/proc/acpi/wakeup", "/proc/scsi/scsi",
    "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/power/state",
)  # fmt: skip


def write_controls(a, paths):
    """Opening for writing is where the right is asked for: what is open is not written to."""
    for path in paths:
        if os.path.lexists(path):
            a.open(path, os.O_WRONLY)
    a.step("mount sysfs", a.mount, "sysfs", "/tmp", "sysfs")
    a.step("mount proc", a.mount, "proc", "/tmp", "proc")


def test_sysctl_and_sysrq(walls):
    """the switches of the kernel: a handler of core dumps, sysrq, binfmt_misc — CVE-2022-0811, core(5), proc(5)"""
    expected = dict.fromkeys(CONTROLS, ("ok|-", "EROFS|EACCES|-"))  # "-": this kernel has none, or no sandbox has it
    expected |= {"mount sysfs": ("ok", "EPERM"), "mount proc": ("ok", "EPERM")}
    expected["/proc/sys/user/max_user_namespaces"] = ("ok|EACCES", "EROFS|EACCES")  # the former with CAP_SYS_RESOURCE
    walls.check(write_controls, expected, outside={"paths": CONTROLS}, inside={"paths": CONTROLS})


SECRETS = (
    "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/proc/acpi",
    "/proc/kpagecount", "/proc/kpageflags", "/proc/slabinfo", "/proc/vmallocinfo", "/proc/pagetypeinfo", "/proc/latency_stats",
    "/proc/timer_stats", "/proc/tty/driver", "/sys/firmware", "/sys/kernel/debug", "/sys/kernel/security", "/sys/class",
    "/sys/fs/bpf",
)  # fmt: skip
OF_INIT = ("environ", "maps", "stack", "syscall", "io", "auxv", "fd", "root/etc", "cwd", "map_files")


def read_secrets(a, paths, parts, pid):
    for path in paths:
        if os.path.lexists(path):
            a.read(path)
    for part in parts:
        a.read(f"/proc/{pid}/{part}", f"init's {part}")

    def addresses(path, column):
        with open(path) as file:
            values = [int(line.split()[0].split("-")[column], 16) for _, line in zip(range(2000), file, strict=False)]
        return Said("shown" if any(values) else "hidden")

    a.step("kernel addresses", addresses, "/proc/kallsyms", 0)
    a.step("physical addresses", addresses, "/proc/iomem", 1)


def test_secrets_in_proc_and_sys(walls):
    """memory, addresses and hardware of the machine, init's environment — CVE-2016-9962, proc(5), sysfs(5)"""
    expected = dict.fromkeys(SECRETS, ("ok|empty|-|EPERM|EIO", "EACCES|EPERM|empty|-"))
    expected |= {f"init's {part}": ("ok|empty", "EACCES|EPERM") for part in OF_INIT}
    expected |= {"kernel addresses": ("shown", "hidden"), "physical addresses": ("shown", "hidden")}
    params = {"paths": SECRETS, "parts": OF_INIT}
    walls.check(read_secrets, expected, outside={**params, "pid": os.getpid()}, inside={**params, "pid": 1})


# ---------------------------------------------------------------- the caller's terminal


@contextmanager
def terminal():
    """A terminal that is the controlling one of somebody else's session."""
    master, slave = os.openpty()
    script = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); print('mine', flush=True); input()"
    command = [PYTHON, "-I", "-S", "-c", script]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, start_new_session=True) as owner:
        try:
            assert owner.stdout.readline() == b"mine\n"
            yield slave
        finally:
            owner.kill()
            os.close(slave)
            os.close(master)


def use_terminal(a):
    a.step("inject", a.sys, "ioctl", 0, 0x5412, b"x")  # TIOCSTI
    a.step("inject, high bits", a.sys, "ioctl", 0, 0x5412 | 1 << 32, b"x")
    a.step("paste", a.sys, "ioctl", 0, 0x541C, b"\3")  # TIOCLINUX
    a.step("steal", a.sys, "ioctl", 0, 0x540E, 1)  # TIOCSCTTY
    a.step("resize", a.sys, "ioctl", 0, 0x5414, struct.pack("4H", 1, 1, 0, 0))  # TIOCSWINSZ
    a.open("/dev/tty", os.O_RDWR)


def test_the_callers_terminal(walls):
    """typing into the terminal that a call was started from, or taking it over — CVE-2016-2779, CVE-2023-28339, ioctl_tty(2)"""
    with terminal() as slave:
        within = walls.alone(use_terminal, stdin=slave)
        without = alone_outside(use_terminal, stdin=slave)
        queued = struct.unpack("i", fcntl.ioctl(slave, termios.FIONREAD, bytes(4)))
    # A pseudoterminal is no virtual console, so that TIOCLINUX cannot be shown: ENOTTY says that it was asked for.
    expected = {"inject": ("ok", "EPERM"), "inject, high bits": ("ok", "EPERM"), "paste": ("ENOTTY|EINVAL", "EPERM"),
                "steal": ("ok", "EPERM")}  # fmt: skip
    # A terminal that is passed as a descriptor is the tool's to set, as a file would be its to truncate; `agentrun exec` makes
    # a terminal of the sandbox's own instead.
    expected |= {"resize": ("ok", "ok"), "/dev/tty": ("ok", "ENXIO")}
    compare(without, within, expected)
    assert queued != 0
