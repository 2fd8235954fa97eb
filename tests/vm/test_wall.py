"""The escape suite (tests/kernel/test_wall_*.py) on the kernels that distributions ship.

Each kernel is booted once, all of them at the same time, and runs the whole suite with pytest; the tests here look at what
it said. Some attacks are tried in full only there, where the machine is nobody's: AGENTRUN_VM says so to the suite.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.kernel.wall_names import wall_files, wall_tests
from tests.vm import run
from tests.vm.guests import KERNELS, ROOT, Guest, started

TIMEOUT = 300
"""Seconds for one kernel; it takes about 60, and twice that on a busy machine."""
REPORT = "/run/vm/wall.xml"
KNOWN_SKIPS = {"test_a_workspace_that_is_swapped"}
"""A guest has one processor, on which a race is a matter of minutes."""

pytestmark = pytest.mark.vm


class Outcome(NamedTuple):
    kind: str
    """``passed``, ``failed``, ``skipped``, or ``hole``: a wall that is known not to be there."""
    detail: str


class Verdicts(NamedTuple):
    outcomes: dict[str, list[Outcome]]
    """By test; one for each of its parameters."""
    status: int
    output: str


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    # What a guest imports it had better find compiled: its own writes are lost. And plugins take it as long as pytest itself.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "runtime", "shim", "tests"], cwd=ROOT, check=True)
    suite = [
        "env",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--assert=plain",
    ]
    suite += ["--tb=short", f"--junit-xml={REPORT}", *(str(path.relative_to(ROOT)) for path in wall_files())]
    script = f"{shlex.join(suite)} >&2; status=$?; cat {REPORT}; exit $status"
    with started(tmp_path_factory, TIMEOUT, ["sh", "-c", script]) as running:
        yield running


@pytest.fixture(scope="module", params=KERNELS)
def verdicts(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Verdicts:
    """What the suite said in a guest with this kernel."""
    status, report, output = guests[request.param].finish()
    if not report:
        raise run.LostVM(output)
    outcomes: dict[str, list[Outcome]] = {}
    for case in ET.fromstring(report).iter("testcase"):
        outcomes.setdefault(case.attrib["name"].partition("[")[0], []).append(outcome_of(case))
    return Verdicts(outcomes, status, output)


def outcome_of(case: ET.Element) -> Outcome:
    for child in case:
        if child.tag in ("failure", "error"):
            return Outcome("failed", f"{case.attrib['name']}: {child.text}")
        if child.tag == "skipped":
            return Outcome("hole" if child.attrib["type"] == "pytest.xfail" else "skipped", child.attrib["message"])
    return Outcome("passed", "")


@pytest.mark.parametrize("name", wall_tests())
def test_wall(verdicts: Verdicts, name: str) -> None:
    outcomes = verdicts.outcomes.get(name)
    if outcomes is None:
        pytest.fail(f"no verdict; pytest's exit status was {verdicts.status}:\n{verdicts.output}", pytrace=False)
    details = {kind: "\n".join(dict.fromkeys(found.detail for found in outcomes if found.kind == kind)) for kind, _ in outcomes}
    if "failed" in details:
        pytest.fail(details["failed"], pytrace=False)
    if "skipped" in details:
        unexpected = os.environ.get("CI") and name not in KNOWN_SKIPS
        (pytest.fail if unexpected else pytest.skip)(details["skipped"])
    if "hole" in details:
        pytest.xfail(details["hole"])


def test_suite_ended_well(verdicts: Verdicts) -> None:
    assert verdicts.status == 0, verdicts.output
