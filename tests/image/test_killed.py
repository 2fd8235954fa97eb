# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random points of imports and of prune: whenever it comes, the store verifies, and nothing half-there is used.

AGENTRUN_TEST_KILLS is how often (100). What is killed is a process group: the importer and the zstd that works for it.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from agentrun.image.shelf import full_name
from agentrun.image.store import Store
from tests.image.big import write_tar
from tests.requirements import lacking

KILLS = int(os.environ.get("AGENTRUN_TEST_KILLS", "100"))
FILES, SIZE = 400, 6 << 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same image as what takes different ways into the store: a directory, a gzip, a zstd, and a tar that is plain."""
    if os.geteuid() != 0:
        lacking("not root")
    if not shutil.which("zstd") or not shutil.which("busybox"):
        lacking("zstd or busybox is not installed")
    where = tmp_path_factory.mktemp("killed")
    plain = where / "plain.tar"
    write_tar(plain, FILES, SIZE)
    for command in (["zstd", "-q", "-1", plain, "-o", where / "zstd.tar"], ["gzip", "-1k", plain]):
        subprocess.run([str(word) for word in command], check=True)
    (where / "tree").mkdir()
    subprocess.run(["tar", "-xf", plain, "-C", where / "tree"], check=True)
    yield [str(where / name) for name in ("plain.tar", "zstd.tar", "plain.tar.gz", "tree")]
    shutil.rmtree(where)


def started(action) -> int:
    """Run something in a process group of its own; the process."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            action()
            os._exit(0)
        os._exit(1)
    with contextlib.suppress(PermissionError):
        os.setpgid(pid, pid)
    return pid


def killed_after(action, seconds: float) -> bool:
    """Kill it then; False if it had come to its end."""
    pid = started(action)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    wait_until_gone(pid)
    return status != 0


def wait_until_gone(group: int) -> None:
    """Its zstd holds what it inherited, as the store promises, and dies of the same signal, but when it likes."""
    deadline = time.monotonic() + 30
    while members(group):
        assert time.monotonic() < deadline, f"process group {group} is still there"
        time.sleep(0.001)


def members(group: int) -> list[str]:
    """Processes of a group, but for those that are dead and wait for whoever inherited them to take note."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                found.append(path.parent.name)
    return found


def is_whole(store: Store, kept: str) -> None:
    """What was there is there, what was coming is there as a whole or not at all, and nothing is left over."""
    assert store.verify() == []
    assert list(store.root.glob("tmp/*")) == list(store.root.glob("locks/*")) == list(store.root.glob("**/.*.new")) == []
    store.find(kept)
    for image, _, _ in store.images():
        with store.lease(image.id) as lease:
            for tree in lease.layers:
                assert len(list(tree.glob("usr/lib/large/*"))) == 24


def test_import(tmp_path, sources):
    store = Store(tmp_path / "store")
    store.import_image(sources[0], "kept")
    rng = random.Random(5)
    took = []
    for source in sources:
        begun = time.monotonic()
        fresh = Store(tmp_path / "fresh")
        fresh.import_image(source, "new")
        took.append(time.monotonic() - begun)
        shutil.rmtree(fresh.root)
    dead = done = 0
    while dead < KILLS and done < 4 * KILLS:
        number = done % len(sources)
        done += 1
        dead += killed_after(lambda number=number: store.import_image(sources[number], "new"), rng.uniform(0, took[number]))
        is_whole(store, "kept")
        if done % 10 == 0:  # the survivors go, so that there is something to build
            with contextlib.suppress(Exception):
                store.remove("new")
            store.prune()
    assert dead == KILLS
    for source in sources:
        store.import_image(source, "new")
    is_whole(store, "new")


def test_prune(tmp_path, sources):
    """Images without a name, layers that no image needs, one of them in use all the time, and an image that stays."""
    store, other = Store(tmp_path / "store"), Store(tmp_path / "other")
    store.import_image(sources[0], "kept")
    for number in range(5):
        write_tar(tmp_path / "some.tar", 60 + number, 300_000)
        other.import_image(str(tmp_path / "some.tar"), f"image-{number}")
    store.import_image(str(tmp_path / "some.tar"), "leased")
    rng = random.Random(6)
    with store.lease("leased") as lease:
        store.remove("leased")
        took = []
        for _ in range(3):
            fill(store, other)
            begun = time.monotonic()
            assert len(store.prune().layers) == 4
            took.append(time.monotonic() - begun)
        dead = done = 0
        while dead < KILLS and done < 10 * KILLS:
            fill(store, other)
            done += 1
            dead += killed_after(store.prune, rng.uniform(0, sorted(took)[1]))
            is_whole(store, "kept")
            assert all(len(list(tree.glob("usr/lib/large/*"))) == 24 for tree in lease.layers), "it is in use"
    assert dead == KILLS
    assert len(store.prune().layers) >= 1
    assert [names for _, names, _ in store.images()] == [(full_name("kept"),)]
    assert len(list(store.root.glob("layers/*"))) == 1


def fill(store: Store, other: Store) -> None:
    """Put into a store what it was left with by others, once more: layers, and images that have lost their names."""
    for kind in ("layers", "images"):
        for path in (other.root / kind).iterdir():
            if not (there := store.root / kind / path.name).exists():
                subprocess.run(["cp", "-a", path, tmp := store.root / f"{kind}.coming"], check=True)
                tmp.rename(there)
