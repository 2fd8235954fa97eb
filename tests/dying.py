# SPDX-License-Identifier: Apache-2.0
"""A process that dies at a line of the code under test: kill -9 at every place there is, not only at those that take long."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any


def run_to_line(action: Callable[[], object], within: Sequence[str], last_line: int = 0) -> tuple[bool, int, str]:
    """Run in a child that kills itself at that line of files with one of ``within`` in their path: nothing of it runs any more.

    Whether it came to its end, how many lines it ran, and what the action returned, as text; 0 and nothing if it was killed.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = 0

        def trace(frame: Any, _event: str, _: object) -> Any:
            nonlocal seen
            if not any(part in frame.f_code.co_filename for part in within):
                return None
            seen += 1
            if seen == last_line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.settrace(trace)
            returned = action()
            sys.settrace(None)
            os.write(write, f"{seen} {returned}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines, _, said = pipe.read().partition(" ")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0, int(lines or 0), said
