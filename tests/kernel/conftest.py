# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the escape suite, and of the container runtime's tests."""

import pytest

from tests.kernel.wall import DISPOSABLE, Walls, workspace_directory
from tests.oci_support import Oci
from tests.oci_support import missing_requirement as missing_for_oci
from tests.requirements import lacking
from tests.support import Blocking, Leaks, cgroup_of, missing_requirement, own_config


def scope(fixture_name: str, config: pytest.Config) -> str:
    """An emulated machine takes five seconds for what is made here; elsewhere every file has its own, and is checked alone."""
    return "session" if DISPOSABLE else "module"


@pytest.fixture(scope=scope)
def walls():
    """Attackers outside and inside, and the executor they are inside of; nothing of it may be left afterwards."""
    if reason := missing_requirement():
        lacking(reason)
    config = own_config()
    before = Leaks(cgroup_of(config.name))
    executor = Blocking(config)
    try:
        both = Walls(executor)
        try:
            yield both
        finally:
            both.close()
    finally:
        executor.close()
    before.check()
    assert not cgroup_of(config.name).exists()


@pytest.fixture
def workspace():
    """A directory of root's that everybody may enter, on a file system that can map owners."""
    with workspace_directory() as path:
        yield path


@pytest.fixture(scope="module")
def oci(tmp_path_factory):
    """``agentrun-oci``, and containers by it."""
    if reason := missing_for_oci():
        lacking(reason)
    made = Oci(tmp_path_factory.mktemp("oci"))
    yield made
    made.clean()
