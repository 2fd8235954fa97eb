"""What can go wrong that is not the tool's doing.

A tool that fails is a ``Result``. An exception means that no honest result exists, and its class says whose turn it is::

    AgentrunError
    ├── UsageError        the caller asked for something that cannot be: fix the request        exit 2
    ├── Overloaded        pool and queue are full: try again later                              exit 75
    └── HostError         the machine cannot do it, or agentrun failed at it                     exit 125
        ├── LimitError    a limit that was asked for cannot be enforced on this host
        └── SandboxError  building a sandbox failed: the step, the errno and the object
"""

from __future__ import annotations

import os


class AgentrunError(Exception):
    """Base of every error agentrun raises. ``exit_code`` is what the command line exits with."""

    exit_code = 125


class UsageError(AgentrunError):
    """The request cannot be carried out as it stands: a bad path, a number that is none, a NUL in an argument."""

    exit_code = 2


class Overloaded(AgentrunError):
    """As many calls run as may, and as many wait as may."""

    exit_code = 75


class HostError(AgentrunError):
    """The host lacks something, or refused it. The message names the object and the likely cause."""


class LimitError(HostError):
    """A limit the caller required cannot be enforced here."""


class SandboxError(HostError):
    """A sandbox could not be built. ``step`` names where; ``errno`` is the kernel's answer."""

    def __init__(self, step: str, errno: int, detail: str = "") -> None:
        self.step = step
        self.errno = errno
        text = f"building the sandbox failed at {step}: {os.strerror(errno)}"
        super().__init__(f"{text} ({detail})" if detail else text)
