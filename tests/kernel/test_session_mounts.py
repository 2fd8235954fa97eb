# SPDX-License-Identifier: Apache-2.0
"""A session is one tree for whoever calls in it, however he does, and no tool takes anything from those who call after it."""

import os
import tempfile
import time
from pathlib import Path

import pytest
import trio

from agentrun import HostError, Policy, UsageError
from agentrun.image.store import Store
from agentrun.policy import Filesystem
from agentrun.session.holds import Busy
from agentrun.session.review import carry_over, look
from agentrun.session.store import Sessions
from tests.image.roots import archive, write_root
from tests.kernel.stores import session_stores
from tests.support import Blocking, eventually, own_config

pytestmark = pytest.mark.host
WAYS = ({}, {"policy": Policy(net="host")}, {"tenant": "another"})
"""Sandboxes of other shapes and tenants have the session mounted otherwise."""


@pytest.fixture(scope="module", autouse=True)  # before the executor looks for them
def here():
    with session_stores() as directory:
        yield directory


@pytest.fixture
def workspace(here):
    with tempfile.TemporaryDirectory(prefix="work-", dir=here) as name:
        Path(name, "project").mkdir()
        yield Path(name, "project")


@pytest.fixture(params=["image", "workspace"])
def session(request, here, workspace):
    store = Sessions()
    made = store.create(image="plain") if request.param == "image" else store.create(workspace=str(workspace))
    yield made, "/srv/" if request.param == "image" else ""
    store.remove(made.id)


def test_what_one_kind_of_call_writes_the_others_see(executor, session):
    """Each looks for all the files before they are there: kernels remember that they were not."""
    made, at = session
    for way in WAYS:
        assert executor.sh(f"cat {at}f0 {at}f1 {at}f2 {at}f3 {at}f4 {at}f5", session=made.id, **way).exit_code == 1
    for number, way in enumerate(WAYS * 2):
        script = f"ls {at}f[0-9] 2>/dev/null | wc -l; test -e {at}f{number} || echo {number} > {at}f{number}; cat {at}f{number}"
        assert executor.text(script, session=made.id, **way).split() == [str(number), str(number)]
        assert all(executor.text(f"cat {at}f{number}", session=made.id, **other) == str(number) for other in WAYS)


def test_another_runtime_sees_it_too(executor, session):
    made, at = session
    config = own_config()
    assert executor.sh(f"cat {at}f", session=made.id).exit_code == 1
    other = Blocking(config)
    try:
        assert other.text(f"echo 1 > {at}f; cat {at}f", session=made.id) == "1"
        assert executor.text(f"cat {at}f; rm {at}f", session=made.id) == "1"
        assert other.sh(f"cat {at}f", session=made.id).exit_code == 1
    finally:
        other.close()


def test_other_kinds_of_calls_do_not_run_at_once(executor, session):
    made, _ = session

    async def both(run):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: run(["sleep", "2"], session=made.id))
            await trio.sleep(0.5)
            assert (await run(["true"], session=made.id)).exit_code == 0, "of the same kind they do"
            with pytest.raises(Busy, match="another policy"):
                await run(["true"], session=made.id, **WAYS[1])

    executor.call(both, executor.executor.run)
    assert executor.sh("true", session=made.id, **WAYS[1]).exit_code == 0


def test_a_kind_waits_for_what_another_has_left_behind(executor, session):
    made, at = session
    for way in WAYS:
        executor.text(f"sleep 100 & echo {at}", session=made.id, **way)


def test_a_mount_is_in_use_until_somebody_else_has_one(here):
    store = Sessions()
    made = store.create(image="plain")
    fd, first = store.hold(made.key)
    again, same = store.hold(made.key, first)
    assert same == first
    for other in ("", "0" * 16):
        with pytest.raises(Busy):
            store.hold(made.key, other)
    os.close(fd)
    os.close(again)
    fd, second = store.hold(made.key, "0" * 16)
    os.close(fd)
    fd, third = store.hold(made.key, first)
    os.close(fd)
    assert len({first, second, third}) == 3
    store.remove(made.id)


def test_no_tool_takes_the_masks_from_the_next(executor, here):
    store = Sessions()
    made = store.create(image="plain")
    executor.text("echo secret > /etc/secret", session=made.id)
    policy = Policy(fs=Filesystem(masked=("/etc/secret",)))
    executor.sh("rm -f /dev/null; mv /dev /gone; rm -rf /dev", session=made.id, policy=policy)
    script = "cat /etc/secret; echo x > /dev/null; test -c /dev/null && echo there"
    assert executor.text(script, session=made.id, policy=policy) == "there"
    store.remove(made.id)


def test_a_call_that_writes_nothing_leaves_nothing(executor, here):
    store = Sessions()
    made = store.create(image="plain")
    assert executor.text("cat /srv/data; cd; pwd; touch x", session=made.id).split() == ["image's", "/home/tool"]
    store.rollback(made.id)
    executor.text("true", session=made.id)
    time.sleep(0.2)  # the next sandboxes are made meanwhile
    assert store.snapshot(made.id)[0].layers == ()
    store.remove(made.id)


@pytest.mark.parametrize("instead", ["link", "directory", "nothing"])
def test_another_directory_is_not_the_workspace(executor, here, workspace, instead):
    """Who can write above a workspace cannot have a session show, or write to, what only its caller may."""
    store = Sessions()
    made = store.create(workspace=str(workspace))
    executor.text("echo new > f", session=made.id)
    workspace.rename(workspace.with_name("moved"))
    other = workspace.with_name("other")
    other.mkdir()
    (other / "secret").write_text("x")
    if instead == "link":
        workspace.symlink_to(other)
    elif instead == "directory":
        other.rename(workspace)
    for look_again in (look, carry_over):
        with pytest.raises(UsageError, match="workspace"):
            look_again(store, made.id)
    with pytest.raises(UsageError, match="workspace"):
        executor.sh("ls", session=made.id, **WAYS[1])
    assert not (workspace / "f").exists()
    store.remove(made.id)


def test_a_layer_that_is_lost_is_told(executor, here):
    store = Sessions()
    made = store.create(image="plain")
    executor.text("touch /x", session=made.id)
    snapped, _ = store.snapshot(made.id)
    store.layer(snapped.layers[0]).rename(here / "lost")
    with pytest.raises(HostError, match=f"session {made.id}: .*No such file"):
        executor.sh("true", session=made.id)
    store.remove(made.id)


def test_more_layers_than_the_kernel_takes(executor, here, tmp_path, monkeypatch):
    """A session above a deep image can have fewer; it is told before there are too many, and its calls go on."""
    depth, most = 120, 379
    write_root(tmp_path / "0")
    for number in range(1, depth):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f"{number}/i{number}").touch()
    deep = archive(tmp_path, "deep", {}, *(tmp_path / str(number) for number in range(depth)))
    Store().import_image(f"docker-archive:{deep}", "deep")
    store = Sessions()
    made = store.create(image="deep")

    def write(name: str) -> None:
        (store.layer(store.get(made.id).upper) / "root/upper" / name).touch()

    for number in range(most):
        write(f"n{number}")
        store.snapshot(made.id)
    assert executor.text("ls -d /i* /n* | wc -l", session=made.id) == str(depth - 1 + most)
    write("last")
    for change in (store.snapshot, store.fork):
        with pytest.raises(UsageError, match=f"session {made.id} has {most} layers above the {depth} of its image, and {most}"):
            change(made.id)
    assert executor.text("ls /last", session=made.id) == "/last"
    monkeypatch.setattr("agentrun.session.store.most_layers", lambda _: 400)
    store.snapshot(made.id)
    with pytest.raises(HostError, match=f"^session {made.id}: .*501 layers, and the kernel takes 500"):
        executor.sh("true", session=made.id)
    store.rollback(made.id, "s1")
    assert executor.text("ls -d /n*", session=made.id) == "/n0"
    store.remove(made.id)


def test_an_images_user_with_the_tools_number(executor, here, tmp_path):
    """What is his he can write to, and what is root's he cannot."""
    write_root(tmp_path / "root", etc__passwd="app:x:1000:1000::/home/app:/bin/sh\n", home__app__own="app's\n")
    for name in ("home/app", "home/app/own"):
        os.chown(tmp_path / "root" / name, 1000, 1000)
    Store().import_image(f"docker-archive:{archive(tmp_path, 'own', {'User': 'app'}, tmp_path / 'root')}", "own")
    store = Sessions()
    made = store.create(image="own")
    assert executor.sh("echo more >> /home/app/own; touch /home/app/new; touch /etc/new", session=made.id).exit_code == 1
    assert executor.text("cat /home/app/own; stat -c %u:%g /home/app/* /etc", session=made.id).split() == [
        "app's", "more", "1000:1000", "1000:1000", "0:0",
    ]  # fmt: skip
    store.remove(made.id)


def test_who_is_killed_removing_one_leaves_no_session_without_its_image(here, tmp_path, monkeypatch):
    write_root(tmp_path / "root", word="here")
    images, store = Store(), Sessions()
    images.import_image(str(tmp_path / "root"), "once")
    made = store.create(image="once")
    images.remove("once")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", die)
    with pytest.raises(KeyboardInterrupt):
        store.remove(made.id)
    monkeypatch.undo()
    assert images.find(store.get(made.id).image).layers
    store.remove(made.id)


def test_a_path_that_cannot_be_written_down(here, workspace):
    odd = os.path.join(str(workspace), os.fsdecode(b"odd\xff"))
    os.mkdir(odd)
    with pytest.raises(UsageError, match="not UTF-8"):
        Sessions().create(workspace=odd)
    assert Sessions().all() == []


def test_nothing_is_kept_for_a_session_that_was_removed(executor, here):
    """An agent that tries many ways has one for each, and calls once."""
    store = Sessions()
    made = [store.create(image="plain") for _ in range(3)]
    pools = executor.executor._fleet._pools

    def kept() -> int:
        return sum(shape.fs.session.startswith(session.id) for _, shape in list(pools) for session in made)

    for session in made:
        executor.text("true", session=session.id)
    assert kept() == 3
    for session in made[1:]:
        store.remove(session.id)
    assert eventually(lambda: kept() == 1), "they are kept"
    assert executor.text("echo still", session=made[0].id) == "still"
    store.remove(made[0].id)


def test_a_session_is_free_as_soon_as_its_call_is_over(executor, here):
    """Also for who changes it from the executor's own loop, where nothing else can happen meanwhile."""
    store = Sessions()
    made = store.create(image="plain")

    async def change_at_once(runner):
        for script, patience in (("sleep 100 & echo x > /x", 30), ("echo y > /y", 30), ("sleep 100", 0.2)):
            with trio.move_on_after(patience):
                await runner.run(["sh", "-c", script], session=made.id)
            begun = time.monotonic()
            runner.sessions.snapshot(made.id)
            assert time.monotonic() - begun < 0.5

    executor.call(change_at_once, executor.executor)
    store.remove(made.id)
