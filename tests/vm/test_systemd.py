# SPDX-License-Identifier: Apache-2.0
"""The units of systemd/, started, used, killed and stopped by a real systemd: see guest_systemd.py.

Of two kernels the first one has the calls and the second the units' life; a guest with one kernel does both. KERNELS=6.1 and the
like choose.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.requirements import lacking
from tests.vm import guest_systemd
from tests.vm.guests import KERNELS, Guest, started
from tests.vm.unit_calls import CALLS
from tests.vm.unit_life import LIFE

TIMEOUT = 300
"""Seconds for one kernel; it takes about 75 beside another, 120 if it does both, and more where other tests run."""
PROGRAMS = ("/lib/systemd/systemd", "systemctl", "unshare", "nsenter", "runuser", "useradd", "groupadd", "ip")
SHARES = ((CALLS, KERNELS[::2]), (LIFE, KERNELS[1::2] or KERNELS))

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        lacking(f"not installed: {', '.join(missing)}")
    command = ["env", f"SYSTEMD_KERNELS={' '.join(KERNELS)}", sys.executable, "-m", guest_systemd.__name__]
    with started(tmp_path_factory, TIMEOUT, command) as running:
        yield running


_said: dict[str, tuple[int, str, str]] = {}


def said(guests: dict[str, Guest], kernel: str) -> tuple[int, str, str]:
    if kernel not in _said:
        _said[kernel] = guests[kernel].finish()
    return _said[kernel]


@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for steps, kernels in SHARES for kernel in kernels for name in steps]
)
def test_step(guests: dict[str, Guest], kernel: str, name: str) -> None:
    status, stdout, stderr = said(guests, kernel)
    entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in map(json.loads, stdout.splitlines())}
    if name not in entries:
        pytest.fail(f"no word; the script's exit status was {status}:\n{stderr}", pytrace=False)
    if "error" in entries[name]:
        pytest.fail(entries[name]["error"], pytrace=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_script_ended_well(guests: dict[str, Guest], kernel: str) -> None:
    status, _, stderr = said(guests, kernel)
    assert (status, stderr) == (0, "")
