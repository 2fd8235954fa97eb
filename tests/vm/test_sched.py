# SPDX-License-Identifier: Apache-2.0
"""The scheduler for calls, on kernels that have sched_ext: see guest_sched.py. ``KERNELS=7.2`` is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from agentrun.probes.sched import STATE
from tests.vm import guest_sched
from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 500
"""Seconds for one kernel; it takes about 100, and more where other tests run."""
LACKING = 77
COMMAND = ["sh", "-c", f'[ -e {STATE} ] || exit {LACKING}; exec "$@"', "sh", sys.executable, "-m", guest_sched.__name__]

pytestmark = pytest.mark.vm


class Verdicts(NamedTuple):
    checks: dict[str, dict[str, Any]]
    status: int
    stderr: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    with started(tmp_path_factory, TIMEOUT, COMMAND) as running:
        yield running


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    status, stdout, stderr = guests[request.param].finish()
    if status == LACKING:
        pytest.skip(f"kernel {request.param} has no sched_ext")
    said = [json.loads(line) for line in stdout.splitlines()]
    return Verdicts({verdict["name"]: verdict for verdict in said}, status, stderr)


@pytest.mark.parametrize("name", guest_sched.CHECKS)
def test_check(verdicts: Verdicts, name: str) -> None:
    verdict = verdicts.checks.get(name)
    if verdict is None:
        pytest.fail(f"no verdict; the script's exit status was {verdicts.status}:\n{verdicts.stderr}", pytrace=False)
    if not verdict["passed"]:
        pytest.fail(verdict["detail"], pytrace=False)


def test_script_ended_well(verdicts: Verdicts) -> None:
    assert (verdicts.status, verdicts.stderr) == (0, "")
