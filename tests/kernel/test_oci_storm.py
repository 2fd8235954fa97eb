# SPDX-License-Identifier: Apache-2.0
"""Create, start, kill, delete in random order, by several at once on the same names, and the runtime itself killed at any moment.

AGENTRUN_OCI_STORM is the number of calls (1000), AGENTRUN_OCI_SEED repeats a run.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.oci_support import RUNTIME, Oci, config, leftovers

pytestmark = pytest.mark.host
CALLS = int(os.environ.get("AGENTRUN_OCI_STORM", "1000"))
SEED = int(os.environ.get("AGENTRUN_OCI_SEED", random.randrange(1 << 32)))
WORKERS = 3
KILLED = 0.35
"""How many of the calls are killed."""


class Storm:
    def __init__(self, oci: Oci) -> None:
        self.oci = oci
        self.names = [oci.id() for _ in range(5)]
        self.numbers = itertools.count()
        self.wrong: list[str] = []
        self.seen: dict[str, int] = {}

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        while (number := next(self.numbers)) < CALLS:
            try:
                self.one(rng, number)
            except Exception as error:  # noqa: BLE001 -- a thread's exception would be lost
                self.wrong.append(repr(error))

    def one(self, rng: random.Random, number: int) -> None:
        name = rng.choice(self.names)
        verb = rng.choice(
            ["create", "create", "start", "start", "kill", "delete", "delete --force", "exec", "state", "pause", "resume"]
        )
        log = self.oci.directory / f"log-{number}"
        argv = [RUNTIME, "--root", str(self.oci.root), "--log", str(log), "--log-format", "json", *verb.split()]
        argv += ["--bundle", str(self.oci.bundle), name] if verb == "create" else [name]
        argv += {"kill": ["KILL"], "exec": ["true"]}.get(verb, [])
        process = subprocess.Popen(argv, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            struck = rng.random() < KILLED
            if struck:
                time.sleep(rng.random() * (0.05 if verb in ("create", "exec", "pause", "resume") else 0.004))
                process.send_signal(signal.SIGKILL)
            process.wait(30)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{verb} hangs")
            process.kill()
            process.wait()
            return
        self.seen[f"{verb}: {process.returncode}"] = self.seen.get(f"{verb}: {process.returncode}", 0) + 1
        lines = log.read_text().splitlines() if log.exists() else []
        if process.returncode == -signal.SIGKILL:
            return
        if (process.returncode == 0) != (not lines) or len(lines) > 1:
            self.wrong.append(f"{verb}: status {process.returncode}, log {lines}")
        for line in lines:
            entry = json.loads(line)
            if entry["level"] != "error" or "internal error" in entry["msg"] or not entry["msg"]:
                self.wrong.append(f"{verb}: {line}")


def strays(directory: Path) -> list[str]:
    """Processes of the runtime that work in this directory, or have one of its files open as theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                os.readlink(process / "cwd").startswith(str(directory))
                or str(directory).encode() in (process / "cmdline").read_bytes()
            ):
                found.append(f"{process.name}: {(process / 'cmdline').read_bytes()!r}")
    return found


def test_a_storm_leaves_nothing(oci):
    oci.write(config("sleep 1000"))
    storm = Storm(oci)
    threads = [threading.Thread(target=storm.work, args=(SEED + worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = f"seed {SEED}: {storm.wrong[:10]}\n{storm.seen}"
    assert storm.wrong == [], said
    oci.clean()
    deadline = time.monotonic() + 10
    while (left := strays(oci.directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == [], said
    assert leftovers(storm.names) == [], said
    assert sum(count for what, count in storm.seen.items() if what.endswith(": 0")) > CALLS // 10, said
