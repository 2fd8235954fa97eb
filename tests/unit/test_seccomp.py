# SPDX-License-Identifier: Apache-2.0
"""The seccomp filter: every decision by an interpreter of our own, then the same filter in the kernel."""

import errno
import json
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from agentrun_shim import seccomp
from agentrun_shim.seccomp import Action, Decision, Rule, compile_filter, decisions, default_filter
from agentrun_shim.syscall_table import NUMBERS

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_AARCH64 = 0xC00000B7
HIGH = 0xDEADBEEF << 32
"""Garbage in the upper half of an argument that the kernel reads as an int: no rule may look at it."""

Instruction = tuple[int, int, int, int]


def words(text: str) -> list[str]:
    return text.split()


def disassemble(program: bytes) -> list[Instruction]:
    return list(struct.iter_unpack("=HBBI", program))


def run(program: bytes, nr: int, args: Sequence[int] = (), arch: int = seccomp.AUDIT_ARCH_X86_64) -> tuple[int, int]:
    """What the kernel would answer, and after how many comparisons.

    Knows only the instructions the kernel's constant-allow check knows (`seccomp_is_const_allow`), and `&`.
    """
    data = struct.pack("=IIQ6Q", nr, arch, 0, *(list(args) + [0] * 6)[:6])
    code = disassemble(program)
    accumulator = pc = tests = 0
    while True:
        op, jt, jf, k = code[pc]
        pc += 1
        if op == seccomp.BPF_LD_ABS:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == seccomp.BPF_AND:
            accumulator &= k
        elif op == seccomp.BPF_JA:
            pc += k
        elif op in {seccomp.BPF_JEQ, seccomp.BPF_JGE}:
            tests += 1
            pc += jt if (accumulator == k if op == seccomp.BPF_JEQ else accumulator >= k) else jf
        elif op == seccomp.BPF_RET:
            return k, tests
        else:
            raise AssertionError(f"instruction {op:#x} is not in the subset")


def check_shape(program: bytes) -> None:
    """What the kernel's checker asks, and that every instruction is reached."""
    code = disassemble(program)
    assert 0 < len(code) <= seccomp.BPF_MAXINSNS
    reached = {0}
    for at, (op, jt, jf, k) in enumerate(code):
        assert at in reached, f"instruction {at} is dead"
        following = {
            seccomp.BPF_JA: {at + 1 + k},
            seccomp.BPF_JEQ: {at + 1 + jt, at + 1 + jf},
            seccomp.BPF_JGE: {at + 1 + jt, at + 1 + jf},
            seccomp.BPF_RET: set(),
        }.get(op, {at + 1})
        assert all(target < len(code) for target in following)
        reached |= following
        if op == seccomp.BPF_LD_ABS:
            assert k % 4 == 0
            assert k < 64


def expected(decision: Decision, args: Sequence[int]) -> Action:
    """The rule semantics, said a second time."""
    if isinstance(decision, Action):
        return decision
    value = args[decision.arg] & 0xFFFFFFFF
    hit = value & decision.mask != 0 if decision.mask else value in decision.values
    return decision.match if hit else decision.otherwise


def args_for(decision: Decision) -> list[list[int]]:
    """Arguments at and around every edge of a rule, with and without garbage elsewhere."""
    if isinstance(decision, Action):
        return [[0] * 6, [0xFFFFFFFFFFFFFFFF] * 6]
    edges = {0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, ~decision.mask & 0xFFFFFFFF}
    edges |= {value + step for value in decision.values for step in (-1, 0, 1)}
    edges |= {1 << bit for bit in range(32)}
    cases = []
    for edge in edges:
        for high, other in ((0, 0), (HIGH, 0xFFFFFFFFFFFFFFFF)):
            case = [other] * 6
            case[decision.arg] = high | (edge & 0xFFFFFFFF)
            cases.append(case)
    return cases


def check_decisions(program: bytes, table: Mapping[int, Decision], numbers: range) -> None:
    for nr in numbers:
        decision = table.get(nr, Action.ENOSYS)
        for args in args_for(decision):
            assert run(program, nr, args)[0] == expected(decision, args), (nr, args)


# ---------------------------------------------------------------- the tables


def test_every_call_is_classified_exactly_once() -> None:
    groups = [seccomp.ALLOWED, seccomp.DENIED, frozenset(seccomp.RULES), frozenset({"clone3"})]
    assert sum(map(len, groups)) == len(frozenset().union(*groups)), "two groups share a name"
    assert frozenset().union(*groups) == frozenset(NUMBERS)


def test_numbers_agree_with_the_installed_header() -> None:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not installed")
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


@pytest.mark.parametrize(
    "name",
    words(
        """read write sendmsg recvmsg close close_range dup3 execve execveat chdir ioctl openat mmap munmap
        setsid prlimit64 setrlimit umask clock_gettime exit_group prctl capset setresuid setresgid setgroups
        seccomp rt_sigaction rt_sigprocmask setpriority"""
    ),
)
def test_the_runner_can_go_on_after_loading_it(name: str) -> None:
    assert run(default_filter(), NUMBERS[name])[0] == Action.ALLOW


# ---------------------------------------------------------------- the program, interpreted


def test_every_number_gets_its_decision() -> None:
    check_decisions(default_filter(), decisions(), range(601))


@pytest.mark.parametrize("nr", [9999, 0x3FFFFFFF, 0xFFFFFFFF])
def test_unknown_numbers_are_enosys(nr: int) -> None:
    assert run(default_filter(), nr)[0] == Action.ENOSYS


@pytest.mark.parametrize("nr", [0x40000000, 0x40000027, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE])
def test_x32_is_killed(nr: int) -> None:
    assert run(default_filter(), nr)[0] == Action.KILL


@pytest.mark.parametrize("arch", [AUDIT_ARCH_I386, AUDIT_ARCH_AARCH64, 0, 0xFFFFFFFF])
def test_a_foreign_architecture_is_killed_whatever_it_calls(arch: int) -> None:
    assert {run(default_filter(), nr, arch=arch)[0] for nr in range(601)} == {Action.KILL}


SIGCHLD, THREAD = 17, 0x3D0F00  # the flags of fork and of pthread_create in glibc
ARGUMENTS = [
    ("clone", [SIGCHLD], Action.ALLOW),
    ("clone", [THREAD], Action.ALLOW),
    ("clone", [0x80 | SIGCHLD], Action.ALLOW),
    *[("clone", [1 << bit | SIGCHLD], Action.EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)],
    ("clone", [HIGH | 0x10000000 | SIGCHLD], Action.EPERM),
    ("clone", [SIGCHLD, 0x10000000, 0x10000000], Action.ALLOW),
    ("clone3", [0], Action.ENOSYS),
    ("unshare", [0], Action.EPERM),
    *[("socket", [family, 1, 0], Action.ALLOW) for family in (1, 2, 10, 16)],
    *[("socket", [family, 1, 0], Action.EAFNOSUPPORT) for family in (0, 3, 9, 11, 15, 17, 30, 38, 40, 44)],
    ("socket", [HIGH | 40], Action.EAFNOSUPPORT),
    ("socket", [HIGH | 1], Action.ALLOW),
    ("socketpair", [1, 1], Action.ALLOW),
    ("socketpair", [30, 1], Action.EAFNOSUPPORT),
    ("ioctl", [0, 0x5401], Action.ALLOW),
    ("ioctl", [0, 0x5412], Action.EPERM),
    ("ioctl", [0, HIGH | 0x5412], Action.EPERM),
    ("ioctl", [0, 0x541C], Action.EPERM),
    ("ioctl", [0x5412, 0x5413], Action.ALLOW),
    *[("personality", [value], Action.ALLOW) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)],
    ("personality", [0xFFFFFFFFFFFFFFFF], Action.ALLOW),
    *[("personality", [value], Action.EPERM) for value in (1, 9, 0x40000, 0x20009, 0xFFFFFFFE)],
    ("ptrace", [0], Action.ALLOW),
    ("process_vm_readv", [], Action.ALLOW),
]


@pytest.mark.parametrize(("name", "args", "action"), ARGUMENTS)
def test_argument_rules(name: str, args: list[int], action: Action) -> None:
    assert run(default_filter(), NUMBERS[name], args)[0] == action


def test_the_program_is_well_formed_small_and_shallow() -> None:
    program = default_filter()
    check_shape(program)
    assert len(program) // 8 < 150
    depth = {name: run(program, number)[1] for name, number in NUMBERS.items() if name not in seccomp.RULES}
    assert max(depth.values()) <= 8, "1 for the architecture, 7 for 2**7 runs"


@pytest.mark.parametrize("count", [1, 2, 200, 300, 1400])
def test_far_jumps_get_stepping_stones(count: int) -> None:
    """Alternating decisions, so one run per number: more than an 8-bit offset reaches."""
    cycle: list[Decision] = [Action.ALLOW, Action.EPERM, Rule(0, Action.EPERM, Action.ALLOW, values=(7, 9))]
    table = {nr: cycle[nr % 3] for nr in range(count)}
    program = compile_filter(table)
    check_shape(program)
    for nr in range(count + 2):
        for args in ([0], [7], [8], [9]):
            assert run(program, nr, args)[0] == expected(table.get(nr, Action.ENOSYS), args), (nr, args)
    assert any(op == seccomp.BPF_JA for op, *_ in disassemble(program)) == (count >= 300)


def test_a_program_too_long_for_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="the kernel takes 4096"):
        compile_filter(dict.fromkeys(range(0, 9000, 2), Action.ALLOW))


# ---------------------------------------------------------------- the program, in the kernel

LOAD_AND_EXEC = """
import ctypes, os, resource, sys
program = bytes.fromhex(sys.argv[1])
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if program:
    PR_SET_NO_NEW_PRIVS, SYS_seccomp, SECCOMP_SET_MODE_FILTER = 38, 317, 1
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    fprog = Fprog(len(program) // 8, program)
    if libc.syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(fprog)) != 0:
        raise SystemExit(f"seccomp: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[2], sys.argv[2:])
"""

PROBE = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
def call(nr, *args):
    ctypes.set_errno(0)
    return 0 if libc.syscall(nr, *map(ctypes.c_ulong, args)) >= 0 else ctypes.get_errno()
bad = 2**64 - 1
print(json.dumps({
    "mount": call(165, bad, bad, bad, 0, 0), "umount2": call(166, bad, 0), "unshare(0)": call(272, 0),
    "unshare(NEWUSER)": call(272, 0x10000000), "setns": call(308, bad, 0), "pivot_root": call(155, bad, bad),
    "clone(NEWUSER)": call(56, 0x10000000 | 1 << 40, 0, 0, 0, 0), "clone3": call(435, 0, 0),
    "9999": call(9999), "bpf": call(321, 9999, 0, 0), "keyctl": call(250, 9999),
    "io_uring_setup": call(425, 1, bad), "userfaultfd": call(323, bad),
    "perf_event_open": call(298, bad, 0, 0, 0, 0), "TIOCSTI": call(16, bad, 0x5412, 0),
    "TIOCSTI+high": call(16, bad, 0x5412 | 1 << 32, 0), "TCGETS": call(16, bad, 0x5401, 0),
    "AF_ALG": call(41, 38, 5, 0), "AF_VSOCK": call(41, 40, 1, 0), "AF_UNIX": call(41, 1, 1, 0),
    "AF_INET6": call(41, 10, 1, 0), "NETLINK_ROUTE": call(41, 16, 3, 0),
    "personality(-1)": call(135, 0xffffffff), "personality(0x40000)": call(135, 0x40000),
    "getpid": call(39)}))
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

needs_kernel = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="loads an x86-64 Linux seccomp filter"
)


def under(program: bytes, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `argv` under `program` (under nothing when it is empty)."""
    loader = [sys.executable, "-I", "-S", "-c", LOAD_AND_EXEC, program.hex(), *argv]
    return subprocess.run(loader, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


def python(program: bytes, code: str) -> subprocess.CompletedProcess[str]:
    return under(program, sys.executable, "-I", "-c", code)


@needs_kernel
def test_the_kernel_decides_the_same() -> None:
    result = python(default_filter(), PROBE)
    assert result.returncode == 0, result.stderr
    after = json.loads(result.stdout)
    refused = dict.fromkeys(
        words(
            """mount umount2 unshare(0) unshare(NEWUSER) setns pivot_root clone(NEWUSER) bpf keyctl
            io_uring_setup userfaultfd perf_event_open TIOCSTI TIOCSTI+high personality(0x40000)"""
        ),
        errno.EPERM,
    )
    absent = dict.fromkeys(("clone3", "9999"), errno.ENOSYS)
    absent |= dict.fromkeys(("AF_ALG", "AF_VSOCK"), errno.EAFNOSUPPORT)
    passed = dict.fromkeys(("AF_UNIX", "NETLINK_ROUTE", "personality(-1)", "getpid"), 0)
    passed["TCGETS"] = errno.EBADF
    inet6 = {"AF_INET6": after["AF_INET6"]}  # a kernel may be built without it
    assert after == refused | absent | passed | inet6

    before = json.loads(python(b"", PROBE).stdout)
    assert before["AF_INET6"] == after["AF_INET6"]
    for name in ("unshare(0)", "clone3", "TIOCSTI", "TIOCSTI+high", "personality(0x40000)"):
        assert before[name] != after[name], f"{name}: the kernel refuses it without our filter too"


@needs_kernel
def test_python_threads_and_processes_work() -> None:
    result = python(default_filter(), PYTHON_WORKS)
    assert (result.returncode, result.stdout.split()) == (0, ["ok"]), result.stderr


@needs_kernel
@pytest.mark.parametrize("command", ["git --version", "sh -c 'ls / | sort | wc -l'", "env true"])
def test_tools_work(command: str) -> None:
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    result = under(default_filter(), "sh", "-c", command)
    assert result.returncode == 0, result.stderr


@needs_kernel
def test_gcc_compiles_and_the_program_runs(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    (tmp_path / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n')
    result = under(default_filter(), "sh", "-c", "gcc hello.c -o hello && ./hello", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "hello\n"), result.stderr


@needs_kernel
def test_strace_can_skip_a_call() -> None:
    """A tracer that sets the number to -1 must not look like an x32 caller."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    result = under(default_filter(), "strace", "-f", "-e", "inject=sync:retval=0", "sync")
    assert result.returncode == 0, result.stderr
    assert "INJECTED" in result.stderr


@needs_kernel
def test_an_x32_call_is_killed() -> None:
    assert python(default_filter(), X32_GETPID).returncode == -signal.SIGSYS
    assert python(b"", X32_GETPID).stdout == "alive\n"


@needs_kernel
def test_an_i386_call_is_killed() -> None:
    without = python(b"", INT80_GETPID)
    if without.stdout != "alive\n":
        pytest.skip(f"this kernel refuses int 0x80 by itself ({without.returncode})")
    assert python(default_filter(), INT80_GETPID).returncode == -signal.SIGSYS


@needs_kernel
def test_the_kernel_takes_a_program_with_stepping_stones() -> None:
    """Denied numbers far above the real ones make the program long; the tool still runs."""
    table = decisions() | dict.fromkeys(range(1000, 3000, 2), Action.EPERM)
    result = under(compile_filter(table), "echo", "hi")
    assert (result.returncode, result.stdout) == (0, "hi\n"), result.stderr
