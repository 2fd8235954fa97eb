# SPDX-License-Identifier: Apache-2.0
"""Applying a session, killed anywhere: every path is old or new, and who applies again, or after a rollback, leaves nothing."""

import inspect
import os
import random
import subprocess
import tempfile
from pathlib import Path

import pytest

from agentrun.session.review import carry_over, look
from agentrun.session.store import Sessions
from tests import changes_lab
from tests.changes_lab import directory, do, essence
from tests.dying import run_to_line

pytestmark = pytest.mark.host
KILLS = int(os.environ.get("AGENTRUN_SESSION_KILLS", "30"))
TREE = [
    ("write", "a", b"1"), ("write", "b", b"2"), ("write", "d/e/f", b"3"), ("write", "d/g", b"4"), ("symlink", "l", "a"),
    ("write", "t", b"5"), ("write", "u/v", b"6"), ("write", "z/y", b"8"),
]  # fmt: skip
FIRST = [("append", "a", b"more"), ("remove", "b"), ("remove", "d"), ("replace", "u", b"file now"), ("chmod", "z", 0o750)]
THEN = [
    ("remove", "l"), ("symlink", "l", "z/y"), ("remove", "t"), ("mkdir", "t"), ("write", "t/in", b"x" * 9000),
    ("write", "new/one", b"1"), ("chmod", "z/y", 0o640),
]  # fmt: skip
TOOL = "\n".join(
    [
        "import contextlib, os, shutil, sys",
        "from pathlib import Path",
        *map(inspect.getsource, (changes_lab.do, changes_lab._do, changes_lab._remove)),
        "do('.', eval(sys.stdin.read()))",
    ]
)


@pytest.fixture(scope="module", autouse=True)  # before the executor looks for it
def store():
    with tempfile.TemporaryDirectory(prefix="agentrun-apply-", dir="/var/tmp") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTRUN_SESSIONS", name)
        yield Sessions()


@pytest.fixture
def place():
    with directory() as path:
        path.chmod(0o755)
        (path / "base").mkdir()
        do(str(path / "base"), TREE)
        subprocess.run(["cp", "-a", path / "base", path / "copy"], check=True)
        yield path


def change(executor, session: str, operations) -> None:
    done = executor.python(TOOL, session=session, stdin=ascii(operations).encode())
    assert (done.exit_code, done.stderr) == (0, b"")


def apply_in_child(store: Sessions, session: str, last_line: int = 0) -> tuple[bool, int]:
    """Apply in a process that kills itself at that line; whether it came to its end, and how many lines it ran."""
    within = ("agentrun/changes/", "agentrun/session/")
    ended, lines, conflicts = run_to_line(lambda: carry_over(store, session)[1].conflicts, within, last_line)
    assert not ended or conflicts == "[]", conflicts
    return ended, lines


def leftovers(base: Path) -> list[str]:
    return [path for path in essence(base) if ".agentrun-" in path]


def restore(store: Sessions, session: str, place: Path) -> None:
    """The directory, which stays the same one, as it was before anything was applied; and the session knows it so."""
    subprocess.run(f"find '{place}/base' -mindepth 1 -delete; cp -a '{place}/copy/.' '{place}/base'", shell=True, check=True)
    with store.alone(session) as found:
        store.end_applying(found, complete=True)


def test_killed_anywhere(executor, store, place):
    rng = random.Random(os.environ.get("AGENTRUN_SEED"))
    base = place / "base"
    session = store.create(workspace=str(base)).id
    store.snapshot(session, "empty")
    change(executor, session, FIRST)
    store.snapshot(session)
    change(executor, session, THEN)
    old = essence(base)
    ended, whole = apply_in_child(store, session)
    new = essence(base)
    assert (ended, "b" in new, "t/in" in new) == (True, False, True)
    kills, points = 0, []
    while kills < KILLS:
        restore(store, session, place)
        fork = store.fork(session).id
        ended = False
        while not ended and (kills == 0 or rng.random() < 0.7):
            points.append(rng.randrange(1, whole + 1))
            ended = apply_in_child(store, fork, points[-1])[0]
            kills += not ended
            for path, entry in essence(base).items():
                assert ".agentrun-" in path or entry in (old.get(path), new.get(path)), (path, points)
        if ended or rng.random() < 0.5:
            assert carry_over(store, fork)[1].complete, points
            assert essence(base) == new, points
        else:  # what it was applied from goes, and is not needed any more
            store.rollback(fork, "empty")
            store.prune()
            assert carry_over(store, fork)[1].complete, points
        assert leftovers(base) == [], points
        assert not list(store.root.glob("sessions/*.begun"))
        store.remove(fork)
    store.remove(session)
    store.prune()
    assert os.listdir(store.root / "layers") == []


def test_the_session_goes_on_before_it_is_applied_again(executor, store, place):
    """What it wrote since is applied, and what the one that was killed had made is not in anybody's way."""
    base = place / "base"
    session = store.create(workspace=str(base)).id
    change(executor, session, FIRST)
    _, whole = apply_in_child(store, session)
    for line in range(whole // 3, whole, whole // 12):
        restore(store, session, place)
        apply_in_child(store, session, line)
        change(executor, session, [("write", "a", b"%d" % line), ("remove", "u"), ("write", "b", b"again")])
        report = carry_over(store, session, force=True)[1]
        if not report.complete:  # of what it found in its way it tells once
            assert all("is kept as" in conflict.reason for conflict in report.conflicts)
            assert carry_over(store, session, force=True)[1].complete
        assert [base.joinpath("a").read_bytes(), base.joinpath("b").read_bytes()] == [b"%d" % line, b"again"]
        assert not base.joinpath("u").exists()
        assert len(leftovers(base)) <= len(report.conflicts)
        assert look(store, session).changes == ()
    store.remove(session)
