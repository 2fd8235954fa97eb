# SPDX-License-Identifier: Apache-2.0
"""Images of Debian, built once for the whole run: they are what takes long."""

import tempfile
from pathlib import Path

import pytest

from agentrun.image.store import Store
from tests.image.support import Inside, image, need
from tests.requirements import lacking
from tests.support import missing_requirement, open_daemon


@pytest.fixture(scope="session")
def scratch():
    """A directory on a disk, gone afterwards: pytest would keep three runs' worth of its own."""
    with tempfile.TemporaryDirectory(prefix="agentrun-images-", dir="/var/tmp") as name:
        yield Path(name)


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
