"""Limits, accounting and delegation on kernels with all of cgroup v2, however this machine's own is set up.

Each kernel is booted once, all of them at the same time, and runs every check of guest_limits.py; the tests here look at
what they said. A guest that is lost is an error of every test of its kernel, with its console's last words; a check that
said nothing is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vm import guest_limits, kernels, run

ROOT = Path(__file__).resolve().parents[2]
KERNELS = os.environ.get("KERNELS", "6.1 6.12").split()
TIMEOUT = 200
"""Seconds for one kernel; it takes about 40, or 50 if there are fewer processors than kernels."""

pytestmark = pytest.mark.vm


class Guest(NamedTuple):
    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path


class Verdicts(NamedTuple):
    checks: dict[str, dict[str, Any]]
    status: int
    stderr: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    """A running guest for each kernel. Emulation has one busy thread, so they do not wait for each other."""
    if missing := run.missing_requirements(ext4=True):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("; ".join(missing))
    started: dict[str, Guest] = {}
    try:
        for kernel in KERNELS:
            kernels.ensure(kernel)  # a download is not to count
            directory = tmp_path_factory.mktemp(f"guest-{kernel}")
            stdout, stderr = directory / "stdout", directory / "stderr"
            argv = [sys.executable, "-m", run.__name__, "--ext4", "--timeout", str(TIMEOUT), kernel, "--"]
            argv += [sys.executable, "-m", guest_limits.__name__]
            with stdout.open("wb") as out, stderr.open("wb") as err:
                process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            started[kernel] = Guest(process, stdout, stderr)
        yield started
    finally:
        for guest in started.values():
            guest.process.terminate()
            guest.process.wait()


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    """What the checks said in a guest with this kernel."""
    guest = guests[request.param]
    status = guest.process.wait(TIMEOUT + 30)
    stdout, stderr = guest.stdout.read_text(), guest.stderr.read_text()
    if status == run.EXIT_TIMED_OUT:
        raise run.TimedOut(f"{stderr}\n{stdout}")
    if status == run.EXIT_NO_VERDICT:
        raise run.LostVM(f"{stderr}\n{stdout}")
    said = [json.loads(line) for line in stdout.splitlines()]
    return Verdicts({verdict["name"]: verdict for verdict in said}, status, stderr)


@pytest.mark.parametrize("name", [*guest_limits.CHECKS, guest_limits.CLEAN])
def test_check(verdicts: Verdicts, name: str) -> None:
    verdict = verdicts.checks.get(name)
    if verdict is None:
        pytest.fail(f"no verdict; the script's exit status was {verdicts.status}:\n{verdicts.stderr}", pytrace=False)
    if not verdict["passed"]:
        pytest.fail(verdict["detail"], pytrace=False)


def test_script_ended_well(verdicts: Verdicts) -> None:
    assert (verdicts.status, verdicts.stderr) == (0, "")
