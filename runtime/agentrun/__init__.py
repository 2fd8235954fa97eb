"""agentrun: run the tools of AI agents, each call in its own fresh sandbox and cgroup, in about the time of a fork and exec.

::

    async with open_executor() as executor:
        result = await executor.run(["pytest", "-q"], workspace="/home/me/project", timeout=120)
        print(result.outcome, result.usage.memory_peak)

docs/design.md tells how it works, docs/security.md what a sandbox defends against.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrun.errors import AgentrunError, HostError, LimitError, Overloaded, SandboxError, UsageError
    from agentrun.executor import Executor
    from agentrun.executorconfig import ExecutorConfig
    from agentrun.opening import open_executor
    from agentrun.policy import Limits, Policy
    from agentrun.running import Running
    from agentrun.stdio import PIPE
    from agentrun.types import Changes, Outcome, Result, Timings, Unenforced, Usage, Verdict
    from agentrun.workspace import Workspace

__all__ = [
    "PIPE",
    "AgentrunError",
    "Changes",
    "Executor",
    "ExecutorConfig",
    "HostError",
    "LimitError",
    "Limits",
    "Outcome",
    "Overloaded",
    "Policy",
    "Result",
    "Running",
    "SandboxError",
    "Timings",
    "Unenforced",
    "Usage",
    "UsageError",
    "Verdict",
    "Workspace",
    "open_executor",
]
__version__ = "0.1.0"

_MODULES = {
    "errors": ("AgentrunError", "HostError", "LimitError", "Overloaded", "SandboxError", "UsageError"),
    "executor": ("Executor",),
    "executorconfig": ("ExecutorConfig",),
    "opening": ("open_executor",),
    "policy": ("Limits", "Policy"),
    "running": ("Running",),
    "stdio": ("PIPE",),
    "types": ("Changes", "Outcome", "Result", "Timings", "Unenforced", "Usage", "Verdict"),
    "workspace": ("Workspace",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Imported when they are first asked for: trio alone takes longer than most tool calls, and not every process needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"agentrun.{_HOMES[name]}"), name)
