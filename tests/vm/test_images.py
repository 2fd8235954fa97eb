# SPDX-License-Identifier: Apache-2.0
"""Images and sessions on kernels that want the layers of an overlay attached (before 6.15): see guest_images.sh."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.guests import KERNELS, Guest, started

TIMEOUT = 300
"""Seconds for one kernel; it takes about 45, twice that beside another."""

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    script = Path(__file__).with_name("guest_images.sh")
    with started(tmp_path_factory, TIMEOUT, ["sh", str(script), sys.executable]) as running:
        yield running


@pytest.mark.parametrize("kernel", KERNELS)
def test_images_and_sessions(guests: dict[str, Guest], kernel: str) -> None:
    status, stdout, stderr = guests[kernel].finish()
    if status != 0 or " passed" not in stdout:
        pytest.fail(f"exit status {status}\n{stdout[-6000:]}\n{stderr[-2000:]}", pytrace=False)
