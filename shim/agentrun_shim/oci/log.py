"""Where it is said what goes wrong: stderr, and one line in the engine's log as runc writes it."""

from __future__ import annotations

import os
import sys
import time

from agentrun_shim.oci.jsontext import dumps


class Log:
    """``--log``, ``--log-format``: a file that lines are appended to, JSON or text; none without ``--log``."""

    def __init__(self, path: str | None = None, *, json: bool = False) -> None:
        self.path, self.json = path, json

    def write(self, level: str, message: str) -> None:
        """Append one line; what cannot be written is lost, for the message is on stderr as well."""
        if self.path is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.json:
            line = dumps({"level": level, "msg": message, "time": now})
        else:
            line = f'time="{now}" level={level} msg={dumps(message)}'
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            os.write(fd, line.encode() + b"\n")
        except OSError:
            pass
        finally:
            os.close(fd)

    def error(self, message: str) -> None:
        """An error, on stderr too."""
        self.write("error", message)
        _say(message)

    def warning(self, message: str) -> None:
        """Something that is done otherwise than asked, or not at all."""
        self.write("warning", message)
        _say(f"warning: {message}")


def _say(message: str) -> None:
    try:
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
