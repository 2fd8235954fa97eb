# SPDX-License-Identifier: Apache-2.0
"""The shipped seccomp profiles: what they decide, by an interpreter of our own, then the same filters in the kernel."""

import errno
import json
import re
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest

from agentrun_shim import seccomp
from agentrun_shim.data import data_path
from agentrun_shim.seccomp import compile_profile, default_filter, find_profile
from agentrun_shim.seccomp_profile import Profile
from agentrun_shim.syscall_table import ELSEWHERE, NUMBERS
from tests.requirements import lacking
from tests.unit.seccomp_support import (
    AARCH64,
    ALLOW,
    EAFNOSUPPORT,
    ENOSYS,
    EPERM,
    HIGH,
    I386,
    KILL,
    check_shape,
    disassemble,
    needs_kernel,
    python,
    run,
    trace,
    under,
    word,
)

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
SHIPPED = ("default", "strict")
WITH_ARGUMENTS = {"clone", "ioctl", "personality", "socket", "socketpair"}


def words(text: str) -> list[str]:
    return text.split()


@cache
def profile(name: str) -> Profile:
    return find_profile(name)


@cache
def program(name: str) -> bytes:
    return compile_profile(profile(name))


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", SHIPPED)
def test_every_call_is_decided_on_purpose(name: str) -> None:
    rules = json.loads(data_path(f"policies/seccomp/{name}.json").read_text())["syscalls"]
    named = [syscall for rule in rules for syscall in rule["names"]]
    assert set(named) == set(NUMBERS)
    twice = WITH_ARGUMENTS | ({"mknod", "mknodat"} if name == "strict" else set())
    assert {syscall for syscall in named if named.count(syscall) > 1} == twice
    assert all(rule["comment"] for rule in rules)
    assert profile(name).unknown == ()
    assert profile(name).notes == ()


@pytest.mark.parametrize("name", SHIPPED)
def test_an_errno_is_said_in_both_ways(name: str) -> None:
    """`errnoRet` is the specification's, `errno` podman's; a reader understands the second."""
    file = json.loads(data_path(f"policies/seccomp/{name}.json").read_text())
    assert (file["defaultErrnoRet"], file["defaultErrno"]) == (38, "ENOSYS")
    for rule in file["syscalls"]:
        assert ("errno" in rule) == ("errnoRet" in rule) == (rule["action"] == "SCMP_ACT_ERRNO")


def test_numbers_agree_with_the_installed_header() -> None:
    if not HEADER.exists():
        lacking(f"{HEADER} is not installed")
    header = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    assert len(header) > 300
    ours = {name: str(number) for name, number in NUMBERS.items()}
    known = max(NUMBERS.values())
    assert {name: ours.get(name) for name in header if int(header[name]) <= known} == {
        name: number for name, number in header.items() if int(number) <= known
    }


def test_numbers_are_unique_and_end_where_we_say() -> None:
    assert len(set(NUMBERS.values())) == len(NUMBERS)
    assert set(NUMBERS.values()) == set(range(337)) | set(range(424, 472))
    assert (NUMBERS["cachestat"], NUMBERS["mseal"], NUMBERS["file_setattr"]) == (451, 462, 469)
    assert not NUMBERS.keys() & ELSEWHERE


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "syscall",
    words(
        """read write sendmsg recvmsg close close_range dup3 execve chdir ioctl openat mmap munmap setsid prlimit64 setrlimit
        umask clock_gettime exit exit_group prctl capset setresuid setresgid setgroups seccomp rt_sigaction rt_sigprocmask
        rt_sigreturn setpriority landlock_add_rule landlock_restrict_self"""
    ),
)
def test_the_runner_can_go_on_after_loading_it(name: str, syscall: str) -> None:
    assert run(program(name), NUMBERS[syscall]) == ALLOW


def test_a_profile_is_found_by_name_or_path() -> None:
    assert find_profile("default").name == str(data_path("policies/seccomp/default.json"))
    assert find_profile(str(data_path("policies/seccomp/strict.json"))).calls == profile("strict").calls
    for name in ("nonesuch", "", "default.json", "../seccomp/default", "/nonesuch.json"):
        with pytest.raises(seccomp.ProfileError, match=r"no such profile \(known: default, strict;|No such file"):
            find_profile(name)


# ---------------------------------------------------------------- the programs, interpreted

REFUSED = words(
    """
    mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr
    setns unshare listns sethostname setdomainname

    init_module finit_module delete_module create_module get_kernel_syms query_module kexec_load kexec_file_load reboot swapon
    swapoff acct quotactl quotactl_fd iopl ioperm vhangup syslog modify_ldt settimeofday clock_settime

    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register fanotify_init fanotify_mark
    open_by_handle_at lookup_dcookie kcmp pidfd_getfd process_madvise
    add_key request_key keyctl lsm_get_self_attr lsm_set_self_attr lsm_list_modules
    io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents
    mbind set_mempolicy get_mempolicy set_mempolicy_home_node migrate_pages move_pages
    ustat sysfs uselib _sysctl nfsservctl getpmsg putpmsg afs_syscall tuxcall security vserver
    """
)
REFUSED_BY_STRICT = words(
    """
    memfd_create memfd_secret execveat
    ptrace process_vm_readv process_vm_writev process_mrelease uretprobe uprobe
    name_to_handle_at statmount listmount vmsplice tee remap_file_pages epoll_ctl_old epoll_wait_old
    pkey_alloc pkey_free pkey_mprotect mlockall munlockall set_thread_area get_thread_area
    sched_setparam sched_setscheduler sched_setattr ioprio_set adjtimex clock_adjtime
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    mknod mknodat personality
    """
)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_gets_its_decision(name: str) -> None:
    """With arguments of 0, under which those that look at them are allowed but for the sockets (AF_UNSPEC)."""
    expected = dict.fromkeys(range(601), ENOSYS) | dict.fromkeys(NUMBERS.values(), ALLOW) | {NUMBERS["clone3"]: ENOSYS}
    refused = REFUSED + (REFUSED_BY_STRICT if name == "strict" else [])
    expected |= {NUMBERS[syscall]: EPERM for syscall in refused}
    expected |= {NUMBERS[syscall]: EAFNOSUPPORT for syscall in ("socket", "socketpair")}
    assert {nr: run(program(name), nr) for nr in range(601)} == expected


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("nr", [9999, 0x3FFFFFFF, 0xFFFFFFFF])
def test_unknown_numbers_are_enosys(name: str, nr: int) -> None:
    assert run(program(name), nr) == ENOSYS
    assert word(profile(name).decide(nr, [0] * 6)) == ENOSYS


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("nr", [0x40000000, 0x40000027, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE])
def test_x32_is_killed(name: str, nr: int) -> None:
    assert run(program(name), nr) == KILL
    assert word(profile(name).decide(nr, [0] * 6)) == KILL


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("arch", [I386, AARCH64, 0, 0xFFFFFFFF])
def test_a_foreign_architecture_is_killed_whatever_it_calls(name: str, arch: int) -> None:
    assert {run(program(name), nr, arch=arch) for nr in [*range(601), 0x40000000, 0xFFFFFFFF]} == {KILL}


SIGCHLD, THREAD = 17, 0x3D0F00  # the flags of fork and of pthread_create in glibc
BOTH = [
    ("clone", [SIGCHLD], ALLOW),
    ("clone", [THREAD], ALLOW),
    ("clone", [0x80 | SIGCHLD], ALLOW),
    *[("clone", [1 << bit | SIGCHLD], EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)],
    ("clone", [HIGH | 0x10000000 | SIGCHLD], EPERM),
    ("clone", [HIGH | SIGCHLD], ALLOW),
    ("clone", [SIGCHLD, 0x10000000, 0x10000000], ALLOW),
    ("clone3", [0], ENOSYS),
    ("unshare", [0], EPERM),
    *[("socket", [family, 1, 0], EAFNOSUPPORT) for family in (0, 3, 9, 11, 15, 17, 30, 38, 40, 44)],
    ("socket", [HIGH | 40], EAFNOSUPPORT),
    ("socket", [1], ALLOW),
    ("socket", [HIGH | 1], ALLOW),
    ("socketpair", [1, 1], ALLOW),
    ("socketpair", [30, 1], EAFNOSUPPORT),
    ("ioctl", [0, 0x5401], ALLOW),
    ("ioctl", [0, 0x5412], EPERM),
    ("ioctl", [0, HIGH | 0x5412], EPERM),
    ("ioctl", [0, 0x541C], EPERM),
    ("ioctl", [0, HIGH | 0x541C], EPERM),
    *[("ioctl", [0, 0x5412 ^ 1 << bit], ALLOW) for bit in range(32)],
    ("ioctl", [0x5412, 0x5413], ALLOW),
    *[("personality", [value], ALLOW) for value in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, HIGH | 0xFFFFFFFF)],
    *[("personality", [value], EPERM) for value in (1, 9, 0x40000, 0x20009, 0xFFFFFFFE)],
]
ARGUMENTS = [
    *[(name, *rest) for name in SHIPPED for rest in BOTH],
    *[("default", "socket", [family, 1, 0], ALLOW) for family in (2, 10, 16, HIGH | 2)],
    *[("strict", "socket", [family, 1, 0], EAFNOSUPPORT) for family in (2, 10, 16)],
    *[("default", "personality", [value], ALLOW) for value in (0, 8, 0x20000, 0x20008)],
    *[("strict", "personality", [value], EPERM) for value in (0, 8, 0x20000, 0x20008)],
    ("default", "ptrace", [0], ALLOW),
    ("default", "process_vm_readv", [], ALLOW),
    ("default", "mknod", [0, 0o020666], ALLOW),
    ("strict", "mknod", [0, 0o010644], ALLOW),
    ("strict", "mknodat", [0, 0, 0o010644], ALLOW),
    *[
        ("strict", "mknodat", [0, 0o010644, mode | 0o644], EPERM)
        for mode in (0, 0o020000, 0o060000, 0o100000, 0o140000, 0o170000)
    ],
]


@pytest.mark.parametrize(("name", "syscall", "args", "expected"), ARGUMENTS)
def test_argument_rules(name: str, syscall: str, args: list[int], expected: int) -> None:
    assert run(program(name), NUMBERS[syscall], args) == expected
    assert word(profile(name).decide(NUMBERS[syscall], (args + [0] * 6)[:6])) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_the_program_is_well_formed_small_and_shallow(name: str) -> None:
    check_shape(program(name))
    code = disassemble(program(name))
    assert len(code) < {"default": 240, "strict": 270}[name]
    for syscall, number in NUMBERS.items():
        if syscall not in WITH_ARGUMENTS | {"mknod", "mknodat"}:
            _, steps, loads = trace(code, number)
            assert loads == {0, 4}, f"{syscall}: the kernel could not prove that it is always allowed"
            assert steps <= 45


def test_the_default_is_compiled_once() -> None:
    assert default_filter() is default_filter()
    assert default_filter() == program("default")


# ---------------------------------------------------------------- the programs, in the kernel

PROBE = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
def call(nr, *args):
    ctypes.set_errno(0)
    return 0 if libc.syscall(nr, *map(ctypes.c_ulong, args)) >= 0 else ctypes.get_errno()
bad, name = 2**64 - 1, ctypes.create_string_buffer(b"name")
print(json.dumps({
    "mount": call(165, bad, bad, bad, 0, 0), "umount2": call(166, bad, 0), "unshare(0)": call(272, 0),
    "unshare(NEWUSER)": call(272, 0x10000000), "setns": call(308, bad, 0), "pivot_root": call(155, bad, bad),
    "clone(NEWUSER)": call(56, 0x10000000 | 1 << 40, 0, 0, 0, 0), "clone3": call(435, 0, 0),
    "9999": call(9999), "400": call(400), "bpf": call(321, 9999, 0, 0), "keyctl": call(250, 9999),
    "io_uring_setup": call(425, 1, bad), "userfaultfd": call(323, bad),
    "perf_event_open": call(298, bad, 0, 0, 0, 0), "TIOCSTI": call(16, bad, 0x5412, 0),
    "TIOCSTI+high": call(16, bad, 0x5412 | 1 << 32, 0), "TCGETS": call(16, bad, 0x5401, 0),
    "AF_ALG": call(41, 38, 5, 0), "AF_VSOCK": call(41, 40, 1, 0), "AF_UNIX": call(41, 1, 1, 0),
    "AF_INET6": call(41, 10, 1, 0), "NETLINK_ROUTE": call(41, 16, 3, 0),
    "personality(-1)": call(135, 0xffffffff), "personality(0x40000)": call(135, 0x40000),
    "memfd_create": call(319, ctypes.addressof(name), 0), "mkfifo": call(259, bad, 0, 0o010644, 0), "getpid": call(39)}))
"""

PYTHON_WORKS = """
import asyncio, concurrent.futures, multiprocessing, socket, subprocess, threading
done = []
thread = threading.Thread(target=done.append, args=(1,)); thread.start(); thread.join(); assert done == [1]
assert subprocess.check_output(["echo", "hi"]) == b"hi\\n"
async def main():
    process = await asyncio.create_subprocess_exec("true")
    assert await process.wait() == 0
asyncio.run(main())
process = multiprocessing.get_context("fork").Process(target=print); process.start(); process.join()
assert process.exitcode == 0
a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
print("ok")
"""

X32_GETPID = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 | 39); print('alive')"

INT80_GETPID = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("53 b8 14 00 00 00 cd 80 5b c3"))  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('alive')
"""

TOOLS = [
    "git --version",
    "git init -q repo && cd repo && echo hi > a && git add a && git status --short && git diff --cached --stat",
    "ls / | sort | wc -l",
    "env true",
    "mkdir d && cp -a /etc/passwd d && mv d/passwd d/x && sed -n 1p d/x && rm -r d && mkfifo f && test -p f",
    "printf 'one\\ntwo\\n' > t && grep -n two t && awk '{print NR}' t && tail -n 1 t && head -c 3 t && od t && sha256sum t",
    "find /etc -maxdepth 1 -name 'p*' -exec stat -c %n {} + | xargs -n 1 basename | tr a-z A-Z | tee out | uniq > /dev/null",
    "timeout 5 nice -n 1 env true && date > f && id && df / > f && touch -d yesterday t && du -s . && ln -s t l && readlink l",
    "rg --version && rg root /etc/passwd",
    "tar cf t.tar /etc/passwd 2> /dev/null && tar tf t.tar && gzip t.tar && zcat t.tar.gz | wc -c",
]


@needs_kernel
@pytest.mark.parametrize("name", SHIPPED)
def test_the_kernel_decides_the_same(name: str) -> None:
    result = python(program(name), PROBE)
    assert result.returncode == 0, result.stderr
    after = json.loads(result.stdout)
    refused = dict.fromkeys(
        words(
            """mount umount2 unshare(0) unshare(NEWUSER) setns pivot_root clone(NEWUSER) bpf keyctl
            io_uring_setup userfaultfd perf_event_open TIOCSTI TIOCSTI+high personality(0x40000)"""
        ),
        errno.EPERM,
    )
    absent = dict.fromkeys(("clone3", "9999", "400"), errno.ENOSYS)
    absent |= dict.fromkeys(("AF_ALG", "AF_VSOCK"), errno.EAFNOSUPPORT)
    passed = dict.fromkeys(("AF_UNIX", "personality(-1)", "getpid"), 0) | {"TCGETS": errno.EBADF, "mkfifo": errno.EFAULT}
    if name == "default":
        passed |= {"NETLINK_ROUTE": 0, "memfd_create": 0}
        passed["AF_INET6"] = after["AF_INET6"]  # a kernel may be built without it
    else:
        absent |= dict.fromkeys(("NETLINK_ROUTE", "AF_INET6"), errno.EAFNOSUPPORT)
        refused["memfd_create"] = errno.EPERM
    assert after == refused | absent | passed

    before = json.loads(python(b"", PROBE).stdout)
    for call in ("unshare(0)", "clone3", "TIOCSTI", "TIOCSTI+high", "personality(0x40000)"):
        assert before[call] != after[call], f"{call}: the kernel refuses it without our filter too"


@needs_kernel
@pytest.mark.parametrize("name", SHIPPED)
def test_python_threads_and_processes_work(name: str) -> None:
    result = python(program(name), PYTHON_WORKS)
    assert (result.returncode, result.stdout.split()) == (0, ["ok"]), result.stderr


@needs_kernel
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("command", TOOLS)
def test_tools_work(name: str, command: str, tmp_path: Path) -> None:
    if shutil.which(command.split()[0]) is None:
        lacking(f"{command.split()[0]} is not installed")
    results = []
    for directory, loaded in (("with", program(name)), ("without", b"")):
        (tmp_path / directory).mkdir()
        result = under(loaded, "sh", "-ec", command, cwd=tmp_path / directory)
        results.append((result.returncode, result.stdout, result.stderr))
    assert results[0] == results[1]
    assert results[0][0] == 0


@needs_kernel
def test_gcc_compiles_and_the_program_runs(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        lacking("gcc is not installed")
    (tmp_path / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n')
    result = under(default_filter(), "sh", "-c", "gcc hello.c -o hello && ./hello", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "hello\n"), result.stderr


@needs_kernel
def test_strace_can_skip_a_call() -> None:
    """A tracer that sets the number to -1 must not look like an x32 caller."""
    if shutil.which("strace") is None:
        lacking("strace is not installed")
    result = under(default_filter(), "strace", "-f", "-e", "inject=sync:retval=0", "sync")
    assert result.returncode == 0, result.stderr
    assert "INJECTED" in result.stderr


@needs_kernel
@pytest.mark.parametrize("name", SHIPPED)
def test_an_x32_call_is_killed(name: str) -> None:
    assert python(program(name), X32_GETPID).returncode == -signal.SIGSYS
    assert python(b"", X32_GETPID).stdout == "alive\n"


@needs_kernel
@pytest.mark.parametrize("name", SHIPPED)
def test_an_i386_call_is_killed(name: str) -> None:
    without = python(b"", INT80_GETPID)
    if without.stdout != "alive\n":
        pytest.skip(f"this kernel refuses int 0x80 by itself ({without.returncode})")
    assert python(program(name), INT80_GETPID).returncode == -signal.SIGSYS
