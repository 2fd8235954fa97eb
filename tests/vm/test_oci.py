# SPDX-License-Identifier: Apache-2.0
"""agentrun-oci under podman and containerd, beside crun and runc, on kernels with all of cgroup v2.

Each kernel is booted once, all of them at the same time. Where there are several, they share the work: one runs the tests of
tests/kernel/test_oci_*.py where the controllers are, the next one the engines; a guest with one kernel does both.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.requirements import lacking
from tests.vm import guest_oci
from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 420
"""Seconds for one kernel; it takes about 150."""
ENGINES = ("podman", "crun", "runc", "conmon", "containerd", "ctr", "newuidmap", "catatonit")
PEERS_FAIL = {("pod", "crun")}
"""crun 1.8.1 may not make /dev/null in a pod's first container under the devices podman 4.3 gives it in a guest."""

EXPECTED: dict[str, Any] = {
    "exit_codes": [0, 3, 126, 127],
    "errors_are_told": [["OCI runtime attempted to invoke a command that was not found"]],
    "user_namespace": ["0 100000 65536", "0", "0", "crw-rw-rw- 0 200000 65536"],
    "terminal": ["/dev/pts/0", "yes", "console"],
    "remove_what_runs": "",
    "memory_limit": "137 true",
    "healthcheck": [1, 0],
    "pod": ["podhost", {"net": True, "ipc": True, "uts": True, "pid": False, "mnt": False}],
    "rootless": [["0", "0 4711 1", "1 1048576 65536", "made", "small"], [4, 127], "0\n", 6],
    "run_in_the_foreground": [[0, "out\n"], [3, "out\n"], 1, True],
}

pytestmark = pytest.mark.vm


def engines_on() -> list[str]:
    return KERNELS if len(KERNELS) < 2 else KERNELS[1::2]


def suite_on() -> list[str]:
    return KERNELS if len(KERNELS) < 2 else KERNELS[::2]


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/libexec/podman"
    if missing := [name for name in ENGINES if shutil.which(name, path=path) is None]:
        lacking(f"not installed: {', '.join(missing)}")
    command = ["env", f"OCI_KERNELS={' '.join(KERNELS)}", sys.executable, "-m", guest_oci.__name__]
    with started(tmp_path_factory, TIMEOUT, command) as running:
        yield running


_said: dict[str, tuple[int, str, str]] = {}


def said(guests: dict[str, Guest], kernel: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the guest with a kernel said of each step, by the step's and the runtime's name."""
    if kernel not in _said:
        _said[kernel] = guests[kernel].finish()
    _, stdout, _ = _said[kernel]
    return {(entry["name"], entry["runtime"]): entry for entry in map(json.loads, stdout.splitlines())}


def found(guests: dict[str, Guest], kernel: str, name: str, runtime: str) -> Any:
    entry = said(guests, kernel).get((name, runtime))
    if entry is None:
        pytest.fail(f"{name} with {runtime}: no word; status {_said[kernel][0]}:\n{_said[kernel][2][-3000:]}", pytrace=False)
    if "error" in entry:
        pytest.fail(f"{name} with {runtime}: {entry['error']}", pytrace=False)
    return entry["found"]


@pytest.mark.parametrize("kernel", engines_on())
@pytest.mark.parametrize("name", [*guest_oci.PODMAN, *guest_oci.CTR])
def test_engine(guests: dict[str, Guest], kernel: str, name: str) -> None:
    ours, *peers = guest_oci.RUNTIMES["podman" if name in guest_oci.PODMAN else "ctr"]
    result = found(guests, kernel, name, ours)
    if name in EXPECTED:
        assert result == EXPECTED[name]
    for peer in peers:
        if (name, peer) not in PEERS_FAIL:
            assert result == found(guests, kernel, name, peer)


@pytest.mark.parametrize("kernel", engines_on())
def test_systemd(guests: dict[str, Guest], kernel: str) -> None:
    assert found(guests, kernel, "systemd", "agentrun") == {
        "path": "agentrun.slice/agentrun-t.slice/oci-t1.scope",
        "files": [str(64 << 20), "30", "50000 100000"],
        "unit": ["active", "yes", str(64 << 20), "30", "500ms"],
        "updated": [str(32 << 20), str(32 << 20)],
        "left": ["inactive", []],
        "podman": [
            [str(64 << 20), "30", "50000 100000"],
            "0::/my.slice/libpod-ID.scope/init",
            [3, 127, 5],
            [str(32 << 20)],
            [],
        ],
    }


@pytest.mark.parametrize("kernel", suite_on())
def test_suite(guests: dict[str, Guest], kernel: str) -> None:
    result = found(guests, kernel, "suite", "agentrun")
    assert result["passed"] > 110
    assert len(result["skipped"]) <= 3, result  # what only a host without controllers shows
