# SPDX-License-Identifier: Apache-2.0
"""The OCI hook under crun, runc and podman, on kernels with all of cgroup v2: see guest_hook.py.

``KERNELS=7.2`` tries them on the newest.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.containers import RUNTIMES
from tests.requirements import lacking
from tests.vm import guest_hook
from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 400
"""Seconds for one kernel; it takes about 90 beside another."""

pytestmark = pytest.mark.vm


class Verdicts(NamedTuple):
    checks: dict[str, dict[str, Any]]
    status: int
    stderr: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    for program in (*RUNTIMES, "podman"):
        if shutil.which(program, path="/usr/bin:/usr/sbin:/usr/local/bin") is None:
            lacking(f"no {program}")
    with started(tmp_path_factory, TIMEOUT, [sys.executable, "-m", guest_hook.__name__]) as running:
        yield running


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    status, stdout, stderr = guests[request.param].finish()
    said = [json.loads(line) for line in stdout.splitlines()]
    return Verdicts({verdict["name"]: verdict for verdict in said}, status, stderr)


@pytest.mark.parametrize(
    "name", [*(f"{runtime}: {name}" for runtime in RUNTIMES for name in guest_hook.WITH), *guest_hook.BETWEEN]
)
def test_check(verdicts: Verdicts, name: str) -> None:
    verdict = verdicts.checks.get(name)
    if verdict is None:
        pytest.fail(f"no verdict; the script's exit status was {verdicts.status}:\n{verdicts.stderr}", pytrace=False)
    if not verdict["passed"]:
        pytest.fail(verdict["detail"], pytrace=False)


def test_script_ended_well(verdicts: Verdicts) -> None:
    assert (verdicts.status, verdicts.stderr) == (0, "")
