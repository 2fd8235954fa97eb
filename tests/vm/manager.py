# SPDX-License-Identifier: Apache-2.0
"""A real systemd in a guest: PID 1 of a pid and a mount namespace of its own, for init.sh has the guest's."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds systemd may take until it listens; in a guest it takes two."""


class Tool:
    """A program that is called again and again with the same beginning."""

    def __init__(self, front: list[str], env: dict[str, str] | None = None, user: int | None = None) -> None:
        self.front, self.env, self.user = front, env, user

    def __call__(self, *arguments: str, timeout: float = 200, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.front, *arguments], text=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, env=self.env,
            user=self.user, group=self.user, extra_groups=[] if self.user else None, check=False, **options,
        )  # fmt: skip

    def must(self, *arguments: str) -> str:
        done = self(*arguments)
        assert done.returncode == 0, (arguments, done.returncode, done.stderr, done.stdout)
        return done.stdout.strip()


@contextlib.contextmanager
def booted() -> Iterator[Tool]:
    """systemd, on its way to sysinit.target; what is given runs a program beside it. All of it ends with the block.

    ``container`` is what systemd reads to learn that the machine's devices and clock are not its own. Only outside of
    containers it shares mounts with who asks for it, as everything of a usual host does: unshare does that here.
    """
    boot = "container=agentrun exec /lib/systemd/systemd --system --unit=sysinit.target"
    front = ["unshare", "--pid", "--mount", "--propagation", "shared", "--fork", "--kill-child", "--mount-proc"]
    null = subprocess.DEVNULL
    shutil.rmtree("/run/systemd", ignore_errors=True)  # of one before
    unshare = subprocess.Popen([*front, "sh", "-c", boot], stdin=null, stdout=null, stderr=null)
    try:
        deadline = time.monotonic() + PATIENCE
        while not Path("/run/systemd/private").exists():
            assert time.monotonic() < deadline, "systemd does not listen"
            time.sleep(0.2)
        (child,) = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        pidfd = os.pidfd_open(int(child))
        try:
            yield Tool(["nsenter", "-t", child, "-p", "-m"])
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [])  # until everything in its namespace is gone: another may come
            os.close(pidfd)
    finally:
        unshare.kill()
        unshare.wait()
