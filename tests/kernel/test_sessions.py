# SPDX-License-Identifier: Apache-2.0
"""Sessions: what a call writes is there for the next, and nowhere else; snapshots, forks and rollbacks, also when killed."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from agentrun import HostError, Policy, UsageError
from agentrun.image.store import Store
from agentrun.policy import Filesystem
from agentrun.session.store import Sessions
from tests.image.roots import write_root
from tests.kernel.stores import session_stores
from tests.support import open_daemon

pytestmark = pytest.mark.host
KILLS = int(os.environ.get("AGENTRUN_SESSION_KILLS", "30"))


@pytest.fixture(scope="module", autouse=True)  # before the executor looks for them
def home():
    with session_stores() as directory:
        yield directory


@pytest.fixture
def workspace(home):
    with tempfile.TemporaryDirectory(prefix="work-", dir=home) as name:
        Path(name, "kept").write_text("as it was\n")
        Path(name, "sub").mkdir()
        Path(name, "sub/file").write_text("below\n")
        yield Path(name)


@pytest.fixture(scope="module")
def store(home):
    return Sessions()


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (info.st_ino, info.st_mode, info.st_uid, info.st_mtime_ns, content)
    return found


def test_what_is_written_stays(executor, store, workspace):
    session = store.create(image="plain", workspace=str(workspace))
    before = tree(workspace)
    script = "pwd; echo r > /etc/mine; rm /srv/data; echo w > made; rm -rf sub; echo more >> kept; echo t > /tmp/t; echo h > ~/h"
    assert executor.text(script, session=session.id) == str(workspace)
    seen = executor.text("cat /etc/mine made kept /tmp/t ~/h; ls; test -e /srv/data || echo gone", session=session.id)
    assert seen.split("\n") == ["r", "w", "as it was", "more", "t", "h", "kept", "made", "gone"]
    assert tree(workspace) == before
    assert executor.text("cat /srv/data", image="plain") == "image's"
    store.remove(session.id)


def test_each_call_has_its_own_processes(executor, store):
    session = store.create(image="plain")
    executor.text("sleep 100 & echo started", session=session.id)
    assert executor.text("ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm", session=session.id).split("\n")[1] != "sleep"
    store.remove(session.id)


def test_only_the_workspace_is_kept_with_the_hosts_root(executor, store, workspace):
    session = store.create(workspace=str(workspace))
    before = tree(workspace)
    assert executor.text("pwd; echo x > new; echo y > /tmp/y; git init -q repo && ls", session=session.id).split("\n") == [
        str(workspace), "kept", "new", "repo", "sub",
    ]  # fmt: skip
    assert executor.text("cat new; cat /tmp/y /usr/x 2>/dev/null || echo no", session=session.id) == "x\nno"
    assert tree(workspace) == before
    store.remove(session.id)


@pytest.mark.parametrize("image", ["host", "plain"])
@pytest.mark.parametrize("top", ["/tmp", "/home", "/root", "/mnt", "/var/tmp", "/opt", "/srv"])
def test_a_workspace_may_be_anywhere(executor, store, image, top):
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir=top) as name:
        Path(name, "f").write_text("x\n")
        session = store.create(image=image, workspace=name)
        assert executor.text("cat f; pwd; echo y > g", session=session.id) == f"x\n{name}"
        assert executor.text("cat g", session=session.id) == "y"
        assert os.listdir(name) == ["f"]
        store.remove(session.id)


def test_snapshot_rollback_and_fork(executor, store, workspace):
    session = store.create(image="plain", workspace=str(workspace))
    write = "echo {0} > /state; echo {0} > state"
    read = "cat /state state"
    executor.text(write.format("one"), session=session.id)
    _, first = store.snapshot(session.id)
    executor.text(write.format("two") + "; rm kept", session=session.id)
    _, second = store.snapshot(session.id, "second")
    assert (first, second) == ("s1", "second")
    executor.text(write.format("three"), session=session.id)
    fork = store.fork(session.id)
    old = store.fork(session.id, "s1")
    executor.text(write.format("forked"), session=fork.id)
    assert executor.text(read, session=session.id) == "three\nthree"
    assert executor.text(read, session=fork.id) == "forked\nforked"
    assert executor.text(read + " kept", session=old.id) == "one\none\nas it was"
    store.rollback(session.id)
    assert executor.text(read + "; test -e kept || echo gone", session=session.id) == "two\ntwo\ngone"
    store.rollback(session.id, "s1")
    assert executor.text(read + " kept", session=session.id) == "one\none\nas it was"
    store.rollback(session.id, "second")
    assert executor.text(read, session=session.id) == "two\ntwo"
    assert store.get(fork.id).parent == session.id
    for each in (session, fork, old):
        store.remove(each.id)
    store.prune()
    assert os.listdir(store.root / "layers") == []


def test_directories_replaced_across_layers(executor, store, workspace):
    session = store.create(image="plain", workspace=str(workspace))
    executor.text("rm -rf sub /srv; mkdir sub /srv; echo 1 > sub/one", session=session.id)
    store.snapshot(session.id)
    executor.text("rm -rf sub; mkdir sub; echo 2 > sub/two; mv sub moved; mkdir sub", session=session.id)
    store.snapshot(session.id)
    assert executor.text("ls sub moved /srv", session=session.id).split() == ["/srv:", "moved:", "two", "sub:"]
    store.remove(session.id)


def test_many_layers(executor, store):
    session = store.create(image="plain")
    for number in range(40):
        executor.text(f"echo {number} > /n{number}", session=session.id)
        store.snapshot(session.id)
    assert executor.text("cat /n0 /n39; ls -d /n* | wc -l", session=session.id) == "0\n39\n40"
    store.remove(session.id)


def test_calls_at_once_share_it(executor, store):
    session = store.create(image="plain")

    async def both(run):
        import trio

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(lambda n=number: run(["sh", "-c", f"echo {n} > /made-{n}; sleep 0.1"], session=session.id))

    executor.call(both, executor.executor.run)
    assert executor.text("ls -d /made-* | wc -l", session=session.id) == "8"
    store.remove(session.id)


def test_it_is_not_changed_under_a_call(store, home):
    session = store.create(image="plain")
    with open_daemon() as daemon:
        script = "echo up > /up; echo ready; sleep 30"
        with daemon.popen(
            "--session", session.id, "--", "sh", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            assert running.stdout.readline() == b"ready\n"
            for change in (store.rollback, store.remove, store.snapshot, store.fork):
                with pytest.raises(UsageError, match="calls run in it"):
                    change(session.id)
            running.kill()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                store.rollback(session.id)
                break
            except UsageError:
                time.sleep(0.05)
        done = daemon.exec("--session", session.id, "--", "sh", "-c", "test -e /up || echo back")
        assert done.stdout == b"back\n", done
    store.remove(session.id)


def test_its_image_is_not_pruned(executor, store, home, tmp_path):
    write_root(tmp_path / "root", word="here")
    images = Store()
    images.import_image(str(tmp_path / "root"), "soon-gone")
    session = store.create(image="soon-gone")
    images.remove("soon-gone")
    images.prune()
    fork = store.fork(session.id)
    store.remove(session.id)
    images.prune()
    assert executor.text("cat /word", session=fork.id) == "here"
    store.remove(fork.id)
    assert not [name for _, names, _ in images.images() for name in names if name.startswith("agentrun-session/")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"session": "0" * 12}, "no session 000000000000"),
        ({"session": "../x"}, "not the id"),
        ({"session": ""}, "not the id"),
        ({"session": 5}, "not the id"),
    ],
)
def test_no_such_session(executor, options, said):
    with pytest.raises(UsageError, match=said):
        executor.sh("true", **options)


def test_what_goes_with_it(executor, store, workspace):
    session = store.create(workspace=str(workspace))
    for options in ({"image": "plain"}, {"workspace": str(workspace)}):
        with pytest.raises(UsageError, match="of its own"):
            executor.sh("true", session=session.id, **options)
    with pytest.raises(UsageError, match="allows none"):
        executor.sh("true", session=session.id, policy=Policy(fs=Filesystem(workspace="none")))
    store.remove(session.id)


def test_what_cannot_be_one(store, workspace):
    for options, said in (
        ({}, "nothing to keep"),
        ({"image": "nobody"}, "no image"),
        ({"workspace": "/etc"}, "system directory"),
    ):
        with pytest.raises(UsageError, match=said):
            store.create(**options)
    session = store.create(workspace=str(workspace))
    with pytest.raises(UsageError, match="no snapshot"):
        store.rollback(session.id, "never")
    store.snapshot(session.id, "a")
    for name in ("a", "../b", "x" * 64):
        with pytest.raises(UsageError, match="snapshot"):
            store.snapshot(session.id, name)
    store.remove(session.id)
    assert (store.all(), store.prune() >= 0) == ([], True)


def test_the_workspace_is_looked_at_and_applied(executor, store, workspace):
    workspace.chmod(0o750)
    session = store.create(image="plain", workspace=str(workspace))
    executor.text("echo 1 > new; rm -r sub; echo more >> kept", session=session.id)
    store.snapshot(session.id)
    executor.text("echo 2 > new; mkdir sub; echo x > sub/other; chmod 600 kept", session=session.id)
    found = {row["path"]: row["kind"] for row in json.loads(cli("diff", session.id, "--json"))["changes"]}
    assert found.items() >= {"kept": "modified", "new": "added", "sub/file": "deleted", "sub/other": "added"}.items()
    assert found.keys() <= {"kept", "new", "sub", "sub/file", "sub/other"}, "the directory may be another one"
    assert "A  new" in cli("diff", session.id)
    (workspace / "kept").write_text("by somebody else\n")
    assert "kept" in cli("apply", session.id, code=1)
    assert sorted(os.listdir(workspace)) == ["kept", "sub"]
    cli("apply", "--force", session.id)
    assert (workspace / "kept").read_text() == "as it was\nmore\n"
    assert (workspace / "new").read_text() == "2\n"
    assert os.listdir(workspace / "sub") == ["other"]
    assert "0 changes" in cli("diff", session.id)
    executor.text("echo 3 > new", session=session.id)
    cli("apply", session.id)
    assert (workspace / "new").read_text() == "3\n"
    assert stat.S_IMODE(workspace.stat().st_mode) == 0o750
    store.remove(session.id)


def cli(*words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "agentrun.cli", "session", *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    return done.stdout.strip() if code == 0 else done.stderr


def test_on_the_command_line(home, workspace):
    with open_daemon() as daemon:
        session = cli("create", "--image", "plain", "--workspace", str(workspace))
        assert daemon.exec("--session", session, "--", "sh", "-c", "echo 1 > /n; pwd").stdout.decode().strip() == str(workspace)
        assert cli("snapshot", session) == "s1"
        assert daemon.exec("--session", session, "--", "sh", "-c", "echo 2 > /n").returncode == 0
        fork = cli("fork", session)
        cli("rollback", session)
        assert daemon.exec("--session", session, "--", "cat", "/n").stdout == b"1\n"
        assert daemon.exec("--session", fork, "--", "cat", "/n").stdout == b"2\n"
        assert [row["id"] for row in json.loads(cli("ls", "--json"))] == [session, fork]
        assert session in cli("ls")
        assert "s1, of 1 layers" in cli("show", session)
        assert daemon.exec("--session", "0" * 12, "--", "true").returncode == 2
        cli("rm", session)
        cli("rm", fork)
        assert "no session" in cli("rm", fork, code=2)


STORM = """
import random, sys
from agentrun import UsageError
from agentrun.session.review import carry_over, look
from agentrun.session.store import Sessions
rng, store = random.Random(int(sys.argv[1])), Sessions()
while True:
    known = store.all()
    try:
        match rng.randrange(8):
            case 0: store.create(image="plain", workspace=sys.argv[2])
            case 1: store.snapshot(rng.choice(known).id)
            case 2: store.fork(rng.choice(known).id)
            case 3: store.rollback(rng.choice(known).id)
            case 4: store.prune()
            case 5 if len(known) > 4: store.remove(rng.choice(known).id)
            case 6: look(store, rng.choice(known).id)
            case 7: carry_over(store, rng.choice(known).id)
        for path in (store.root / "layers").glob("*/root/upper"):
            if rng.random() < 0.2: (path / f"f{rng.randrange(100)}").touch()
    except (UsageError, IndexError, FileNotFoundError): pass
"""


def test_killed_at_any_moment(executor, store, workspace):
    """kill -9 of two who change sessions, the same ones: all are whole afterwards, and nothing is left of what is none."""
    rng = random.Random(7)
    for number in range(0, KILLS, 2):
        words = [[sys.executable, "-c", STORM, str(number + other), str(workspace)] for other in range(2)]
        processes = [subprocess.Popen(each, stderr=subprocess.PIPE) for each in words]
        time.sleep(0.35 + rng.random() * 0.3)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            _, stderr = process.communicate()
            assert process.returncode == -signal.SIGKILL, stderr
        for session in store.all():
            for layer in (*session.layers, session.upper, *(name for below in session.snapshots.values() for name in below)):
                assert (store.layer(layer) / "root/work").is_dir(), (session, layer)
    for session in store.all()[:3]:
        assert executor.text("echo works", session=session.id) == "works"
    for session in store.all():
        store.remove(session.id)
    store.prune()
    assert os.listdir(store.root / "layers") == os.listdir(store.root / "tmp") == os.listdir(store.root / "sessions") == []
    assert not [name for _, names, _ in Store().images() for name in names if name.startswith("agentrun-session/")]


def test_a_store_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="AGENTRUN_SESSIONS"):
        Sessions(tmp_path / "file/below")
