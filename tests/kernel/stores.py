# SPDX-License-Identifier: Apache-2.0
"""Stores of images and of sessions for one file of tests."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentrun.image.store import Store
from tests.image.roots import write_root


@contextlib.contextmanager
def session_stores() -> Iterator[Path]:
    """A directory with both, and an image called plain. The environment names them, so they come before the executor."""
    with tempfile.TemporaryDirectory(prefix="agentrun-sessions-", dir="/var/tmp") as name:
        here = Path(name)
        write_root(here / "root", srv__data="image's\n")
        Store(here / "images").import_image(str(here / "root"), "plain")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AGENTRUN_IMAGES", str(here / "images"))
            patch.setenv("AGENTRUN_SESSIONS", str(here / "sessions"))
            yield here
