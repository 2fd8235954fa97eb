# SPDX-License-Identifier: Apache-2.0
"""Who takes long with one session keeps nobody from the others, and from that one only who would disturb him."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from agentrun import UsageError
from agentrun.session.review import carry_over, look
from agentrun.session.store import Sessions
from tests.kernel.stores import session_stores

pytestmark = pytest.mark.host
PATIENCE = 20
"""Seconds for what takes one at most."""

AT_WORK = """
import sys, time
from agentrun.session import review
from agentrun.session.store import Sessions

def wait(*_):
    print("ready", flush=True)
    time.sleep(120)

def scan(*given, scan=review.scan, **more):
    wait(scan(*given, **more))

store, what, session = Sessions(), *sys.argv[1:]
if what == "apply":
    review.carry_over(store, session, step=lambda what, done, total: what == "applying" and done > 0.7 * total and wait())
else:
    review.scan = scan
    review.look(store, session)
"""


@pytest.fixture(scope="module", autouse=True)  # before the executor looks for them
def here():
    with session_stores() as directory:
        yield directory


@pytest.fixture
def session(executor, here):
    """One with a snapshot, and with files that its directory has not; and that directory."""
    with tempfile.TemporaryDirectory(prefix="work-", dir=here) as name:
        store = Sessions()
        made = store.create(image="plain", workspace=name)
        store.snapshot(made.id, "before")
        executor.text("for n in 0 1 2 3 4 5 6 7; do echo $n > f$n; done", session=made.id)
        yield made.id, Path(name)
        store.remove(made.id)


@contextlib.contextmanager
def at_work(what: str, session: str):
    """Somebody who is in the middle of it, and then is killed."""
    with subprocess.Popen([sys.executable, "-c", AT_WORK, what, session], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def cli(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "agentrun.cli", "session", *words],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == code, done
    return done.stdout.strip() if code == 0 else done.stderr


@pytest.mark.parametrize("what", ["diff", "apply"])
def test_the_others_go_on(executor, session, what):
    name, _ = session
    with at_work(what, name):
        other = cli("create", "--image", "plain")
        assert executor.text("echo x > /x; cat /x", session=other) == "x"
        assert cli("snapshot", other) == "s1"
        fork = cli("fork", other)
        cli("rollback", other)
        from_snapshot = cli("fork", name, "before")  # it does not change, whatever becomes of the session
        for each in (other, fork, from_snapshot):
            cli("rm", each)
    assert executor.text("ls", session=name).split() == [f"f{n}" for n in range(8)]


@pytest.mark.parametrize("what", ["diff", "apply"])
def test_that_one_waits_and_is_free_as_soon_as_who_has_it_is_killed(executor, session, what):
    name, _ = session
    with at_work(what, name):
        for change in (("rollback", name), ("rm", name), ("fork", name), ("snapshot", name), ("diff", name), ("apply", name)):
            said = cli(*change, code=2)
            assert said == f"agentrun: session {name}: it is being changed, compared or applied; try again when that is over\n"
        with pytest.raises(UsageError, match=f"session {name}: it is being changed, compared or applied"):
            executor.sh("true", session=name)
    assert executor.text("echo free", session=name) == "free"
    cli("rm", cli("fork", name))


def test_killed_in_the_middle_of_applying(session):
    name, directory = session
    with at_work("apply", name):
        pass
    assert 0 < len(list(directory.glob("f?"))) < 8
    assert {change.path for change in look(Sessions(), name).changes} < {b"", *(b"f%d" % n for n in range(8))}
    _, report = carry_over(Sessions(), name)
    assert report.complete
    assert sorted(path.name for path in directory.iterdir()) == [f"f{n}" for n in range(8)]
