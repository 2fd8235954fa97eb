# SPDX-License-Identifier: Apache-2.0
"""The escape suite: doors into the kernel. See wall.py; docs/security.md has the table.

An outcome outside that is an errno other than EPERM says that the permission check was passed: the attack stops one step
before it would do harm. ``ENOSYS`` and the like as an alternative outside: a kernel built without the feature.
"""

import ctypes
import fcntl
import os
import struct

import pytest

from tests.kernel.attacker import NR, libc
from tests.kernel.wall import DISPOSABLE

pytestmark = pytest.mark.host


def kernel_log(a):
    a.call("syslog", 3, ctypes.create_string_buffer(64), 64)  # SYSLOG_ACTION_READ_ALL
    a.open("/dev/kmsg")
    a.open("/proc/kmsg")


def test_the_kernels_log(walls):
    """reading the kernel's log: addresses, other tenants' file names — syslog(2), dmesg(1)"""
    walls.check(
        kernel_log,
        {
            "syslog": ("ok", "EPERM"),
            "/dev/kmsg": ("ok", "ENOENT"),
            "/proc/kmsg": ("ok", "EACCES|null"),
        },
    )


def load_bpf(a):
    array = struct.pack("IIII", 2, 4, 4, 1) + bytes(112)  # BPF_MAP_TYPE_ARRAY of one entry
    a.step("map", a.sys, "bpf", 0, array, len(array))
    code = ctypes.create_string_buffer(bytes.fromhex("b700000000000000 9500000000000000"))  # r0 = 0; exit
    licence = ctypes.create_string_buffer(b"GPL")
    load = struct.pack("IIQQ", 1, 2, ctypes.addressof(code), ctypes.addressof(licence)) + bytes(120)
    a.step("program", a.sys, "bpf", 5, load, len(load))


def test_bpf(walls):
    """the BPF verifier — CVE-2021-3490, CVE-2023-2163, bpf(2)"""
    walls.check(load_bpf, {"map": ("ok", "EPERM"), "program": ("ok", "EPERM")})


def count_events(a):
    software_clock = struct.pack("IIQ", 1, 112, 0) + bytes(96)
    a.call("perf_event_open", software_clock, 0, -1, -1, 0)


def test_perf_events(walls):
    """performance counters: kernel bugs and spying on others — CVE-2013-2094, perf_event_open(2)"""
    walls.check(count_events, {"perf_event_open": ("ok", "EPERM")})


def stall_faults(a):
    a.call("userfaultfd", os.O_CLOEXEC)
    a.open("/dev/userfaultfd", os.O_RDWR)


def test_userfaultfd(walls):
    """holding the kernel still in a page fault to win its races — userfaultfd(2)"""
    walls.check(stall_faults, {"userfaultfd": ("ok", "EPERM"), "/dev/userfaultfd": ("ok|ENOENT", "ENOENT")})


def submit_ring(a):
    a.call("io_uring_setup", 1, ctypes.create_string_buffer(120))
    a.call("io_uring_enter", -1, 0, 0, 0, 0, 0)


def test_io_uring(walls):
    """system calls that no seccomp filter sees — CVE-2022-29582, CVE-2023-2598, io_uring(7)"""
    walls.check(submit_ring, {"io_uring_setup": ("ok", "EPERM"), "io_uring_enter": ("EBADF", "EPERM")})


def open_sockets(a):
    for name, family, kind, protocol in (
        ("raw", 2, 3, 1), ("raw6", 10, 3, 58), ("packet", 17, 3, 0), ("vsock", 40, 1, 0), ("alg", 38, 5, 0), ("tipc", 30, 2, 0),
        ("can", 29, 3, 1), ("key", 15, 3, 2), ("bluetooth", 31, 1, 3), ("rds", 21, 5, 0), ("xdp", 44, 3, 0),
    ):  # fmt: skip
        a.step(name, a.sys, "socket", family, kind, protocol)


ABSENT = "EAFNOSUPPORT"


def test_socket_families(walls):
    """raw packets, the hypervisor (vsock) and rare families — CVE-2017-7308, CVE-2021-26708, CVE-2021-43267, socket(2)"""
    rare = (f"ok|{ABSENT}|EPROTONOSUPPORT|ESOCKTNOSUPPORT|ENODEV|EINVAL", ABSENT)
    expected = dict.fromkeys(("vsock", "alg", "tipc", "can", "key", "bluetooth", "rds", "xdp"), rare)
    expected |= {"packet": ("ok", ABSENT), "raw": ("ok", "EPERM"), "raw6": (f"ok|{ABSENT}", f"EPERM|{ABSENT}")}
    walls.check(open_sockets, expected)


def rule_network(a):
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        up, down = (b"lo".ljust(16, b"\0") + struct.pack("h", flags) + bytes(22) for flags in (1, 0))
        a.step("take lo down", fcntl.ioctl, sock, 0x8914, down)  # SIOCSIFFLAGS
        if a.ok:
            fcntl.ioctl(sock, 0x8914, up)
        a.step("replace iptables", sock.setsockopt, 0, 64, bytes(96))  # SOL_IP, IPT_SO_SET_REPLACE
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        # RTM_DELLINK of an index that is none, with NLM_F_REQUEST and NLM_F_ACK: asked for rights before it is looked up.
        sock.send(struct.pack("IHHII", 32, 17, 5, 1, 0) + struct.pack("BxHiII", 0, 0, 0x7FFFFFFF, 0, 0))

        def answer():
            error = -struct.unpack_from("i", sock.recv(4096), 16)[0]
            raise OSError(error, "netlink")

        a.step("delete a link", answer)


def test_ruling_its_own_network(walls):
    """the parts of the network stack for administrators, nftables among them — CVE-2021-22555, CVE-2024-1086"""
    walls.check(
        rule_network,
        {
            "take lo down": ("ok", "EPERM"),
            "replace iptables": ("EINVAL|ENOPROTOOPT|ENOENT", "EPERM|ENOPROTOOPT"),
            "delete a link": ("ENODEV", "EPERM"),
        },
    )


def take_over_the_kernel(a):
    empty = ctypes.create_string_buffer(1)
    a.call("init_module", empty, 0, empty)
    a.call("finit_module", -1, empty, 0)
    a.call("delete_module", b"agentrun_no_such_module", os.O_NONBLOCK)
    a.call("kexec_load", 0, 0, empty, 0xFF)
    a.call("kexec_file_load", -1, -1, 0, empty, 0xFF)
    a.call("reboot", 0, 0, 0, empty)
    a.call("swapon", b"/agentrun/no/such/file", 0)
    a.call("acct", b"/agentrun/no/such/file")
    a.call("quotactl", 0x80000001 - (1 << 32), b"/agentrun/no/such/file", 0, empty)
    a.call("iopl", 3)
    a.call("ioperm", 0x80, 1, 1)
    a.call("modify_ldt", 0, empty, 0)


def test_modules_kexec_reboot_swap(walls):
    """replacing or stopping the kernel, I/O ports — init_module(2), kexec_load(2), reboot(2), swapon(2), acct(2), iopl(2)"""
    walls.check(
        take_over_the_kernel,
        {
            "init_module": ("ENOEXEC|ENOSYS", "EPERM"),
            "finit_module": ("EBADF|EINVAL|ENOSYS", "EPERM"),
            "delete_module": ("ENOENT|ENOSYS", "EPERM"),
            "kexec_load": ("EINVAL|ENOSYS", "EPERM"),
            "kexec_file_load": ("EINVAL|ENOSYS", "EPERM"),
            "reboot": ("EINVAL", "EPERM"),
            "swapon": ("ENOENT", "EPERM"),
            "acct": ("ENOENT|ENOSYS", "EPERM"),
            "quotactl": ("ENOENT|ENOSYS", "EPERM"),
            "iopl": ("ok|ENOSYS", "EPERM"),
            "ioperm": ("ok|ENOSYS", "EPERM"),
            "modify_ldt": ("ok|ENOSYS", "EPERM"),
        },
    )


def rule_clock_and_names(a, disposable):
    a.call("settimeofday", 0, 0)  # sets nothing, but asks for the right to
    slow = ctypes.create_string_buffer(struct.pack("I", 0x4000) + bytes(204))  # ADJ_TICK with a tick of 0: refused as EINVAL
    a.call("adjtimex", slow)
    a.call("clock_adjtime", 0, slow)
    if disposable:
        now = ctypes.create_string_buffer(16)
        a.sys("clock_gettime", 0, now)
        a.call("clock_settime", 0, now)
    a.call("sethostname", b"intruder", 8)
    a.call("setdomainname", b"intruder", 8)


def test_clock_and_names(walls):
    """the host's time and name — clock_settime(2), adjtimex(2), sethostname(2)"""
    walls.check(
        rule_clock_and_names,
        {
            "settimeofday": ("ok", "EPERM"),
            "adjtimex": ("EINVAL", "EPERM"),
            "clock_adjtime": ("EINVAL", "EPERM"),
            # Setting the real clock is shown where it is nobody's: in a guest of the VM lane.
            "clock_settime": ("ok" if DISPOSABLE else "-", "EPERM"),
            "sethostname": ("ok", "EPERM"),
            "setdomainname": ("ok", "EPERM"),
        },
        outside={"disposable": DISPOSABLE},
        inside={"disposable": True},
    )


def enter_as_i386(a):
    import mmap

    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # push rbx; mov eax, 310 (unshare); mov ebx, 0x10000000 (CLONE_NEWUSER); int 0x80; pop rbx; ret
    page.write(bytes.fromhex("53 b8 36010000 bb 00000010 cd80 5b c3"))
    unshare = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def attempt():
        if (result := unshare()) < 0:
            raise OSError(-result, "int 0x80")

    a.step("int 0x80", attempt)


def test_i386_entry(walls):
    """a number that is harmless on x86-64 and not on i386 — seccomp(2), caveats"""
    unshown = "SIGSEGV: a kernel without i386 emulation, or one that was told at boot to refuse it"
    walls.check(enter_as_i386, {"int 0x80": ("ok|SIGSEGV", "SIGSYS|SIGSEGV")}, unshown=unshown)


def enter_as_x32(a):
    def attempt():
        if libc.syscall(ctypes.c_long(0x40000000 | NR["unshare"]), ctypes.c_long(0x10000000)) == -1:  # CLONE_NEWUSER
            raise OSError(ctypes.get_errno(), "unshare")

    a.step("unshare", attempt)


def test_x32_entry(walls):
    """the second number of every x86-64 call — seccomp(2), caveats"""
    walls.check(enter_as_x32, {"unshare": ("ok|ENOSYS", "SIGSYS")})


def change_personality(a):
    for name, bits in (("no randomisation", 0x40000), ("read implies exec", 0x400000), ("page at zero", 0x100000)):
        a.step(name, a.sys, "personality", bits)


def test_personality(walls):
    """weakening the address space — personality(2), ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC, MMAP_PAGE_ZERO"""
    walls.check(change_personality, dict.fromkeys(("no randomisation", "read implies exec", "page at zero"), ("ok", "EPERM")))
