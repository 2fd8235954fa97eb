# SPDX-License-Identifier: Apache-2.0
"""A BPF interpreter, and real processes under a filter: what the tests of seccomp profiles share."""

import json
import platform
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentrun_shim import seccomp
from agentrun_shim.seccomp_profile import Action, Profile, load_profile

LD, AND, JA, JEQ, JGT, JGE, JSET, RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
JUMPS = {JEQ, JGT, JGE, JSET}
X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7
NOTIF = 0x7FC00000
WORDS = {"allow": 0x7FFF0000, "errno": 0x50000, "kill_process": 0x80000000, "kill_thread": 0, "log": 0x7FFC0000, "trap": 0x30000}
HIGH = 0xDEADBEEF << 32
"""Garbage in the upper half of an argument that the kernel reads as an int."""
ALLOW, EPERM, ENOSYS, EAFNOSUPPORT, KILL = WORDS["allow"], 0x50001, 0x50026, 0x50061, WORDS["kill_process"]

Instruction = tuple[int, int, int, int]

needs_kernel = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="loads an x86-64 Linux seccomp filter"
)


def word(action: Action, notify: bool = False) -> int:
    """What the kernel is told, said a second time."""
    if notify and (action.kind == "log" or (action.kind == "errno" and action.errno != 38)):
        return NOTIF
    return WORDS[action.kind] | action.errno


def disassemble(program: bytes) -> list[Instruction]:
    return list(struct.iter_unpack("=HBBI", program))


def run(program: bytes, nr: int, args: Sequence[int] = (), arch: int = X86_64) -> int:
    """What the kernel would answer."""
    return trace(disassemble(program), nr, args, arch)[0]


def trace(code: list[Instruction], nr: int, args: Sequence[int] = (), arch: int = X86_64) -> tuple[int, int, set[int]]:
    """The answer, the instructions it took, and the offsets it looked at.

    Knows only the instructions the kernel's constant-allow check knows (`seccomp_is_const_allow`).
    """
    data = struct.pack("=IIQ6Q", nr, arch, 0, *(list(args) + [0] * 6)[:6])
    accumulator = pc = steps = 0
    loads: set[int] = set()
    while True:
        op, jt, jf, k = code[pc]
        pc += 1
        steps += 1
        if op == LD:
            loads.add(k)
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == AND:
            accumulator &= k
        elif op == JA:
            pc += k
        elif op in JUMPS:
            true = {JEQ: accumulator == k, JGT: accumulator > k, JGE: accumulator >= k, JSET: accumulator & k != 0}[op]
            pc += jt if true else jf
        elif op == RET:
            return k, steps, loads
        else:
            raise AssertionError(f"instruction {op:#x} is not in the subset")


def check_shape(program: bytes) -> None:
    """What the kernel's checker asks: known instructions, jumps that stay inside, loads that are aligned, an end."""
    code = disassemble(program)
    assert 0 < len(code) <= seccomp.BPF_MAXINSNS
    for at, (op, jt, jf, k) in enumerate(code):
        assert op in {LD, AND, JA, RET, *JUMPS}, f"instruction {at}: {op:#x}"
        following = [at + 1 + k] if op == JA else [at + 1 + jt, at + 1 + jf] if op in JUMPS else []
        assert all(target < len(code) for target in following)
        if op == LD:
            assert k % 4 == 0
            assert k < 64
    assert code[-1][0] == RET


def as_file(*rules: Any, default: str = "SCMP_ACT_ERRNO", **more: Any) -> bytes:
    """A profile file of rules."""
    return json.dumps({"defaultAction": default, "syscalls": list(rules), **more}).encode()


def profile_of(*rules: Any, default: str = "SCMP_ACT_ALLOW", **more: Any) -> Profile:
    """A profile of rules; what the runner needs is allowed by the default."""
    return load_profile(as_file(*rules, default=default, **more), "test.json")


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

LOAD_AND_LISTEN = """
import ctypes, json, os, signal, socket, sys, threading, time
program, pass_on = bytes.fromhex(sys.argv[1]), int(sys.argv[2])
class Fprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
assert libc.prctl(38, 1, 0, 0, 0) == 0
fprog = Fprog(len(program) // 8, program)
NEW_LISTENER = 1 << 3
listener = libc.syscall(317, 1, NEW_LISTENER, ctypes.byref(fprog))
if listener < 0:
    raise SystemExit(f"seccomp: {os.strerror(ctypes.get_errno())}")
with socket.socket(fileno=pass_on) as channel:
    socket.send_fds(channel, [b"x"], [listener])
    os.close(listener)
    assert channel.recv(1) == b"x"
def call(nr, *args):
    ctypes.set_errno(0)
    result = libc.syscall(nr, *map(ctypes.c_ulong, args))
    return result if result >= 0 else -ctypes.get_errno()
print(json.dumps(eval(sys.argv[3])), flush=True)
"""
"""Loads a filter with a listener, passes that on, waits for a byte, and prints what an expression comes to."""


def under(program: bytes, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `argv` under `program` (under nothing when it is empty)."""
    loader = [sys.executable, "-I", "-S", "-c", LOAD_AND_EXEC, program.hex(), *argv]
    return subprocess.run(loader, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


def python(program: bytes, code: str) -> subprocess.CompletedProcess[str]:
    return under(program, sys.executable, "-I", "-c", code)
