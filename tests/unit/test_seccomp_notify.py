# SPDX-License-Identifier: Apache-2.0
"""The supervisor's side of a filter, with real processes that wait for it."""

import errno
import fcntl
import os
import select
import socket

import pytest

from agentrun_shim import seccomp_notify
from agentrun_shim.seccomp_notify import answer, let_continue, receive, syscall_name
from agentrun_shim.syscall_table import NUMBERS
from tests.unit.listener_support import child, readable
from tests.unit.seccomp_support import needs_kernel, profile_of

pytestmark = needs_kernel
REFUSED = profile_of(
    {"names": ["acct", "kcmp"], "action": "SCMP_ACT_ERRNO"},
    {"names": ["getppid"], "action": "SCMP_ACT_LOG"},
    {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
)


def test_the_structures_are_as_long_as_the_kernel_says() -> None:
    assert (seccomp_notify.NOTIF.size, seccomp_notify.RESPONSE.size) == (80, 24)
    assert seccomp_notify.sizes() >= (80, 24)
    ioctl = {name: getattr(seccomp_notify, name) for name in ("IOCTL_RECV", "IOCTL_SEND")}
    assert {name: number >> 16 & 0x3FFF for name, number in ioctl.items()} == {"IOCTL_RECV": 80, "IOCTL_SEND": 24}


def test_names() -> None:
    assert [syscall_name(nr) for nr in (0, 90, 471, 400, 1 << 30)] == [
        "read", "chmod", "rseq_slice_yield", "syscall_400", "syscall_1073741824",
    ]  # fmt: skip


def test_a_call_waits_for_its_answer() -> None:
    big = 0xFEDCBA9876543210
    with child(REFUSED, f"[call({NUMBERS['kcmp']}, 1, 2, 3, {big}, 2**64 - 1), call({NUMBERS['acct']}, 7)]") as process:
        assert not select.select([process.listener], [], [], 0)[0]
        process.go()
        for nr, args, error in (("kcmp", (1, 2, 3, big, 2**64 - 1), errno.ENOTTY), ("acct", (7,), errno.EPERM)):
            assert readable(process.listener)
            call = receive(process.listener)
            assert call is not None
            assert (syscall_name(call.nr), call.args[: len(args)], call.pid) == (nr, args, process.process.pid)
            assert answer(process.listener, call.id, error)
            assert not answer(process.listener, call.id, error), "it does not wait any more"
        assert process.result() == [-errno.ENOTTY, -errno.EPERM]
        os.close(process.listener)


def test_success_can_be_pretended() -> None:
    with child(REFUSED, f"call({NUMBERS['acct']}, 1)") as process:
        process.go()
        assert readable(process.listener)
        call = receive(process.listener)
        assert call is not None
        assert answer(process.listener, call.id, 0)
        assert process.result() == 0
        os.close(process.listener)


def test_a_call_can_go_on() -> None:
    with child(REFUSED, f"call({NUMBERS['getppid']})") as process:
        process.go()
        assert readable(process.listener)
        call = receive(process.listener)
        assert call is not None
        assert let_continue(process.listener, call.id)
        assert process.result() == os.getpid()
        assert not readable(process.listener), "no process has the filter any more"
        os.close(process.listener)


def test_enosys_asks_nobody_and_a_closed_listener_is_enosys() -> None:
    with child(REFUSED, f"[call({NUMBERS['mount']}, 0, 0, 0, 0, 0), call({NUMBERS['acct']}, 1)]") as process:
        os.close(process.listener)
        process.go()
        assert process.result() == [-errno.ENOSYS, -errno.ENOSYS]


def test_a_caller_that_died_is_no_error() -> None:
    with child(REFUSED, f"call({NUMBERS['acct']}, 1)") as process:
        process.go()
        assert readable(process.listener)
        process.process.kill()
        process.process.wait(10)
        assert receive(process.listener) is None
        os.close(process.listener)
    with child(REFUSED, f"call({NUMBERS['acct']}, 1)") as process:
        process.go()
        assert readable(process.listener)
        call = receive(process.listener)
        assert call is not None
        process.process.kill()
        process.process.wait(10)
        assert not answer(process.listener, call.id, errno.EPERM)
        assert not let_continue(process.listener, call.id)
        os.close(process.listener)


def test_a_descriptor_that_is_no_listener_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for function in (lambda fd: receive(fd), lambda fd: answer(fd, 1, 1), lambda fd: let_continue(fd, 1)):
            with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
                function(ours.fileno())
        assert fcntl.fcntl(ours, fcntl.F_GETFD) >= 0
