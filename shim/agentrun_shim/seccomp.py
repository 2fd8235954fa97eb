# SPDX-License-Identifier: Apache-2.0
"""Seccomp filters for tools: a profile, compiled to the classic BPF program the kernel runs.

A program is built once on the host, handed to the zygote, and loaded by each runner while the sandbox is warmed, never on the
way of a call. libseccomp compiles the rules. Three things it has no words for are put around its programs here:

* *order.* For libseccomp a rule without arguments beats every rule with some for the same call, and which of two rules with
  arguments holds is left open. A profile is read from its top (``seccomp_profile``). So rules of different actions for one call
  go into programs of their own, one after the other: where a program has no rule that fits, it jumps to the next. So do rules
  with LT, LE, GE, GT and NE: libseccomp (2.5.4) joins several of them wrongly, and of some sets it makes no end;
* *unlisted numbers.* The last program is a table of all numbers we know. What most of them get, as a rule ALLOW, is its default
  and takes no instruction; the profile's own default, which is for all other numbers, is given by a range check in front. The
  default profile takes a third of the instructions this way, and every slot loads them;
* *strangers.* i386 and x32 callers are killed whatever the profile says: their numbers mean other calls, so no rule fits them.

Only loads, ``&``, jumps and returns are used, so the kernel (5.11 and later, commit 8e01b51a31a1) can prove which numbers are
always allowed, and skips the program for them.

Sources: seccomp(2); in the kernel tree `Documentation/userspace-api/seccomp_filter.rst`, `Documentation/networking/filter.rst`,
`include/uapi/linux/{seccomp,filter,audit}.h`, `kernel/seccomp.c`.
"""

from __future__ import annotations

import errno
import struct
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

from agentrun_shim import libseccomp
from agentrun_shim.data import data_path
from agentrun_shim.seccomp_profile import SKIPPED, X32_BIT, Action, Condition, Kind, Profile, ProfileError, load_profile
from agentrun_shim.syscall_table import NUMBERS

AUDIT_ARCH_X86_64: Final = 0xC000003E
BPF_LD_ABS: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_JA: Final = 0x05  # BPF_JMP | BPF_JA: the offset is k, 32 bits
BPF_JEQ: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K: the offsets are 8 bits
BPF_JGE: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
BPF_RET: Final = 0x06  # BPF_RET | BPF_K
BPF_MAXINSNS: Final = 4096
OFFSET_NR: Final = 0  # struct seccomp_data
OFFSET_ARCH: Final = 4

_RET: Final[dict[Kind, int]] = {
    "allow": 0x7FFF0000,
    "errno": 0x00050000,
    "kill_process": 0x80000000,
    "kill_thread": 0,
    "log": 0x7FFC0000,
    "trap": 0x00030000,
}
USER_NOTIF: Final = 0x7FC00000
_JOINABLE: Final = ("EQ", "MASKED_EQ")
_NEXT: Final = 0x7FF0FFFF
"""SECCOMP_RET_TRACE, which no profile can contain: what a program returns for calls it leaves to the next."""

_ANY: Final = ((0, 0, 0, 0, 0, 0),)
_MINUS_1, _AT_FDCWD = 2**64 - 1, 2**64 - 100
RUNNER: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "chdir": _ANY,
    "clock_gettime": ((1, 0, 0, 0, 0, 0),),  # CLOCK_MONOTONIC
    "close": _ANY,
    "close_range": ((6, 0xFFFFFFFF, 0, 0, 0, 0),),
    "dup3": tuple((6, fd, 0, 0, 0, 0) for fd in range(3)),
    "execve": _ANY,
    "exit_group": _ANY,
    # TIOCSPTLCK, TIOCGPTPEER, TIOCSCTTY: a terminal for the tool
    "ioctl": tuple((6, request, 0, 0, 0, 0) for request in (0x40045431, 0x5441, 0x540E)),
    "landlock_add_rule": ((6, 1, 0, 0, 0, 0),),  # LANDLOCK_RULE_PATH_BENEATH: the workspace
    "landlock_restrict_self": _ANY,
    "mmap": ((0, 4096, 3, 0x22, _MINUS_1, 0),),  # readable and writable, private and anonymous
    # /dev/ptmx: O_RDWR | O_NOCTTY | O_CLOEXEC; the workspace: O_PATH | O_CLOEXEC
    "openat": ((_AT_FDCWD, 0, 0o2000402, 0, 0, 0), (_AT_FDCWD, 0, 0o12000000, 0, 0, 0)),
    "prlimit64": ((0, 6, 0, 0, 0, 0),),  # RLIMIT_NPROC
    "read": _ANY,
    "recvmsg": ((3, 0, 0x40000000, 0, 0, 0),),  # MSG_CMSG_CLOEXEC
    "sendmsg": ((3, 0, 0x4000, 0, 0, 0),),  # MSG_NOSIGNAL
    "umask": _ANY,
}
"""What shim/native/runner.c calls once the filter is loaded, with the arguments that are always the same."""


def find_profile(name: str) -> Profile:
    """The shipped profile of a name (``default``, ``strict``), or the one in the file at a path, which has a slash in it.

    Raises:
        ProfileError: there is none, or it cannot be used.
    """
    if "/" in name:
        return load_profile(Path(name))
    shipped = data_path("policies/seccomp")
    if not (shipped / f"{name}.json").is_file():
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.json")))
        raise ProfileError(f"seccomp: {name!r}: no such profile (known: {known}; or the path of one, with a slash in it)")
    return load_profile(shipped / f"{name}.json")


@cache
def default_profile() -> Profile:
    """The shipped profile, policies/seccomp/default.json."""
    return find_profile("default")


@cache
def default_filter() -> bytes:
    """The shipped profile, compiled: an array of ``struct sock_filter``, 8 bytes each, in the machine's byte order."""
    return compile_profile(default_profile())


def compile_profile(profile: Profile, *, notify: bool = False) -> bytes:
    """Compile a profile to an array of ``struct sock_filter`` for ``seccomp(SECCOMP_SET_MODE_FILTER)``.

    With ``notify``, what the profile refuses with an errno other than ENOSYS, and what it logs, goes to the supervisor that holds
    the filter's listener (SECCOMP_FILTER_FLAG_NEW_LISTENER); it answers by ``profile.decide``. ENOSYS is no news: libraries try
    new calls to see whether it comes.

    Raises:
        ProfileError: the profile refuses a call the runner itself needs, or its program is longer than the kernel takes.
        OSError: libseccomp is missing, too old, or refuses a rule.
    """
    _check_runner(profile, notify)
    stages, table = _lower(profile, notify)
    usual = Counter(table.values()).most_common(1)[0][0]
    kill = _RET["kill_process"]
    programs = [libseccomp.export(_NEXT, kill, stage) for stage in stages]
    programs.append(libseccomp.export(usual, kill, [(word, nr, ()) for nr, word in table.items() if word != usual]))
    program = _link(_front(_word(profile.default, notify)), programs)
    if len(program) // 8 > BPF_MAXINSNS:
        raise ProfileError(f"{profile.name}: syscalls: {len(program) // 8} instructions, the kernel takes {BPF_MAXINSNS}")
    return program


def _check_runner(profile: Profile, notify: bool) -> None:
    """The runner has no one to answer it before it has passed its listener on, so LOG does not do there."""
    enough = {"allow"} if notify else {"allow", "log"}
    refused = [
        name for name, calls in RUNNER.items() if any(profile.decide(NUMBERS[name], args).kind not in enough for args in calls)
    ]
    if refused:
        raise ProfileError(f"{profile.name}: syscalls: the profile must allow {', '.join(refused)}: the runner uses them")


def _word(action: Action, notify: bool) -> int:
    """What the program returns to the kernel for an action."""
    counted = action.kind == "log" or (action.kind == "errno" and action.errno != errno.ENOSYS)
    return USER_NOTIF if notify and counted else _RET[action.kind] | action.errno


def _lower(profile: Profile, notify: bool) -> tuple[list[list[libseccomp.Rule]], dict[int, int]]:
    """The rules with conditions, in programs libseccomp gets right; and what is left, a word for each number."""
    table = dict.fromkeys(NUMBERS.values(), _word(profile.default, notify))
    stages: list[list[libseccomp.Rule]] = []
    for nr, rules in profile.calls.items():
        queue: list[list[libseccomp.Rule]] = []
        seen: set[tuple[Condition, ...]] = set()
        joins = False
        for rule in rules:
            word = _word(rule.action, notify)
            if not rule.conditions:
                table[nr] = word
                break
            if rule.conditions in seen:
                continue
            seen.add(rule.conditions)
            joined, joins = joins, all(condition.op in _JOINABLE for condition in rule.conditions)
            if not (joined and joins and queue[-1][0][0] == word):
                queue.append([])
            queue[-1].append((word, nr, rule.conditions))
        while queue and queue[-1][0][0] == table[nr]:
            queue.pop()  # the table says the same
        stages += [[] for _ in range(len(queue) - len(stages))]
        for stage, group in zip(stages, queue, strict=False):
            stage += group
    return stages, table


Instruction = tuple[int, int, int, int]


def _front(default: int) -> list[Instruction]:
    """Give numbers outside the table the profile's default and leave the rest, strangers included, to the programs behind."""
    numbers = sorted(NUMBERS.values())
    edges = [(numbers[-1] + 1, False)]
    for below, above in reversed(list(pairwise(numbers))):
        edges += [(above, True), (below + 1, False)] if above > below + 1 else []
    tests = len(edges)
    # After the tests: the jump to the programs, then the check for x32 that separates its numbers from unknown ones.
    code: list[Instruction] = [
        (BPF_LD_ABS, 0, 0, OFFSET_ARCH),
        (BPF_JEQ, 0, 1 + tests, AUDIT_ARCH_X86_64),
        (BPF_LD_ABS, 0, 0, OFFSET_NR),
    ]
    for number, (edge, known) in enumerate(edges):
        rest = tests - number - 1
        code.append((BPF_JGE, rest if known else rest + 1, 0, edge))
    code += [
        (BPF_JA, 0, 0, 3),
        (BPF_JGE, 0, 1, X32_BIT),
        (BPF_JEQ, 0, 1, SKIPPED),
        (BPF_RET, 0, 0, default),
    ]
    return code


def _link(front: list[Instruction], programs: list[bytes]) -> bytes:
    """One program: each goes on to the next where it has no answer."""
    code = list(front)
    for program in programs:
        end = len(code) + len(program) // 8
        for instruction in struct.iter_unpack("=HBBI", program):
            goes_on = instruction[0] == BPF_RET and instruction[3] == _NEXT
            code.append((BPF_JA, 0, 0, end - len(code) - 1) if goes_on else instruction)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
