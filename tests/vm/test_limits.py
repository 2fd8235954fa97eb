"""Limits, accounting and delegation on kernels with all of cgroup v2, however this machine's own is set up.

Each kernel is booted once, all of them at the same time, and runs every check of guest_limits.py; the tests here look at
what they said. A guest that is lost is an error of every test of its kernel, with its console's last words; a check that
said nothing is a failure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.vm import guest_limits
from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 200
"""Seconds for one kernel; it takes about 40, or 50 if there are fewer processors than kernels."""

pytestmark = pytest.mark.vm


class Verdicts(NamedTuple):
    checks: dict[str, dict[str, Any]]
    status: int
    stderr: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    with started(tmp_path_factory, TIMEOUT, [sys.executable, "-m", guest_limits.__name__]) as running:
        yield running


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    """What the checks said in a guest with this kernel."""
    status, stdout, stderr = guests[request.param].finish()
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
