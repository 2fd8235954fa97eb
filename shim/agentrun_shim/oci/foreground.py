"""Wait for a program in the foreground: signals of ours are its signals, its exit status is ours."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agentrun_shim.oci.relay import Relay

_NOT_OURS = (signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGURG)


def wait_for(pid: int, relay: Relay | None = None) -> int:
    """Wait for a child, relaying its terminal; returns its exit status, or 128 and the number of the signal that ended it."""
    for number in signal.valid_signals():
        if number not in _NOT_OURS and number < 32:
            try:
                signal.signal(number, lambda caught, _frame: os.kill(pid, caught))
            except (OSError, ValueError):
                continue
    if relay is not None:
        relay.pump(pid)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
