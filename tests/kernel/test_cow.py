# SPDX-License-Identifier: Apache-2.0
"""Copy-on-write workspaces in real calls: the original stays as it is, and what is kept is exactly what the tool did."""

import contextlib
import functools
import inspect
import io
import json
import os
import socket
import stat
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings

from agentrun import PIPE, HostError, UsageError, Workspace, cli
from agentrun.changes.store import Store
from agentrun.overlay import mount_overlay
from tests import changes_lab
from tests.changes_lab import CHANGES, TREES, clone, difference, directory, do, essence, snapshot
from tests.kernel.wall import NOBODY
from tests.requirements import lacking
from tests.support import connect, eventually, exec_frame, open_daemon, read_answer

pytestmark = pytest.mark.host
EXAMPLES = int(os.environ.get("AGENTRUN_EXAMPLES", "25"))
cli.make_parser()  # imports what a child that is another user may not be able to read
TOOL = "\n".join(
    [
        "import contextlib, os, shutil, sys",
        "from pathlib import Path",
        *map(inspect.getsource, (changes_lab.do, changes_lab._do, changes_lab._remove)),
        "do('.', eval(sys.stdin.read()))",
    ]
)
"""What ``changes_lab.do`` does, in a sandbox."""


@pytest.fixture(scope="module", autouse=True)
def store():
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as path:
        before = os.environ.get("AGENTRUN_CHANGES")
        os.environ["AGENTRUN_CHANGES"] = path
        yield Store()
        os.environ.pop("AGENTRUN_CHANGES")
        if before is not None:
            os.environ["AGENTRUN_CHANGES"] = before


@pytest.fixture
def workspace(store):
    with directory() as path:
        os.chmod(path, 0o755)
        yield path
    for name in store.ids():
        store.discard(name, force=True)


def copy(path) -> Workspace:
    return Workspace(str(path), mode="cow")


def run(*words: str):
    """A verb's exit status and what it prints as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main([words[0], "--json", *words[1:]])
    return code, json.loads(out.getvalue() or "null")


def test_rm_rf_leaves_the_original_bit_for_bit(executor, workspace, store):
    do(str(workspace), [("write", f"d{n}/e/f{m}", b"x" * n * m) for n in range(8) for m in range(8)])
    before = snapshot(workspace)
    result = executor.sh("rm -rf * && echo new > new && ls", workspace=copy(workspace))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"new\n", b"")
    assert snapshot(workspace) == before
    assert (result.changes.deleted, result.changes.added) == (len(before) - 1, 1)
    code, shown = run("diff", result.changes.id)
    assert code == 0
    assert {change["path"]: change["kind"] for change in shown["changes"]} == {
        **{path: "deleted" for path in before if path}, "new": "added",
    }  # fmt: skip
    assert json.loads(result.to_json())["changes"]["id"] == result.changes.id
    assert run("apply", result.changes.id)[0] == 0
    assert {path for path in snapshot(workspace) if path} == {"new"}
    assert store.ids() == []


def test_a_call_without_changes_leaves_nothing(executor, workspace, store):
    do(str(workspace), [("write", "a", b"1")])
    result = executor.sh("cat a; : >> a; echo x > b; rm b", workspace=copy(workspace))
    assert (result.stdout, result.changes) == (b"1", None)
    assert os.listdir(store.root) == ["lock"]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(TREES, CHANGES)
def test_what_is_kept_is_the_difference_and_applying_it_gives_the_tools_tree(executor, tree, operations):
    with directory() as path:
        do(str(path), tree)
        before = snapshot(path)
        given = ascii(operations).encode()
        result = executor.python(TOOL, workspace=copy(path), stdin=given, env={"PYTHONIOENCODING": "utf-8:surrogateescape"})
        assert (result.returncode, result.stderr) == (0, b""), result.stderr
        assert snapshot(path) == before
        if result.changes is None:
            return
        opened = Store().open(result.changes.id)
        layers = [clone(f"/proc/self/fd/{opened.upper}/."), clone(path)]
        view = mount_overlay(layers)
        after = snapshot(f"/proc/self/fd/{view}")
        for fd in (*layers, view):
            os.close(fd)
        shown = {os.fsdecode(change.path): change.kind for change in opened.changes.changes}
        opened.close()
        assert shown == difference(before, after)
        assert run("apply", result.changes.id)[0] == 0
        assert essence(path) == {name: entry.essence() for name, entry in after.items()}


def test_what_the_tool_makes_is_the_callers_on_disk(executor, workspace):
    result = executor.sh("mkdir d; echo x > d/f; ln -s f d/l; stat -c %u:%g d/f", workspace=copy(workspace))
    assert result.stdout == b"1000:1000\n"
    run("apply", result.changes.id)
    assert {entry.owner for entry in snapshot(workspace).values()} == {(0, 0)}


def test_files_of_others_are_as_in_a_writable_workspace(executor, workspace):
    do(str(workspace), [("write", "theirs", b"1"), ("write", "open", b"1"), ("chmod", "open", 0o777)])
    os.chown(workspace / "theirs", NOBODY, NOBODY)
    os.chown(workspace / "open", NOBODY, NOBODY)
    result = executor.sh("echo x >> theirs; echo y >> open; rm -f theirs; stat -c %u open", workspace=copy(workspace))
    assert b"theirs: Permission denied" in result.stderr
    run("apply", result.changes.id)
    assert not (workspace / "theirs").exists()
    assert (workspace / "open").read_bytes() == b"1y\n"
    assert os.stat(workspace / "open").st_uid == NOBODY


def test_a_concurrent_edit_is_a_conflict(executor, workspace, store):
    do(str(workspace), [("write", "a", b"1"), ("write", "b", b"1")])

    async def edit_meanwhile():
        script = "echo x >> a; echo x >> b; echo ready; read line"
        async with executor.executor.start(["sh", "-c", script], workspace=copy(workspace), stdin=PIPE) as call:
            await call.stdout.receive_some()
            (workspace / "a").write_bytes(b"theirs")
            await call.stdin.aclose()
            return await call.wait()

    result = executor.call(edit_meanwhile)
    code, answer = run("apply", result.changes.id)
    assert (code, answer["complete"]) == (1, False)
    assert answer["conflicts"] == [{"path": "a", "reason": "was changed while the call ran"}]
    assert ((workspace / "a").read_bytes(), (workspace / "b").read_bytes()) == (b"theirs", b"1")
    assert run("apply", "--force", result.changes.id)[0] == 0
    assert (workspace / "a").read_bytes() == b"1x\n"


def test_a_call_that_was_killed_keeps_its_changes_and_a_cancelled_one_does_not(executor, workspace, store):
    result = executor.sh("echo x > a; sleep 60", workspace=copy(workspace), timeout=0.5)
    assert (result.returncode, result.changes.added) == (124, 1)
    store.discard(result.changes.id)

    async def cancelled():
        with trio.move_on_after(0.5):
            await executor.executor.run(["sh", "-c", "echo x > a; sleep 60"], workspace=copy(workspace))

    executor.call(cancelled)
    assert os.listdir(store.root) == ["lock"]


def test_a_store_on_a_file_system_of_its_own_bounds_it(executor, workspace, monkeypatch):
    """The tool is told that there is no room; what it wrote until then is kept, and the store goes on."""
    with directory() as path:
        image, store = path / "image", path / "store"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        store.mkdir()
        made = subprocess.run(["mkfs.ext4", "-q", image], check=False, capture_output=True)
        if made.returncode or subprocess.run(["mount", "-o", "loop", image, store], check=False).returncode:
            lacking("mkfs.ext4 and loop devices")
        try:
            monkeypatch.setenv("AGENTRUN_CHANGES", str(store))
            result = executor.sh("echo x > first; head -c 200m /dev/zero > big", workspace=copy(workspace))
            assert b"No space left on device" in result.stderr, result
            assert result.changes.added == 2
            assert 16 << 20 < result.changes.bytes < 64 << 20
            with pytest.raises(HostError, match="disk is full; apply or discard some"):
                executor.sh("echo y > second", workspace=copy(workspace))
            assert Store().discard(result.changes.id) == result.changes.id
            result = executor.sh("echo y > second", workspace=copy(workspace))
            assert (result.exit_code, result.changes.added) == (0, 1)
            assert list(Store().verify()) == []
        finally:
            subprocess.run(["umount", store], check=True)


def test_policies_allow_it_where_they_allow_reading(executor, workspace):
    do(str(workspace), [("write", "a", b"1")])
    result = executor.sh("rm a", workspace=copy(workspace), policy="readonly")
    assert (result.returncode, result.changes.deleted) == (0, 1)
    assert (workspace / "a").exists()
    with pytest.raises(UsageError, match=r"read-only .say :ro, or :cow to change a copy"):
        executor.sh("true", workspace=str(workspace), policy="readonly")


def test_the_tool_cannot_make_what_overlay_means_something_by(executor, workspace):
    do(str(workspace), [("write", "a/b", b"1")])
    script = (
        "mknod a/w c 0 0; mkdir o; setfattr -n trusted.overlay.opaque -v y o 2>/dev/null || echo no; chmod u+s a/b; ls -l a/b"
    )
    result = executor.sh(script, workspace=copy(workspace))
    assert b"a/w: Operation not permitted" in result.stderr or b"Permission denied" in result.stderr
    opened = Store().open(result.changes.id)
    shown = {change.path: change.kind for change in opened.changes.changes}
    assert shown == {b"o": "added"}
    assert not stat.S_IMODE(opened.changes.changes[0].new.mode) & 0o6000
    opened.close()


# ---------------------------------------------------------------- another user, and the daemon


def as_user(function, *args):
    """What a function gives, as JSON, in a process that is NOBODY."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([100])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(write, json.dumps(function(*args)).encode())
        except BaseException:  # noqa: BLE001 - it is not ours to handle: this process is a copy of the tests'
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    try:
        return json.loads(said)
    except ValueError:
        raise AssertionError(said) from None


def call(path: str, script: str, workspace: str):
    """A call in a copy of a directory, by whoever we are."""
    fd = os.open(workspace, os.O_PATH | os.O_DIRECTORY)
    argv = [b"sh", b"-c", script.encode()]
    frame = exec_frame(*argv, options={"capture": "1", "workspace": "cow"}, fds=["workspace"])
    with connect(path) as sock:
        socket.send_fds(sock, [frame], [fd])
        os.close(fd)
        return json.loads(read_answer(sock)["json"])


@pytest.fixture(scope="module")
def shared(store):
    with open_daemon("--group", "users") as daemon:
        yield daemon


def test_a_user_applies_with_his_own_rights(shared, workspace, store, monkeypatch):
    monkeypatch.setenv("AGENTRUN_SOCKET", shared.socket)
    do(
        str(workspace),
        [("write", "mine/a", b"1"), ("write", "mine/b", b"2"), ("write", "mine/d/e", b"3"), ("write", "roots", b"4")],
    )
    for path in ("mine", "mine/a", "mine/b", "mine/d", "mine/d/e"):
        os.chown(workspace / path, NOBODY, NOBODY)
    script = "echo x >> a; rm b; rm -r d; mkdir -p n/m; echo y > n/m/o; chmod 400 n/m/o; ln -s /etc l"
    before = snapshot(workspace)
    result = as_user(call, shared.socket, script, str(workspace / "mine"))
    assert result["exit_code"] == 0, result
    name = result["changes"]["id"]
    assert snapshot(workspace) == before
    assert [row["id"] for row in as_user(run, "changes")[1]] == [name]
    kinds = {change["path"]: change["kind"] for change in as_user(run, "diff", name)[1]["changes"]}
    assert kinds == {
        "a": "modified", **dict.fromkeys(["b", "d", "d/e"], "deleted"), **dict.fromkeys(["n", "n/m", "n/m/o", "l"], "added"),
    }  # fmt: skip
    assert as_user(run, "apply", name)[0] == 0
    assert (workspace / "mine/a").read_bytes() == b"1x\n"
    assert {entry.owner for path, entry in snapshot(workspace).items() if path.startswith("mine")} == {(NOBODY, NOBODY)}
    assert as_user(run, "changes")[1] == []
    assert store.ids() == []


def test_a_user_cannot_apply_where_he_may_not_write_nor_see_what_is_not_his(shared, workspace, monkeypatch):
    monkeypatch.setenv("AGENTRUN_SOCKET", shared.socket)
    do(str(workspace), [("write", "a", b"1"), ("mkdir", "d")])
    for path in ("a", "d"):
        os.chown(workspace / path, NOBODY, NOBODY)
    roots = call(shared.socket, "echo x > b", str(workspace))["changes"]["id"]
    assert as_user(run, "changes")[1] == []
    for verb in ("diff", "apply", "discard"):
        assert as_user(cli.main, [verb, roots]) == 2
    # The directory was his when the call ran, and is not any more.
    his = as_user(call, shared.socket, "echo x > d/new", str(workspace))["changes"]["id"]
    os.chown(workspace / "d", 0, 0)
    assert as_user(cli.main, ["apply", his]) == 125
    assert os.listdir(workspace / "d") == []
    os.chown(workspace / "d", NOBODY, NOBODY)
    assert as_user(cli.main, ["apply", his]) == 0
    assert (workspace / "d/new").read_bytes() == b"x\n"


def test_who_was_handed_a_change_set_can_change_nothing_of_it(shared, workspace, store):
    os.chown(workspace, NOBODY, NOBODY)
    name = as_user(call, shared.socket, "echo x > f", str(workspace))["changes"]["id"]

    def attack():
        from agentrun.changes.client import _Remote

        opened = _Remote(shared.socket).open(name, take=True)
        said = []
        for attempt in (
            lambda: os.open("f", os.O_WRONLY, dir_fd=opened.upper),
            lambda: os.unlink("f", dir_fd=opened.upper),
            lambda: os.chmod(f"/proc/self/fd/{opened.upper}", 0o777),
            lambda: os.write(opened.lock, b"x"),
            lambda: os.open(f"{store.root}/{name}/manifest", os.O_RDONLY),
        ):
            try:
                attempt()
                said.append("done")
            except OSError as error:
                said.append(error.strerror)
        above = os.stat("..", dir_fd=opened.upper), os.fstat(opened.upper)
        return [*said, above[0].st_ino == above[1].st_ino]

    assert as_user(attack) == [*["Read-only file system"] * 3, "Bad file descriptor", "Permission denied", True]
    eventually(lambda: store.discard(name, force=True))


def test_two_users_calls_at_once_share_the_original(executor, workspace):
    do(str(workspace), [("write", "a", b"1")])

    async def both():
        results = []

        async def one(tenant):
            argv = ["sh", "-c", "echo $0 > a; sleep 0.2; cat a", tenant]
            results.append(await executor.executor.run(argv, tenant=tenant, workspace=copy(workspace)))

        async with trio.open_nursery() as nursery:
            for tenant in ("one", "two"):
                nursery.start_soon(functools.partial(one, tenant))
        return results

    results = executor.call(both)
    assert sorted(result.stdout for result in results) == [b"one\n", b"two\n"]
    assert Path(workspace / "a").read_bytes() == b"1"


def test_a_path_that_cannot_be_written_down_is_refused_before_the_call(executor, workspace, store):
    odd = os.path.join(str(workspace), os.fsdecode(b"odd\xff"))
    os.mkdir(odd)
    assert executor.sh("pwd; touch made", workspace=odd).exit_code == 0
    with pytest.raises(UsageError, match="not UTF-8"):
        executor.sh("true", workspace=copy(odd))
    assert store.ids() == []
