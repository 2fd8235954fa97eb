# SPDX-License-Identifier: Apache-2.0
"""The seccomp filter every tool runs under: an allow-list of system calls, compiled to classic BPF.

`default_filter()` returns the bytes of `struct sock_filter[]` for `seccomp(SECCOMP_SET_MODE_FILTER)`. It is
built once on the host, handed to the zygote, and loaded by each runner while the sandbox is warmed, never on
the way of a call.

The starting point is the default profile of Docker and containerd (`moby/profiles`, `seccomp/default.json`,
2025), evaluated for a container with no capabilities. Where we differ, on purpose:

* a number outside our table is ENOSYS, not EPERM: libraries fall back on ENOSYS and give up on EPERM;
* i386 and x32 callers are killed; the profile admits both. Their numbers mean other calls, so no rule here
  fits them;
* `socket` knows UNIX, INET, INET6 and NETLINK; any other family is EAFNOSUPPORT, the kernel's own word for
  "not built in" (the profile: a longer list, EPERM). An unusual family loads an unusual kernel module.
  `socketpair`, which would load the same modules and which the profile leaves open, follows the same rule;
* `ioctl` TIOCSTI and TIOCLINUX are EPERM: they type into the terminal. A container has one of its own, so the
  profile has no such rule; our tools inherit their caller's (CVE-2017-5226);
* `fanotify_mark` and `modify_ldt` are EPERM: one is useless without `fanotify_init`, the other is for 16-bit
  programs;
* `file_getattr`, `file_setattr` (their ioctl forms were always allowed), `rseq_slice_yield` and `uprobe` are
  allowed: newer than the profile. Refusing `uretprobe` or `uprobe` would break a traced program, not the
  tracer.

The same as there, and worth a sentence: `ptrace` and `process_vm_*` are allowed, because a debugger and
LeakSanitizer need them and the pid namespace bounds whom they reach; `clone3` is ENOSYS, because its flags
sit in memory a filter cannot read, and libc then uses `clone`; `adjtimex` is allowed, because it also reads,
and the kernel asks for CAP_SYS_TIME before it writes. Masks and values are compared in the low 32 bits of an
argument: each of these arguments is an `int` to the kernel, so comparing all 64 would let a caller hide
behind the upper half (CVE-2019-10063).

A filter is not the sandbox. It narrows the kernel surface; namespaces and dropped capabilities hold the
walls.

Program: load and check the architecture, load the number, then a balanced search over the runs of equal
decisions. Only loads, `&`, jumps and returns are used, so the kernel (5.11 and later, commit 8e01b51a31a1)
can prove which numbers are always allowed and skips the filter for them.

Sources: seccomp(2); in the kernel tree `Documentation/userspace-api/seccomp_filter.rst`,
`Documentation/networking/filter.rst`, `include/uapi/linux/{seccomp,filter,audit}.h`, `kernel/seccomp.c`.
"""

import enum
import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from agentrun_shim.syscall_table import NUMBERS

AUDIT_ARCH_X86_64: Final = 0xC000003E
X32_SYSCALL_BIT: Final = 0x40000000
NR_SKIPPED: Final = 0xFFFFFFFF
"""-1: set by a tracer (gdb, proot, strace --inject) so that the kernel skips the call. Not x32."""

BPF_LD_ABS: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
BPF_JA: Final = 0x05  # BPF_JMP | BPF_JA: the offset is k, 32 bits
BPF_JEQ: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K: the offsets are 8 bits
BPF_JGE: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
BPF_RET: Final = 0x06  # BPF_RET | BPF_K
BPF_MAXINSNS: Final = 4096

OFFSET_NR: Final = 0  # struct seccomp_data
OFFSET_ARCH: Final = 4
OFFSET_ARGS: Final = 16

CLONE_NAMESPACES: Final = 0x7E020000
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; not NEWTIME: to clone, 0x80 belongs to the exit signal."""
SOCKET_FAMILIES: Final = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
PERSONALITIES: Final = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""PER_LINUX and PER_LINUX32, each also with UNAME26; -1 only asks."""
TERMINAL_INJECTION: Final = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX


class Action(enum.IntEnum):
    """What the kernel does with a call: SECCOMP_RET_* with its data."""

    ALLOW = 0x7FFF0000
    EPERM = 0x00050000 | errno.EPERM
    ENOSYS = 0x00050000 | errno.ENOSYS
    EAFNOSUPPORT = 0x00050000 | errno.EAFNOSUPPORT
    KILL = 0x80000000


@dataclass(frozen=True)
class Rule:
    """A decision that needs one argument: `match` if its low 32 bits are one of `values` or touch `mask`."""

    arg: int
    match: Action
    otherwise: Action
    values: tuple[int, ...] = ()
    mask: int = 0


Decision = Action | Rule

FAMILY_RULE: Final = Rule(0, Action.ALLOW, Action.EAFNOSUPPORT, values=SOCKET_FAMILIES)
RULES: Final[dict[str, Rule]] = {
    "clone": Rule(0, Action.EPERM, Action.ALLOW, mask=CLONE_NAMESPACES),
    "ioctl": Rule(1, Action.EPERM, Action.ALLOW, values=TERMINAL_INJECTION),
    "personality": Rule(0, Action.ALLOW, Action.EPERM, values=PERSONALITIES),
    "socket": FAMILY_RULE,
    "socketpair": FAMILY_RULE,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALLOWED: Final = _names(
    """
    open openat openat2 creat close close_range dup dup2 dup3 fcntl flock read pread64 readv preadv preadv2
    write pwrite64 writev pwritev pwritev2 lseek sendfile copy_file_range splice tee vmsplice readahead
    fadvise64 cachestat fallocate truncate ftruncate fsync fdatasync sync syncfs sync_file_range pipe pipe2
    memfd_create memfd_secret

    stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs statmount listmount getdents
    getdents64 mkdir mkdirat rmdir mknod mknodat rename renameat renameat2 link linkat unlink unlinkat
    symlink symlinkat readlink readlinkat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask
    utime utimes futimesat utimensat getcwd chdir fchdir name_to_handle_at file_getattr file_setattr

    setxattr lsetxattr fsetxattr setxattrat getxattr lgetxattr fgetxattr getxattrat listxattr llistxattr
    flistxattr listxattrat removexattr lremovexattr fremovexattr removexattrat

    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    epoll_ctl_old epoll_wait_old eventfd eventfd2 signalfd signalfd4 inotify_init inotify_init1
    inotify_add_watch inotify_rm_watch io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents

    mmap munmap mremap mprotect msync mincore madvise brk mlock mlock2 mlockall munlock munlockall mseal
    remap_file_pages pkey_alloc pkey_free pkey_mprotect map_shadow_stack membarrier process_mrelease

    fork vfork execve execveat exit exit_group wait4 waitid kill tkill tgkill pidfd_open pidfd_send_signal
    getpid gettid getppid getpgid getpgrp setpgid getsid setsid prctl arch_prctl set_tid_address
    set_thread_area get_thread_area set_robust_list get_robust_list rseq rseq_slice_yield restart_syscall
    uretprobe uprobe futex futex_waitv futex_wake futex_wait futex_requeue ptrace process_vm_readv
    process_vm_writev

    rt_sigaction rt_sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo
    rt_sigreturn sigaltstack pause

    sched_yield sched_getparam sched_setparam sched_getscheduler sched_setscheduler sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval sched_getaffinity sched_setaffinity sched_getattr
    sched_setattr getpriority setpriority ioprio_get ioprio_set getrlimit setrlimit prlimit64 getrusage
    getcpu uname sysinfo getrandom

    getuid geteuid getresuid setuid setreuid setresuid setfsuid getgid getegid getresgid setgid setregid
    setresgid setfsgid getgroups setgroups capget capset seccomp landlock_create_ruleset landlock_add_rule
    landlock_restrict_self

    time gettimeofday times adjtimex clock_adjtime clock_gettime clock_getres clock_nanosleep nanosleep alarm
    getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete timerfd_create
    timerfd_settime timerfd_gettime

    connect accept accept4 bind listen shutdown getsockname getpeername setsockopt getsockopt sendto recvfrom
    sendmsg recvmsg sendmmsg recvmmsg

    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink
    mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    """
)

DENIED: Final = _names(
    """
    mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick
    mount_setattr

    setns unshare listns sethostname setdomainname

    init_module finit_module delete_module create_module get_kernel_syms query_module kexec_load
    kexec_file_load reboot swapon swapoff acct quotactl quotactl_fd iopl ioperm vhangup syslog modify_ldt

    settimeofday clock_settime

    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register fanotify_init
    fanotify_mark open_by_handle_at lookup_dcookie kcmp pidfd_getfd process_madvise

    add_key request_key keyctl lsm_get_self_attr lsm_set_self_attr lsm_list_modules

    mbind set_mempolicy get_mempolicy set_mempolicy_home_node migrate_pages move_pages

    ustat sysfs uselib _sysctl nfsservctl getpmsg putpmsg afs_syscall tuxcall security vserver
    """
)


def decisions() -> dict[int, Decision]:
    """Every number with a decision of its own; the others are ENOSYS, `clone3` and new calls among them."""
    table: dict[int, Decision] = {NUMBERS[name]: Action.ALLOW for name in ALLOWED}
    table |= {NUMBERS[name]: Action.EPERM for name in DENIED}
    table |= {NUMBERS[name]: rule for name, rule in RULES.items()}
    return table


@cache
def default_filter() -> bytes:
    """The program to load: an array of `struct sock_filter`, 8 bytes each, in the machine's byte order."""
    return compile_filter(decisions())


def compile_filter(table: Mapping[int, Decision]) -> bytes:
    """Compile decisions by number; a number without one is ENOSYS, x32 and foreign callers are killed."""
    program = Assembler()
    runs = runs_of(table)
    targets: dict[Decision, int] = {Action.KILL: program.ret(Action.KILL)}
    for _, decision in runs:
        if decision not in targets:
            label = program.rule(decision) if isinstance(decision, Rule) else program.ret(decision)
            targets[decision] = label

    def search(low: int, high: int) -> int:
        if high - low == 1:
            return targets[runs[low][1]]
        middle = (low + high) // 2
        above, below = search(middle, high), search(low, middle)
        return program.branch(BPF_JGE, runs[middle][0], above, below)

    root = program.load(OFFSET_NR, search(0, len(runs)))
    program.load(OFFSET_ARCH, program.branch(BPF_JEQ, AUDIT_ARCH_X86_64, root, targets[Action.KILL]))
    return program.encode()


def runs_of(table: Mapping[int, Decision]) -> list[tuple[int, Decision]]:
    """(first number, decision) of every run of equal decisions, over all 2**32 numbers, in order."""
    edges = {0, X32_SYSCALL_BIT, NR_SKIPPED} | table.keys() | {number + 1 for number in table}
    runs: list[tuple[int, Decision]] = []
    for number in sorted(edges):
        x32 = X32_SYSCALL_BIT <= number < NR_SKIPPED
        decision = Action.KILL if x32 else table.get(number, Action.ENOSYS)
        if not runs or runs[-1][1] != decision:
            runs.append((number, decision))
    return runs


class Assembler:
    """A program written from its end to its start: BPF only jumps forward, so each target exists when used.

    A label is the number of instructions from its target to the end. A target further than the 8 bits of a
    conditional jump reach gets a stepping stone: a BPF_JA, or a copy of the return itself.
    """

    REACH: Final = 255 - 2  # room for the stone of the other branch, and for the jump itself

    def __init__(self) -> None:
        self._backwards: list[tuple[int, int, int, int]] = []  # code, jt, jf, k
        self._stones: dict[int, int] = {}

    def _emit(self, code: int, k: int, jt: int = 0, jf: int = 0) -> int:
        if not (0 <= jt <= 255 and 0 <= jf <= 255 and 0 <= k <= 0xFFFFFFFF):
            raise ValueError(f"instruction {code:#x} does not fit: jt={jt} jf={jf} k={k:#x}")
        self._backwards.append((code, jt, jf, k))
        return len(self._backwards)

    def _offset(self, target: int) -> int:
        return len(self._backwards) - target

    def _near(self, target: int) -> int:
        stone = self._stones.get(target, target)
        if self._offset(stone) <= self.REACH:
            return stone
        code, _, _, k = self._backwards[target - 1]
        copy = (code, k) if code == BPF_RET else (BPF_JA, self._offset(target))
        self._stones[target] = self._emit(*copy)
        return self._stones[target]

    def ret(self, action: Action) -> int:
        """Return `action`."""
        return self._emit(BPF_RET, action)

    def branch(self, code: int, k: int, match: int, otherwise: int) -> int:
        """Compare the accumulator with `k` and jump to one of two targets."""
        match, otherwise = self._near(match), self._near(otherwise)
        return self._emit(code, k, self._offset(match), self._offset(otherwise))

    def load(self, offset: int, then: int) -> int:
        """Load 32 bits of `struct seccomp_data` and go on at `then`."""
        if self._offset(then):
            self._emit(BPF_JA, self._offset(then))
        return self._emit(BPF_LD_ABS, offset)

    def rule(self, rule: Rule) -> int:
        """Test the low 32 bits (the first four bytes: little-endian) of one argument."""
        match, otherwise = self.ret(rule.match), self.ret(rule.otherwise)
        if rule.mask:
            otherwise = self.branch(BPF_JEQ, 0, otherwise, match)
            otherwise = self._emit(BPF_AND, rule.mask)
        for value in reversed(rule.values):
            otherwise = self.branch(BPF_JEQ, value, match, otherwise)
        return self.load(OFFSET_ARGS + 8 * rule.arg, otherwise)

    def encode(self) -> bytes:
        """The program from start to end, as the kernel takes it."""
        if len(self._backwards) > BPF_MAXINSNS:
            raise ValueError(f"{len(self._backwards)} instructions; the kernel takes {BPF_MAXINSNS}")
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in reversed(self._backwards))
