"""Limits, accounting and delegation on kernels with all of cgroup v2, however this machine's own is set up.

Each kernel is booted once, runs every check of guest_limits.py, and the tests here look at what they said. A guest that
is lost is an error of every test of its kernel, with its console's last words; a check that said nothing is a failure.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm import guest_limits, run

ROOT = Path(__file__).resolve().parents[2]
KERNELS = os.environ.get("KERNELS", "6.1 6.12").split()
TIMEOUT = 150.0
"""Seconds for one kernel; it takes about 40."""

pytestmark = pytest.mark.vm

Verdicts = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """What the checks said in a guest with this kernel, by name."""
    if missing := run.missing_requirements(ext4=True):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("; ".join(missing))
    stdout, stderr = io.BytesIO(), io.BytesIO()
    command = [sys.executable, "-m", guest_limits.__name__]
    try:
        status = run.run(request.param, command, timeout=TIMEOUT, cwd=ROOT, ext4=True, stdout=stdout, stderr=stderr)
    except (run.LostVM, run.TimedOut) as error:
        error.add_note(f"its output until then:\n{stdout.getvalue().decode()}{stderr.getvalue().decode()}")
        raise
    said = [json.loads(line) for line in stdout.getvalue().splitlines()]
    yield {verdict["name"]: verdict for verdict in said} | {"": {"status": status, "stderr": stderr.getvalue().decode()}}


@pytest.mark.parametrize("name", [*guest_limits.CHECKS, guest_limits.CLEAN])
def test_check(verdicts: Verdicts, name: str, record_property: Any) -> None:
    verdict = verdicts.get(name)
    if verdict is None:
        pytest.fail(f"the check said nothing; the guest's script ended so: {verdicts['']}", pytrace=False)
    record_property("seconds", verdict["seconds"])
    if not verdict["passed"]:
        pytest.fail(verdict["detail"], pytrace=False)


def test_script_ended_well(verdicts: Verdicts) -> None:
    assert verdicts[""] == {"status": 0, "stderr": ""}
