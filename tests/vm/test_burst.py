# SPDX-License-Identifier: Apache-2.0
"""Memory bursts on kernels with a memory controller, in each way that memory can be controlled: see guest_burst.py.

``KERNELS=7.2`` tries them on the newest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.vm import guest_burst
from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 400
"""Seconds for one kernel; it takes about 60, twice that beside another, and more where other tests run."""

pytestmark = pytest.mark.vm


class Verdicts(NamedTuple):
    checks: dict[str, dict[str, Any]]
    status: int
    stderr: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    with started(tmp_path_factory, TIMEOUT, [sys.executable, "-m", guest_burst.__name__]) as running:
        yield running


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    status, stdout, stderr = guests[request.param].finish()
    said = [json.loads(line) for line in stdout.splitlines()]
    return Verdicts({verdict["name"]: verdict for verdict in said}, status, stderr)


@pytest.mark.parametrize("name", ["is the mode", *guest_burst.CHECKS])
@pytest.mark.parametrize("mode", guest_burst.MODES)
def test_check(verdicts: Verdicts, mode: str, name: str) -> None:
    verdict = verdicts.checks.get(f"{mode}: {name}")
    if verdict is None:
        pytest.fail(f"no verdict; the script's exit status was {verdicts.status}:\n{verdicts.stderr}", pytrace=False)
    if not verdict["passed"]:
        pytest.fail(verdict["detail"], pytrace=False)


def test_script_ended_well(verdicts: Verdicts) -> None:
    assert (verdicts.status, verdicts.stderr) == (0, "")
