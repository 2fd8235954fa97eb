"""Wait for a program in the foreground: signals of ours are its signals, its exit status is ours."""

from __future__ import annotations

import os
import signal

_NOT_OURS = (signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGURG)


def wait_for(pid: int) -> int:
    """Wait for a child; returns its exit status, 128 and the signal's number if it was ended by one."""
    for number in signal.valid_signals():
        if number not in _NOT_OURS and number < 32:
            try:
                signal.signal(number, lambda caught, _frame: os.kill(pid, caught))
            except (OSError, ValueError):
                continue
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
