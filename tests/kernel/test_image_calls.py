# SPDX-License-Identifier: Apache-2.0
"""Calls whose root is an image: what they see, who they are, what they may write; nothing is copied, nothing changes owner."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from agentrun import HostError, Policy, UsageError
from agentrun.image.store import Store
from agentrun.imageview import view
from agentrun.policy import Bind, Filesystem, Process
from tests.image import big
from tests.image.roots import archive, write_root
from tests.support import open_daemon, result_of

pytestmark = pytest.mark.host


@pytest.fixture(scope="module", autouse=True)  # before the executor looks for them
def store():
    """A store with images; ``AGENTRUN_IMAGES`` names it."""
    with tempfile.TemporaryDirectory(prefix="agentrun-images-", dir="/var/tmp") as name:
        here = Path(name)
        store = Store(here / "store")
        write_root(here / "plain", etc__secret="root's\n", srv__data="image's\n", root___profile="x")
        (here / "plain/etc/secret").chmod(0o600)
        (here / "plain/opt").mkdir()
        store.import_image(str(here / "plain"), "plain")
        write_root(here / "lower", a="lower\n", gone="x", dir__old="x")
        upper = here / "upper"
        (upper / "dir").mkdir(parents=True)
        for path in ("a", "dir/new"):
            (upper / path).write_text("upper\n")
        (upper / ".wh.gone").touch()
        (upper / "dir/.wh..wh..opq").touch()
        config = {
            "Env": ["PATH=/bin", "COLOUR=blue"],
            "WorkingDir": "/made/here",
            "User": "app",
            "Entrypoint": ["/bin/env", "ENTERED=1"],
        }
        store.import_image(f"docker-archive:{archive(here, 'two', config, here / 'lower', upper)}", "two")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AGENTRUN_IMAGES", str(store.root))
            yield store


def inodes(root: Path) -> dict[str, tuple[int, ...]]:
    """Owner, mode, size and identity of everything below a directory."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        found[str(path)] = (info.st_ino, info.st_uid, info.st_gid, info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return found


def test_the_root_is_the_image(executor):
    assert executor.text("cat /srv/data; test -e /usr || echo none", image="plain") == "image's\nnone"


def test_it_is_read_only_but_for_what_is_the_calls_own(executor):
    script = "for f in / /etc /bin /srv /proc/sys /run /tmp /home/tool /dev/shm; do touch $f/x 2>/dev/null && echo $f; done"
    assert executor.text(script, image="plain").split() == ["/tmp", "/home/tool", "/dev/shm"]
    assert executor.text("ls /tmp /home/tool /dev/shm", image="plain").split() == ["/dev/shm:", "/home/tool:", "/tmp:"]


def test_a_scratch_root_can_be_written_to(executor, store):
    before = inodes(store.root / "layers")
    policy = Policy(fs=Filesystem(image="plain", root="scratch"), scratch_size=8 << 20)
    script = "rm -r /srv; mkdir /srv; echo x > /etc/passwd; touch /x /tmp/y ~/z; chmod 700 /bin; ls / | wc -l; cat /srv/data"
    for _ in range(2):
        done = executor.sh(script, policy=policy)
        assert (done.exit_code, done.stderr) == (1, b"cat: can't open '/srv/data': No such file or directory\n")
    full = executor.sh("dd if=/dev/zero of=/big bs=1M count=20; ls -l /big", policy=policy)
    assert b"No space left" in full.stderr, full
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as name:
        assert executor.text("pwd; echo out > f", policy=policy, workspace=name) == name
        assert Path(name, "f").read_text() == "out\n"
    assert inodes(store.root / "layers") == before
    with pytest.raises(UsageError, match=r"fs\.root"):
        executor.sh("true", policy=Policy(fs=Filesystem(root="scratch")))


def test_the_images_root_is_the_tool_and_no_tool_is_root(executor):
    text = executor.text(
        "id -u; id -g; stat -c %u:%g /etc/secret /bin/busybox /etc /; cat /etc/secret; grep 1000 /etc/passwd", image="plain"
    )
    assert text.split("\n") == [
        "1000",
        "1000",
        *["1000:1000"] * 4,
        "root's",
        "tool:x:1000:1000:agentrun tool call:/home/tool:/bin/sh",
    ]


@pytest.mark.parametrize("user", ["1000", "app", "1000:1000", "app:app"])
def test_an_image_whose_user_has_the_tools_number(executor, store, tmp_path, user):
    """Nothing changes places: what is that user's is the tool's, and what is root's is root's."""
    import_with_own_user(store, tmp_path, user, group="root:x:0:\napp:x:1000:\n")
    done = executor.sh("id; echo $USER; stat -c %u:%g /etc/secret ~app/own; cat ~app/own /etc/secret", image="own")
    assert done.stdout.decode().split("\n")[:-1] == [
        "uid=1000(app) gid=1000(app) groups=1000(app)", "app", "0:0", "1000:1000", "app's",
    ]  # fmt: skip
    assert b"Permission denied" in done.stderr
    policy = Policy(fs=Filesystem(image="own", root="scratch"))
    done = executor.sh("echo more >> ~app/own; cat ~app/own; touch ~app/new; ls ~app; touch /etc/new", policy=policy)
    assert (done.stdout, done.exit_code) == (b"app's\nmore\nnew\nown\n", 1)


@pytest.mark.parametrize(("user", "ids"), [("app", "1000 1000 1000 1001"), ("1000:0", "1000 1000 1000"), ("0", "1000 1000 1000")])
def test_no_group_of_a_tool_is_root(executor, store, tmp_path, user, ids):
    """Where the image says so it has another number inside, and what is that group's is the tool's all the same."""
    import_with_own_user(store, tmp_path, user, group="root:x:0:app\napp:x:1000:\n")
    (tmp_path / "root/etc/secret").chmod(0o640)
    store.import_image(f"docker-archive:{archive(tmp_path, 'own', {'User': user}, tmp_path / 'root')}", "own")
    assert executor.text("echo $(id -u; id -g; id -G); cat /etc/secret", image="own") == f"{ids}\nroot's"


def import_with_own_user(store, directory: Path, user: str, group: str) -> None:
    """An image ``own``, with a user app who is 1000 and has a home with a file, and a file of root's; both are nobody else's."""
    root = directory / "root"
    accounts = "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"
    write_root(root, etc__passwd=accounts, etc__group=group, etc__secret="root's\n", home__app__own="app's\n")
    for name in ("home/app/own", "etc/secret"):
        (root / name).chmod(0o600)
    for name in ("home/app", "home/app/own"):
        os.chown(root / name, 1000, 1000)
    store.import_image(f"docker-archive:{archive(directory, 'own', {'User': user}, root)}", "own")


def test_another_user_does_not_read_what_is_roots(executor):
    policy = Policy(fs=Filesystem(image="plain"), process=Process(uid=1234, gid=1234))
    done = executor.sh("id -u; stat -c %u /etc/secret; cat /etc/secret", policy=policy)
    assert (done.stdout, done.exit_code) == (b"1234\n0\n", 1)


def test_config_is_applied_as_docker_run_does(executor):
    text = executor.text("env | grep -e ^COLOUR -e ^PATH -e ^ENTERED -e ^USER | sort; pwd; id", image="two")
    assert text.split("\n") == [
        "COLOUR=blue",
        "ENTERED=1",
        "PATH=/bin",
        "USER=app",
        "/made/here",
        "uid=33(app) gid=44(app) groups=44(app),55(more)",
    ]
    assert executor.text("echo $COLOUR; pwd", image="two", env={"COLOUR": "red"}, cwd="/bin") == "red\n/bin"


def test_layers_are_one_tree(executor):
    assert executor.text("cat /a; ls /dir; test -e /gone || echo gone", image="two") == "upper\nnew\ngone"


def occupied(directory):
    """Bytes of disk below it; the whole file system's would be everybody's."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def test_nothing_is_copied_and_no_owner_changes(executor, store):
    before, used = inodes(store.root / "layers"), occupied(store.root)
    owners = [
        executor.text("stat -c %u /bin/busybox; cat /proc/self/uid_map", image="plain", tenant=tenant)
        for tenant in ("one", "two")
    ]
    assert owners[0] != owners[1], "two tenants have the same ids"
    assert all(text.startswith("1000\n") for text in owners)
    assert inodes(store.root / "layers") == before
    assert occupied(store.root) - used < 1 << 20


@pytest.mark.parametrize("top", ["/root", "/home", "/tmp", "/opt", "/mnt", "/var/tmp"])
def test_a_workspace_has_a_place(executor, top):
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir=top) as name:
        assert executor.text("pwd; echo out > f", image="plain", workspace=name) == name
        assert Path(name, "f").read_text() == "out\n"
        assert Path(name, "f").stat().st_uid == os.geteuid()


def test_a_workspace_hides_nothing_of_the_image(executor):
    where = tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/srv")
    with where as name, pytest.raises(HostError, match="cannot be in this image"):
        executor.sh("true", image="plain", workspace=name)
    assert executor.text("cat /srv/data", image="plain") == "image's"


def test_binds_are_shown_in_it(executor, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "f").write_text("bound\n")
    binds = (Bind(str(tmp_path), "/srv/data2"), Bind(str(tmp_path / "f"), "/etc/secret"), Bind(str(tmp_path), "/new/place"))
    policy = Policy(fs=Filesystem(image="plain", binds=binds))
    assert (
        executor.text("cat /srv/data /srv/data2/f /etc/secret /new/place/f", policy=policy)
        == "image's\n" + "bound\n" * 2 + "bound"
    )


def test_binds_are_laid_over_our_own_files(executor, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "f").write_text("bound\n")
    binds = tuple(Bind(str(tmp_path / "f"), f"/etc/{name}") for name in ("hosts", "passwd"))
    assert executor.text("cat /etc/hosts /etc/passwd", policy=Policy(fs=Filesystem(image="plain", binds=binds))) == "bound\nbound"


def test_a_bind_does_not_get_lost_behind_a_link(executor, store, tmp_path):
    """A mount is attached from outside, where a link of the image leads somewhere else."""
    write_root(tmp_path / "root", data__inside__f="image's")
    (tmp_path / "root/linked").symlink_to("/data")
    store.import_image(str(tmp_path / "root"), "linked")
    (tmp_path / "shown").mkdir()
    policy = Policy(fs=Filesystem(image="linked", binds=(Bind(str(tmp_path / "shown"), "/linked/inside"),)))
    with pytest.raises(HostError, match="/linked is not a directory"):
        executor.sh("ls /linked/inside", policy=policy)


def test_a_name_means_what_it_means_now(executor, store, tmp_path):
    for word in ("first", "second"):
        write_root(tmp_path / word, word=word)
        store.import_image(str(tmp_path / word), "moving")
        assert executor.text("cat /word", image="moving") == word


def test_an_image_in_use_is_not_pruned(executor, store, tmp_path):
    write_root(tmp_path / "root", word="here")
    image, _ = store.import_image(str(tmp_path / "root"), "held")
    assert executor.text("cat /word", image="held") == "here"
    store.remove("held")
    assert not set(image.layers) & set(store.prune().layers)
    with pytest.raises(UsageError, match='no image "held"'):
        executor.sh("true", image="held")
    assert executor.text("echo still", image="plain") == "still"


@pytest.mark.parametrize("image", ["nobody", "", 5, "a b"])
def test_no_such_image(executor, image):
    with pytest.raises(UsageError, match="image"):
        executor.sh("true", image=image)


def test_a_user_that_is_none(executor, store, tmp_path):
    write_root(tmp_path / "root")
    path = archive(tmp_path, "strange", {"User": "nobody-here"}, tmp_path / "root")
    store.import_image(f"docker-archive:{path}", "strange")
    with pytest.raises(UsageError, match='no user "nobody-here"'):
        executor.sh("true", image="strange")


@pytest.mark.parametrize("user", ["9" * 5000, "\u0663", "70000", "app:" + "9" * 5000])
def test_a_user_that_no_number_is(executor, store, tmp_path, user):
    write_root(tmp_path / "root")
    store.import_image(f"docker-archive:{archive(tmp_path, 'number', {'User': user}, tmp_path / 'root')}", "number")
    with pytest.raises(UsageError, match="image: ") as refused:
        executor.sh("true", image="number")
    assert len(str(refused.value)) < 300


def test_accounts_with_numbers_that_are_none_are_nobodys(executor, store, tmp_path):
    write_root(tmp_path / "root", etc__passwd="big:x:" + "9" * 5000 + ":0::/:/bin/sh\napp:x:33:44::/:/bin/sh\n")
    for user in ("app", "big"):
        store.import_image(f"docker-archive:{archive(tmp_path, user, {'User': user}, tmp_path / 'root')}", f"id-{user}")
    assert executor.text("id -u", image="id-app") == "33"
    with pytest.raises(UsageError, match='no user "big"'):
        executor.sh("true", image="id-big")


def test_accounts_that_are_no_file(executor, store, tmp_path):
    write_root(tmp_path / "root")
    (tmp_path / "root/etc/passwd").unlink()
    (tmp_path / "root/etc/passwd").mkdir()
    store.import_image(str(tmp_path / "root"), "no-accounts")
    assert executor.text("id -un", image="no-accounts") == "tool"
    with store.lease("no-accounts") as lease, view(lease.layers) as files:
        assert files.read("/etc/passwd") == b""
    with os.scandir("/proc/self/fd") as entries:
        paths = [os.readlink(entry.path) for entry in entries if os.path.lexists(entry.path)]
    assert not [path for path in paths if path.endswith("/etc/passwd")]


@pytest.mark.parametrize(
    "workdir", ["/srv/current", "/srv/./current/", "/home/app/x", "/tmp/build/here", "/var/tmp/b", "//opt/new", "/home/tool/x"]
)
def test_where_programs_start(executor, store, tmp_path, workdir):
    """Through the image's links, and made where it is not there, in what is the call's own as well; owned by the image's root."""
    write_root(tmp_path / "root", srv__v1__here="x", var__tmp__x="x")
    (tmp_path / "root/srv/current").symlink_to("v1")
    store.import_image(f"docker-archive:{archive(tmp_path, 'start', {'WorkingDir': workdir}, tmp_path / 'root')}", "start")
    said = executor.text("pwd -P; stat -c %u .", image="start").split()
    policy = Policy(fs=Filesystem(image="start"), process=Process(uid=1234, gid=1234))
    assert executor.text("echo x > ~/file; stat -c %u .", policy=policy) == "0"
    assert said == [os.path.normpath(workdir).replace("//", "/").replace("current", "v1"), "1000"]


def test_host_is_the_hosts_own(executor):
    policy = Policy(fs=Filesystem(image="plain"))
    assert executor.text("test -e /srv/data || echo host", policy=policy, image="host") == "host"


def test_on_the_command_line(store):
    with open_daemon() as daemon:
        done = result_of(daemon.exec("--json", "--image", "plain", "--", "cat", "/srv/data"))
        assert done["stdout"] == "image's\n"
        assert daemon.exec("--image", "nobody", "--", "true").returncode == 2
        assert b'no image "nobody"' in daemon.exec("--image", "nobody", "--", "true").stderr


def test_a_big_image_is_there_at_once(executor, store, tmp_path_factory):
    """A gigabyte in 20,000 files. How long its first call takes, the bench says; here nothing may be copied."""
    with tempfile.TemporaryDirectory(prefix="agentrun-big-", dir="/var/tmp") as name:
        made = big.write_tar(Path(name, "big.tar"))
        assert made.files >= 20_000
        assert made.size >= 1 << 30
        store.import_image(str(Path(name, "big.tar")), "big")
    layers = store.root / "layers"
    before, used = inodes(layers), occupied(store.root)
    for tenant in ("one", "two"):
        begun = time.perf_counter()
        assert (
            executor.text("find /usr/lib/parts -name '*.dat' | head -30000 | wc -l; id -u", image="big", tenant=tenant)
            == "20000\n1000"
        )
        print(f"first call of tenant {tenant}: {(time.perf_counter() - begun) * 1000:.1f} ms")
    assert inodes(layers) == before
    assert occupied(store.root) - used < 1 << 20
