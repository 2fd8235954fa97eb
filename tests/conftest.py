# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the host lane. A test marked ``host`` is skipped where it cannot run; under CI that is a failure."""

import signal

import pytest

from tests.requirements import lacking
from tests.support import Blocking, Leaks, cgroup_of, missing_requirement, open_daemon, own_config


def pytest_configure() -> None:
    """Behind ``&`` in a script, or under nohup, signals are ignored: by us, and so by the tools that are to die of them."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("host") and (reason := missing_requirement()):
        lacking(f"this machine cannot run the host tests: {reason}")


@pytest.fixture(scope="module")
def executor():
    """An executor that is called without ``await``; when the file is done, nothing of it may be left."""
    if reason := missing_requirement():
        lacking(reason)
    config = own_config()
    before = Leaks(cgroup_of(config.name))
    blocking = Blocking(config)
    yield blocking
    blocking.close()
    before.check()
    assert not cgroup_of(config.name).exists()


@pytest.fixture(scope="module")
def daemon():
    """A private daemon for the file; see ``support.Daemon``."""
    if reason := missing_requirement():
        lacking(reason)
    with open_daemon() as running:
        yield running
