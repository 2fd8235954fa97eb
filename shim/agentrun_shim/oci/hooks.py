"""Hooks: programs of the configuration, run at six points of a container's life with its state on stdin.

config.md, "POSIX-platform Hooks".

prestart and createRuntime are run here by `create`, poststart by `start`, poststop by `delete`; createContainer and
startContainer by the container's own process, in its namespaces (``shim/native/oci_process.c``).
"""

from __future__ import annotations

import os
import select
import time

from agentrun_shim.container_plan import Plan, strings
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def of(config: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """The hooks of a stage.

    Raises:
        OciError: one without an absolute path, or with a timeout that is none.
    """
    hooks = (config.get("hooks") or {}).get(stage) or []
    for number, hook in enumerate(hooks):
        path, timeout = hook.get("path"), hook.get("timeout")
        if not isinstance(path, str) or not path.startswith("/"):
            raise OciError(f"hooks.{stage}[{number}].path: {path!r} is not an absolute path")
        if timeout is not None and (not isinstance(timeout, int) or timeout <= 0):
            raise OciError(f"hooks.{stage}[{number}].timeout: {timeout!r} is no number of seconds")
    return list(hooks)


def add(plan: Plan, config: dict[str, Any], stage: str) -> None:
    """The hooks of a stage as operations of the container's process."""
    for hook in of(config, stage):
        args = list(hook.get("args") or [hook["path"]])
        env = list(hook.get("env") or [])
        plan.add(
            "HOOK", hook["path"], a=len(args), b=len(env), c=hook.get("timeout") or 0, blob=strings(args) + strings(env),
            about=f"{stage} hook {hook['path']}",
        )  # fmt: skip


def run(config: dict[str, Any], stage: str, state: str) -> None:
    """Run the hooks of a stage, one after the other.

    Raises:
        OciError: one could not be run, ended with a status other than 0, or took longer than its timeout.
    """
    for hook in of(config, stage):
        _run(hook, stage, state)


def run_all(config: dict[str, Any], stage: str, state: str, log: Log) -> None:
    """Run them all, whatever becomes of them: what fails is a warning (poststop)."""
    for hook in of(config, stage):
        try:
            _run(hook, stage, state)
        except OciError as error:
            log.warning(str(error))


def _run(hook: dict[str, Any], stage: str, state: str) -> None:
    about = f"{stage} hook {hook['path']}"
    args, env = (
        list(hook.get("args") or [hook["path"]]),
        dict([item.split("=", 1) for item in hook.get("env") or () if "=" in item]),
    )
    given = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.write(given, state.encode())
        os.lseek(given, 0, os.SEEK_SET)
        try:
            pid = os.posix_spawn(hook["path"], args, env, file_actions=[(os.POSIX_SPAWN_DUP2, given, 0)])
        except OSError as error:
            raise OciError(f"{about}: {error.strerror}") from None
    finally:
        os.close(given)
    if _wait(pid, hook.get("timeout")):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise OciError(f"{about}: {f'exit status {code}' if code > 0 else f'killed by signal {-code}'}")
        return
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise OciError(f"{about}: timed out after {hook['timeout']} s")


def _wait(pid: int, timeout: int | None) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if poll.poll(left):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
    finally:
        os.close(pidfd)
