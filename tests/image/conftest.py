# SPDX-License-Identifier: Apache-2.0
"""Images of Debian, built once for the whole run: they are what takes long."""

import os
import tempfile
from pathlib import Path

import pytest

from agentrun.image.store import Store
from tests.image.support import Inside, image, need
from tests.requirements import lacking
from tests.support import missing_requirement, open_daemon

NEEDED = 4 << 30


@pytest.fixture(scope="session")
def scratch():
    """A directory, gone afterwards: pytest would keep three runs' worth of its own.

    In memory if there is plenty: what is tested here is what comes out, and a busy disk makes minutes of it.
    """
    with tempfile.TemporaryDirectory(prefix="agentrun-images-", dir="/dev/shm" if plenty("/dev/shm") else "/var/tmp") as name:
        yield Path(name)


def plenty(directory: str) -> bool:
    """Is there room for a dozen images, and the memory for it?"""
    try:
        free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
        available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return False
    return free > NEEDED and available > 2 * NEEDED


@pytest.fixture(scope="session")
def store(scratch):
    return Store(scratch / "store")


@pytest.fixture(scope="session")
def inside(store):
    """To run programs in the store's images."""
    if reason := missing_requirement():
        lacking(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTRUN_IMAGES", str(store.root))
        daemon = open_daemon()
        running = daemon.__enter__()
    yield Inside(running)
    daemon.__exit__(None, None, None)


@pytest.fixture(scope="session")
def debian(store):
    """The name of an image by the recipe ``debian-slim``."""
    need("mmdebstrap", "apt-get")
    image(store, "build", "debian-slim", "debian")
    return "debian"


@pytest.fixture(scope="session")
def python(store):
    """The name of an image by the recipe ``python``."""
    need("mmdebstrap", "apt-get")
    image(store, "build", "python")
    return "python"
