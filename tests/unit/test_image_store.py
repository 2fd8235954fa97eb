# SPDX-License-Identifier: Apache-2.0
"""The image store: every kind of source, names, leases, what is removed and what not, what verify sees, many at once, kill -9."""

import contextlib
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from agentrun.cli import main
from agentrun.errors import HostError, UsageError
from agentrun.image import locks
from agentrun.image import store as store_module
from agentrun.image.config import parse_config
from agentrun.image.limits import ArchiveError, Limits
from agentrun.image.oci import machine
from agentrun.image.shelf import default_root, full_name
from agentrun.image.store import Store
from tests.requirements import lacking

ROOT = os.geteuid() == 0
CONFIG = {
    "architecture": machine(),
    "os": "linux",
    "config": {
        "Env": ["PATH=/bin", "A=b=c"],
        "WorkingDir": "/srv",
        "User": "app:app",
        "Entrypoint": ["/bin/run"],
        "Cmd": ["--help"],
        "Labels": {"k": "v"},
    },
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size, info.mode = len(content), 0o755
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


LAYERS = [
    tar({"bin/": b"", "bin/run": b"#!/bin/sh\n", "etc/": b"", "etc/os": b"one"}),
    tar({"etc/": b"", "etc/os": b"two", "etc/.wh.x": b""}),
]


class Layout:
    """An OCI layout; ``spoil`` may change a blob after its digest was taken."""

    def __init__(
        self, path: Path, layers: list[bytes] = LAYERS, spoil: Callable[[str, bytes], bytes] = lambda _, data: data
    ) -> None:
        self.path = path
        self.spoil = spoil
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self.layers = layers
        self.entries: list[dict[str, object]] = []

    def blob(self, what: str, data: bytes, kind: str) -> dict[str, object]:
        (self.path / "blobs/sha256" / sha(data)).write_bytes(self.spoil(what, data))
        return {"mediaType": kind, "digest": f"sha256:{sha(data)}", "size": len(data)}

    def image(
        self, kind: str = "oci", config: dict[str, object] | None = None, compress: Callable[[bytes], bytes] = gzip.compress
    ) -> dict:
        document = {
            **(config or CONFIG),
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha(data)}" for data in self.layers]},
        }
        types = {
            "oci": ("oci.image.config.v1+json", "oci.image.layer.v1.tar+gzip", "oci.image.manifest.v1+json"),
            "docker": (
                "docker.container.image.v1+json",
                "docker.image.rootfs.diff.tar.gzip",
                "docker.distribution.manifest.v2+json",
            ),
        }[kind]
        manifest = {
            "schemaVersion": 2,
            "config": self.blob("config", json.dumps(document).encode(), f"application/vnd.{types[0]}"),
            "layers": [self.blob("layer", compress(data), f"application/vnd.{types[1]}") for data in self.layers],
        }
        return self.blob("manifest", json.dumps(manifest).encode(), f"application/vnd.{types[2]}")

    def index(self, *entries: dict[str, object]) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
        return self.path


def layout(path: Path, **more: object) -> Path:
    made = Layout(path)
    return made.index(made.image(**more))


def pack(directory: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for inner in sorted(directory.rglob("*")):
            archive.add(inner, str(inner.relative_to(directory)), recursive=False)
    return path


def saved(path: Path, tags: list[str], *, legacy: bool = True, layers: list[bytes] = LAYERS) -> Path:
    """As `docker save` writes it, or used to: the second of two equal layers is a link."""
    document = json.dumps({**CONFIG, "rootfs": {"diff_ids": [f"sha256:{sha(data)}" for data in layers]}}).encode()
    files = {f"{sha(document)}.json": document}
    links = {}
    names = []
    for number, data in enumerate(layers):
        names.append(f"{number:064x}/layer.tar" if legacy else f"{sha(data)}.tar")
        if legacy and data in layers[:number]:
            links[names[-1]] = f"../{layers.index(data):064x}/layer.tar"
        else:
            files[names[-1]] = data
    files["manifest.json"] = json.dumps([{"Config": f"{sha(document)}.json", "RepoTags": tags, "Layers": names}]).encode()
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def is_right(store: Store, name: str) -> None:
    """The image of ``LAYERS`` and ``CONFIG``."""
    with store.lease(name) as lease:
        assert [(tree / "etc/os").read_bytes() for tree in lease.layers] == [b"one", b"two"]
        assert (lease.layers[0] / "bin/run").read_bytes() == b"#!/bin/sh\n"
        assert stat.S_ISCHR((lease.layers[1] / "etc/x").lstat().st_mode)
        config = lease.config
    assert (config.env, config.workdir, config.user) == (("PATH=/bin", "A=b=c"), "/srv", "app:app")
    assert (config.command(), config.command(("a",))) == (("/bin/run", "--help"), ("/bin/run", "a"))
    assert (config.labels, config.os, config.architecture) == ({"k": "v"}, "linux", machine())
    assert store.verify() == []


# ---------------------------------------------------------------- sources


def test_a_directory(store, tmp_path):
    root = tmp_path / "my root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/a").write_bytes(b"program")
    (root / "bin/a").chmod(0o4711)
    os.link(root / "bin/a", root / "bin/b")
    os.setxattr(root / "bin/a", "user.x", b"1")
    (root / "l").symlink_to("/bin/a")
    (root / ".wh.name").write_bytes(b"only in archives is this a whiteout")
    with (root / "holes").open("wb") as file:
        file.truncate(5 << 20)
        file.seek(1 << 20)
        file.write(b"data")
    os.utime(root / "bin", (5, 5))
    if ROOT:
        os.chown(root / "holes", 12, 34)
    image, names = store.import_image(str(root))
    assert names == ("my-root:latest",)
    assert store.verify() == []
    with store.lease("my-root") as lease:
        [tree] = lease.layers
        assert lease.config.workdir == "/"
    found = (tree / "bin/a").stat()
    assert (found.st_ino, stat.S_IMODE(found.st_mode)) == ((tree / "bin/b").stat().st_ino, 0o4711)
    assert found.st_ino != (root / "bin/a").stat().st_ino
    assert os.getxattr(tree / "bin/a", "user.x") == b"1"
    assert os.readlink(tree / "l") == "/bin/a"
    assert (tree / "bin").stat().st_mtime == 5
    assert (tree / ".wh.name").is_file()
    assert (tree / "holes").read_bytes() == (root / "holes").read_bytes()
    assert (tree / "holes").stat().st_blocks < 100
    assert not ROOT or ((tree / "holes").stat().st_uid, (tree / "holes").stat().st_gid) == (12, 34)
    assert store.import_image(f"dir:{root}", "other")[0].id == image.id, "the same directory is another image"


@pytest.mark.parametrize("kind", ["FIFO", "socket", "whiteout", "overlay"])
def test_a_directory_with_what_no_image_has(store, tmp_path, kind):
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    if kind == "FIFO":
        os.mkfifo(root / "d/x")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(root / "d/x"))
    elif kind == "whiteout":
        os.mknod(root / "d/x", stat.S_IFCHR, 0)
    else:
        (root / "d/x").mkdir()
        os.setxattr(root / "d/x", "user.overlay.redirect", b"/etc")
    with pytest.raises(ArchiveError) as caught:
        store.import_image(str(root))
    assert caught.value.entry == "d/x"
    assert store.images() == []
    if kind != "overlay":
        store.import_image(str(root), "r", Limits(skip_special=True))
        assert store.layer(store.find("r").layers[0]).entries == 2


def test_a_store_inside_the_directory(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(UsageError, match="the image store is in it"):
        store.import_image(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tar(store, tmp_path, suffix):
    path = tmp_path / f"base-1.2.tar{suffix}"
    path.write_bytes(gzip.compress(LAYERS[0]) if suffix else LAYERS[0])
    image, names = store.import_image(str(path))
    assert names == ("base-1.2:latest",)
    assert image.config.diff_ids == (f"sha256:{sha(LAYERS[0])}",)
    assert image.layers == (sha(LAYERS[0]),), "a layer is called by its diff id"
    assert store.verify() == []


@pytest.mark.parametrize("kind", ["oci", "docker"])
@pytest.mark.parametrize("form", ["directory", "tar", "tar.gz", "explicit"])
def test_an_oci_layout(store, tmp_path, kind, form):
    path = layout(tmp_path / "layout", kind=kind)
    reference = str(path)
    if form.startswith("tar"):
        reference = str(pack(path, tmp_path / "layout.tar", "w:gz" if form == "tar.gz" else "w"))
    elif form == "explicit":
        reference = f"oci-archive:{pack(path, tmp_path / 'layout.tar')}"
    _, names = store.import_image(reference)
    assert names == ("layout:latest",)
    is_right(store, "layout")


def test_zstd_layers(store, tmp_path):
    if not shutil.which("zstd"):
        lacking("zstd is not installed")
    import subprocess

    def zstd(data: bytes) -> bytes:
        return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout

    store.import_image(str(layout(tmp_path / "layout", compress=zstd)), "z")
    is_right(store, "z")


def test_zstd_without_the_program(store, tmp_path, monkeypatch):
    path = layout(tmp_path / "layout", compress=lambda data: b"\x28\xb5\x2f\xfd" + data)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get install zstd"):
        store.import_image(str(path))
    assert list(store.root.glob("tmp/*")) == []


@pytest.mark.parametrize("legacy", [True, False])
def test_a_docker_archive(store, tmp_path, legacy):
    path = saved(tmp_path / "s.tar", ["example.org/app:1"], legacy=legacy)
    assert store.import_image(str(path))[1] == ("example.org/app:1",)
    is_right(store, "example.org/app:1")
    assert store.import_image(f"docker-archive:{path}:example.org/app:1", "again")[1] == ("again:latest",)
    with pytest.raises(UsageError, match="no such image"):
        store.import_image(f"docker-archive:{path}:other:1")


def test_a_docker_archive_with_a_layer_twice(store, tmp_path):
    path = saved(tmp_path / "s.tar", ["a:1"], layers=[LAYERS[0], LAYERS[1], LAYERS[0]])
    store.import_image(str(path))
    with store.lease("a:1") as lease:
        assert len(lease.layers) == 3
        assert lease.layers[0] == lease.layers[2]


def test_the_image_for_this_machine(store, tmp_path):
    made = Layout(tmp_path / "layout")
    mine = {**made.image(), "platform": {"os": "linux", "architecture": machine()}}
    other = {**made.image(config={"architecture": "vax"}), "platform": {"os": "linux", "architecture": "vax"}}
    attestation = {**made.image(config={}), "platform": {"os": "unknown", "architecture": "unknown"}}
    nested = made.blob(
        "index", json.dumps({"manifests": [other, mine, attestation]}).encode(), "application/vnd.oci.image.index.v1+json"
    )
    store.import_image(str(made.index(nested)))
    is_right(store, "layout")
    with pytest.raises(UsageError, match=r"0 images in it are for linux/.*linux/vax, linux/vax"):
        store.import_image(str(made.index(other, other)))


def test_a_tag_of_a_layout(store, tmp_path):
    made = Layout(tmp_path / "layout")
    entries = [
        {**made.image(config={**CONFIG, "created": tag}), "annotations": {"org.opencontainers.image.ref.name": tag}}
        for tag in ("a", "b")
    ]
    path = made.index(*entries)
    assert store.import_image(f"oci:{path}:b")[1] == ("layout:b",)
    assert '"created": "b"' in store.find("layout:b").document
    with pytest.raises(UsageError, match=r"no image \"c\" in it \(known: a, b\)"):
        store.import_image(f"oci:{path}:c")
    with pytest.raises(UsageError, match="tags: a, b"):
        store.import_image(f"oci:{path}")


@pytest.mark.parametrize("what", ["config", "manifest", "layer"])
def test_a_blob_that_is_not_what_its_digest_says(store, tmp_path, what):
    made = Layout(
        tmp_path / "layout",
        spoil=lambda kind, data: data.replace(b"one", b"onE").replace(b"sha", b"SHA") if kind == what else data,
    )
    with pytest.raises(ArchiveError) as caught:
        store.import_image(str(made.index(made.image(compress=bytes))))
    assert "digest mismatch" in caught.value.reason
    assert "blobs/sha256/" in caught.value.entry
    assert_empty(store)


@pytest.mark.parametrize("what", ["config", "manifest", "layer"])
@pytest.mark.parametrize("how", ["shorter", "longer", "missing"])
def test_a_blob_that_is_not_all_there(store, tmp_path, what, how):
    made = Layout(
        tmp_path / "layout", spoil=lambda kind, data: data if kind != what else data[:-1] if how == "shorter" else data + b"x"
    )
    entry = made.image()
    if how == "missing":
        for path in (made.path / "blobs/sha256").iterdir():
            if sha(path.read_bytes()) != path.name:
                path.unlink()
    with pytest.raises(ArchiveError, match="is missing" if how == "missing" else "should have") as caught:
        store.import_image(str(made.index(entry)))
    assert "sha256:" in caught.value.entry
    assert_empty(store)


def assert_empty(store: Store) -> None:
    assert [path for place in ("layers", "images", "tmp", "locks") for path in (store.root / place).iterdir()] == []
    assert not (store.root / "names.json").exists()


def spoilt(change: Callable[[dict], None], which: str) -> Callable[[Path], Path]:
    """A layout whose manifest or config was changed before its digest was taken."""

    def make(path: Path) -> Path:
        made = Layout(path)
        inner = made.blob

        def blob(what: str, data: bytes, kind: str) -> dict[str, object]:
            document = json.loads(data) if what == which else None
            if document is not None:
                change(document)
            return inner(what, data if document is None else json.dumps(document).encode(), kind)

        made.blob = blob
        return made.index(made.image())

    return make


SPOILT = {
    "a layer of no known kind": (spoilt(lambda m: m["layers"][0].update(mediaType="application/x"), "manifest"), "of a kind"),
    "an encrypted layer": (
        spoilt(lambda m: m["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "manifest"),
        "of a kind that is not known",
    ),
    "a config that is none": (spoilt(lambda m: m["config"].update(mediaType="application/x"), "manifest"), "is no image"),
    "schema 1": (spoilt(lambda m: m.update(schemaVersion=1), "manifest"), "only 2 is known"),
    "a digest that leads elsewhere": (
        spoilt(lambda m: m["layers"][0].update(digest="sha256:../../../../etc/passwd"), "manifest"), "not a digest",
    ),
    "a digest of another kind": (spoilt(lambda m: m["layers"][0].update(digest="md5:" + "0" * 32), "manifest"), "not a digest"),
    "too few layers": (spoilt(lambda m: m["layers"].pop(), "manifest"), "of 2 layers, and the manifest has 1"),
    "a diff id that is none": (spoilt(lambda c: c["rootfs"].update(diff_ids=["../x", "y"]), "config"), "diff_ids"),
    "a diff id of something else": (
        spoilt(lambda c: c["rootfs"].update(diff_ids=["sha256:" + "0" * 64] * 2), "config"), "digest mismatch",
    ),
    "layers in another order": (spoilt(lambda c: c["rootfs"]["diff_ids"].reverse(), "config"), "digest mismatch"),
    "an environment that is none": (spoilt(lambda c: c["config"].update(Env=["A"]), "config"), "NAME=value"),
    "a directory that is none": (spoilt(lambda c: c["config"].update(WorkingDir="/a/../.."), "config"), "WorkingDir"),
    "a NUL": (spoilt(lambda c: c["config"].update(Cmd=["a\0"]), "config"), "NUL"),
    "a command that is a number": (spoilt(lambda c: c["config"].update(Cmd=7), "config"), "not an image config"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_an_image_that_contradicts_itself(store, tmp_path, name):
    make, words = SPOILT[name]
    path = make(tmp_path / "layout")
    with pytest.raises(ArchiveError, match=words):
        store.import_image(str(path))
    assert_empty(store)


def test_the_second_layer_is_refused(store, tmp_path):
    """Then there is no image; the first layer is there, whole, and goes with the next prune."""
    layers = [LAYERS[0], tar({"../x": b""})]
    made = Layout(tmp_path / "layout", layers)
    with pytest.raises(ArchiveError, match=r"\.\./x"):
        store.import_image(str(made.index(made.image())))
    assert store.images() == []
    assert store.verify() == []
    assert store.prune().layers == (sha(LAYERS[0]),)
    assert_empty(store)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("/nowhere", "No such file"), ("oci:/nowhere", "No such file"), ("tar:/", "not a file"), ("a\0b", "null"),
        ("dir:/etc/passwd", "not a directory"), ("oci:/etc/passwd", "not a directory"), ("oci:/usr", "index.json"),
        ("docker-archive:/etc/passwd", "^/etc/passwd: "), ("/etc/passwd", "^/etc/passwd: "), ("/dev/null", "not a plain file"),
    ],
)  # fmt: skip
def test_what_is_no_source(store, reference, words):
    with pytest.raises((UsageError, ArchiveError), match=words) as caught:
        store.import_image(reference, "x")
    assert str(caught.value).isprintable()
    assert list(store.root.glob("tmp/*")) == []


# ---------------------------------------------------------------- skopeo


def fake_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A program in its place, which writes down how it was called."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/skopeo"
    remember = f"open({str(tmp_path / 'called')!r}, 'w').write('\\n'.join(sys.argv[1:]))"
    program.write_text(f"#!{sys.executable} -IS\nimport os, shutil, sys, time\n{remember}\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "called"


def test_a_registry(store, tmp_path, monkeypatch):
    path = layout(tmp_path / "layout")
    called = fake_skopeo(tmp_path, monkeypatch, f"shutil.copytree({str(path)!r}, sys.argv[-1][4:].rpartition(':')[0])")
    _, names = store.import_image("docker://registry:5000/app:1", insecure=True)
    assert names == ("registry:5000/app:1",)
    is_right(store, "registry:5000/app:1")
    words = called.read_text().split("\n")
    assert words[:-1] == ["copy", "--quiet", "--src-tls-verify=false", "--", "docker://registry:5000/app:1"]
    assert words[-1].startswith(f"oci:{store.root}/tmp/")
    assert list(store.root.glob("tmp/*")) == []
    store.import_image("containers-storage:localhost/app")
    assert called.read_text().split("\n")[:-1] == ["copy", "--quiet", "--", "containers-storage:localhost/app"]
    is_right(store, "localhost/app")


def test_a_registry_that_says_no(store, tmp_path, monkeypatch):
    fake_skopeo(tmp_path, monkeypatch, "sys.exit('FATA[0000] unauthorized:\\x1b[31m go away')")
    with pytest.raises(HostError, match=r"skopeo copy failed: FATA.* unauthorized.* go away") as caught:
        store.import_image("docker://registry/app")
    assert str(caught.value).isprintable()
    assert_empty(store)


def test_skopeo_is_not_there(store, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get install skopeo"):
        store.import_image("docker://registry/app")
    assert_empty(store)


def test_skopeo_outlives_us(store, tmp_path, monkeypatch):
    """It still writes when we were killed: its directory is left alone until it has ended."""
    fake_skopeo(tmp_path, monkeypatch, "open('/proc/self/fd/3/mark', 'w').close()\ntime.sleep(0.6)")
    child = in_child(lambda: store.import_image("docker://registry/app"))
    wait_until(lambda: list(store.root.glob("tmp/*/mark")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store.prune()
    assert list(store.root.glob("tmp/*/mark"))
    time.sleep(0.8)
    store.prune()
    assert_empty(store)


# ---------------------------------------------------------------- names, leases, removal


def test_where_the_store_is(monkeypatch):
    assert default_root({"AGENTRUN_IMAGES": "/x"}) == Path("/x")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root({"HOME": "/h"}) == Path("/var/lib/agentrun/images")
    monkeypatch.setattr(os, "geteuid", lambda: 5)
    assert default_root({"HOME": "/h"}) == Path("/h/.local/share/agentrun/images")
    assert default_root({"HOME": "/h", "XDG_DATA_HOME": "/d"}) == Path("/d/agentrun/images")
    with pytest.raises(UsageError, match="AGENTRUN_IMAGES"):
        default_root({})


def test_a_store_of_somebody_else(tmp_path):
    if not ROOT:
        lacking("not root")
    (tmp_path / "s").mkdir()
    os.chown(tmp_path / "s", 5, 5)
    with pytest.raises(HostError, match="belongs to user 5"):
        Store(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("a", "a:latest"),
        ("a:1", "a:1"),
        ("h:5000/a", "h:5000/a:latest"),
        ("h:5000/a:1", "h:5000/a:1"),
        ("A/b.c_d-e", "A/b.c_d-e:latest"),
    ],
)
def test_a_name(name, full):
    assert full_name(name) == full


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "/a", "é", "a\0", "x" * 300, "../x"])
def test_a_name_that_is_none(store, tmp_path, name):
    with pytest.raises(UsageError, match="is not a name"):
        store.import_image(str(layout(tmp_path / "layout")), name)
    assert_empty(store)


def test_names_and_ids(store, tmp_path):
    path = str(layout(tmp_path / "layout"))
    image, _ = store.import_image(path, "one")
    store.import_image(path, "two:2")
    for name in ("one", "one:latest", "two:2", image.id, image.id[:20], image.id[7:19]):
        assert store.find(name) == store.find("one")
    for name in ("two", "three", image.id[7:12], "sha256:" + "0" * 64):
        with pytest.raises(UsageError, match=r"known: one:latest, two:2"):
            store.find(name)
    [(_, names, size)] = store.images()
    assert (names, size) == (("one:latest", "two:2"), 10 + 3 + 3)


def test_a_whole_id_means_its_image_whatever_is_called_so(store, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    one, _ = store.import_image(str(tmp_path / "one"), "one")
    two, _ = store.import_image(str(tmp_path / "two"), one.id)
    assert store.find(one.id).id == one.id
    assert store.find(two.id).id == two.id
    store.remove(one.id)
    assert store.names() == {one.id: two.id}


def test_a_name_moves(store, tmp_path):
    first, _ = store.import_image(str(layout(tmp_path / "1")), "a")
    second, _ = store.import_image(str(layout(tmp_path / "2", config={**CONFIG, "created": "x"})), "a")
    assert store.find("a") == second
    assert [(image, names) for image, names, _ in store.images()] == [(second, ("a:latest",)), (first, ())]
    pruned = store.prune()
    assert (pruned.images, pruned.layers) == ((first.id,), ()), "their layers are the same"
    is_right(store, "a")


def test_layers_are_shared_and_removed_last(store, tmp_path):
    one = Layout(tmp_path / "1", [LAYERS[0]])
    two = Layout(tmp_path / "2", LAYERS)
    store.import_image(str(one.index(one.image())), "one")
    before = (store.root / "layers" / sha(LAYERS[0])).stat().st_ino
    store.import_image(str(two.index(two.image())), "two")
    assert (store.root / "layers" / sha(LAYERS[0])).stat().st_ino == before
    store.remove("one")
    assert store.prune().layers == ()
    is_right(store, "two")
    assert store.remove("two")[1] == ("two:latest",)
    assert sorted(store.prune().layers) == sorted(map(sha, LAYERS))
    (store.root / "names.json").unlink()
    assert_empty(store)


def test_removing_a_name_leaves_the_others(store, tmp_path):
    path = str(layout(tmp_path / "layout"))
    for name in ("a", "b", "c"):
        image, _ = store.import_image(path, name)
    assert store.remove("a") == (image.id, ("a:latest",))
    assert store.find("b").id == image.id
    assert store.remove(image.id) == (image.id, ("b:latest", "c:latest"))
    assert store.images() == []
    with pytest.raises(UsageError, match="known: none"):
        store.remove("a")


def test_a_lease_keeps_layers(store, tmp_path):
    store.import_image(str(layout(tmp_path / "layout")), "a")
    lease, again = store.lease("a"), store.lease("a")
    store.remove("a")
    for one in (lease, again):
        assert store.prune().layers == ()
        assert (one.layers[0] / "etc/os").read_bytes() == b"one"
        one.close()
    assert len(store.prune().layers) == 2
    assert len(os.listdir("/proc/self/fd")) < 100


def test_a_lease_ends_with_its_process(store, tmp_path):
    store.import_image(str(layout(tmp_path / "layout")), "a")
    ready, tell = os.pipe()

    def hold() -> None:
        _kept = store.lease("a")
        os.write(tell, b"x")
        time.sleep(60)

    child = in_child(hold)
    os.read(ready, 1)
    store.remove("a")
    assert store.prune().layers == ()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(store.prune().layers) == 2
    os.close(ready)
    os.close(tell)


# ---------------------------------------------------------------- verify


def change_byte(tree: Path) -> None:
    found = (tree / "bin/run").stat()
    with (tree / "bin/run").open("r+b") as file:
        file.write(b"!")
    os.utime(tree / "bin/run", ns=(found.st_atime_ns, found.st_mtime_ns))


def replace_by_link(tree: Path) -> None:
    (tree / "etc/os").unlink()
    (tree / "etc/os").symlink_to("/etc/passwd")


DAMAGE = {
    "a byte": (change_byte, "bin/run", "other content"),
    "a mode": (lambda tree: (tree / "bin/run").chmod(0o4755), "bin/run", "should have mode 0755 and has 4755"),
    "the mode of a directory": (lambda tree: (tree / "etc").chmod(0o777), "etc", "should have mode 0755"),
    "the mode of the root": (lambda tree: tree.chmod(0o700), ".", "should have mode 0755 and has 0700"),
    "an owner": (lambda tree: os.chown(tree / "etc/os", 1, 0), "etc/os", "should belong to 0:0 and belongs to 1:0"),
    "a file more": (lambda tree: (tree / "etc/new").write_bytes(b""), "etc/new", "should not be"),
    "a file less": (lambda tree: (tree / "etc/os").unlink(), "etc/os", "is missing"),
    "a directory less": (lambda tree: shutil.rmtree(tree / "bin"), "bin", "is missing"),
    "a size": (lambda tree: os.truncate(tree / "etc/os", 2), "etc/os", "should have 3 bytes and has 2"),
    "a kind": (replace_by_link, "etc/os", "should be a file and is a symbolic link"),
    "an attribute": (lambda tree: os.setxattr(tree / "bin", "user.x", b"1"), "bin", "attribute user.x"),
    "an opaque directory": (lambda tree: os.setxattr(tree / "bin", "trusted.overlay.opaque", b"y"), "bin", "overlay.opaque"),
    "a capability": (
        lambda tree: os.setxattr(tree / "bin/run", "security.capability", bytes.fromhex("01000002002" + "0" * 29)),
        "bin/run", "security.capability",
    ),
    "a FIFO": (lambda tree: os.mkfifo(tree / "a"), "a", "should not be"),
    "two things": (lambda tree: (change_byte(tree), (tree / "a").mkdir()), "a", "should not be"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_names_the_first_difference(store, tmp_path, what):
    if not ROOT:
        lacking("not root")
    store.import_image(str(layout(tmp_path / "layout")), "a")
    other = Layout(tmp_path / "other", [LAYERS[1]])
    store.import_image(str(other.index(other.image())), "b")
    with store.lease("a") as lease:
        tree = lease.layers[0]
    damage, path, problem = DAMAGE[what]
    damage(tree)
    for name in ("a", None):
        [fault] = store.verify(name)
        assert (fault.what, fault.path) == (f"layer {sha(LAYERS[0])}", path)
        assert problem in fault.problem
    assert store.verify("b") == []


@pytest.mark.parametrize("what", ["manifest", "layer.json", "image", "name", "layer", "fs", "other"])
def test_verify_looks_at_itself(store, tmp_path, what):
    image, _ = store.import_image(str(layout(tmp_path / "layout")), "a")
    layer = store.root / "layers" / image.layers[0]
    if what in ("manifest", "layer.json"):
        (layer / what).write_bytes((layer / what).read_bytes().replace(b"sha256", b"sha255").replace(b"bin/run", b"bin/ruN"))
    elif what == "image":
        path = next((store.root / "images").iterdir())
        path.write_bytes(path.read_bytes().replace(b"/srv", b"/etc"))
    elif what == "name":
        next((store.root / "images").iterdir()).unlink()
    elif what == "layer":
        shutil.rmtree(layer)
    elif what == "fs":
        shutil.rmtree(layer / "fs")
    else:
        shutil.copytree(layer, layer.with_name("0" * 64))
    [fault] = store.verify()
    words = {"image": "image sha256:", "name": "name a:latest", "other": f"layer {'0' * 64}"}.get(
        what, f"layer {image.layers[0]}"
    )
    assert fault.what.startswith(words)
    if what in ("image", "layer"):
        with pytest.raises(HostError):
            store.images()


def test_what_is_damaged_is_not_used(store, tmp_path):
    image, _ = store.import_image(str(layout(tmp_path / "layout")), "a")
    shutil.rmtree(store.root / "layers" / image.layers[1])
    with pytest.raises(HostError, match="import its image again"):
        store.lease("a")
    assert store.prune().layers == ()
    store.import_image(str(tmp_path / "layout"), "a")
    is_right(store, "a")


# ---------------------------------------------------------------- many at once


def in_child(action: Callable[[], object]) -> int:
    """Run something in a forked process; 0 if it came to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001 - whatever it was, this is the end of it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def at_once(*actions: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - it is looked at below
            failed.append(error)

    threads = [threading.Thread(target=run, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_those_who_import_the_same_layer_meet(store, tmp_path, monkeypatch):
    """Each layer is built once, however many want it; the others wait, and have it."""
    path = str(layout(tmp_path / "layout"))
    built = []

    def slow(source, *rest):
        built.append(source.diff_id)
        time.sleep(0.1)
        return build(source, *rest)

    build = store_module.build
    monkeypatch.setattr(store_module, "build", slow)
    at_once(*[lambda n=n: Store(store.root).import_image(path, f"name{n}") for n in range(6)])
    assert sorted(built) == sorted(f"sha256:{sha(data)}" for data in LAYERS)
    assert [names for _, names, _ in store.images()] == [tuple(f"name{n}:latest" for n in range(6))]
    is_right(store, "name3")
    assert list(store.root.glob("locks/*")) == []


def test_those_who_do_not_know_that_they_meet(store, tmp_path):
    """A plain tar is called what it turns out to be; who comes second uses what is there."""
    (tmp_path / "a.tar").write_bytes(LAYERS[0])
    at_once(*[lambda n=n: store.import_image(str(tmp_path / "a.tar"), f"n{n}") for n in range(5)])
    assert len(list(store.root.glob("layers/*"))) == 1
    assert list(store.root.glob("tmp/*")) == []
    assert store.verify() == []


def test_a_builder_that_fails_leaves_it_to_the_next(store, tmp_path, monkeypatch):
    path = str(layout(tmp_path / "layout"))
    build, first = store_module.build, itertools.count()

    def fails_once(*args):
        if next(first) == 0:
            time.sleep(0.05)
            raise HostError("no")
        return build(*args)

    monkeypatch.setattr(store_module, "build", fails_once)
    results = []

    def run() -> None:
        with contextlib.suppress(HostError):
            results.append(store.import_image(path, "a"))

    at_once(run, run, run)
    assert len(results) == 2
    is_right(store, "a")


def test_processes_that_import_prune_and_verify(store, tmp_path):
    paths = []
    for number in range(4):
        made = Layout(tmp_path / f"{number}", [LAYERS[0], tar({"n": b"%d" % number})])
        paths.append(str(made.index(made.image())))

    def work(number: int) -> None:
        own = Store(store.root)
        for turn in range(4):
            own.import_image(paths[number], f"i{number}")
            with own.lease(f"i{number}") as lease:
                assert (lease.layers[1] / "n").read_bytes() == b"%d" % number
                own.remove(f"i{number}")
                own.prune()
                assert (lease.layers[0] / "etc/os").read_bytes() == b"one"
            assert own.verify() == [], turn
        own.import_image(paths[number], f"i{number}")

    children = [in_child(lambda n=n: work(n)) for n in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(store.images()) == 4
    assert store.prune() == store_module.Pruned((), (), 0)
    assert store.verify() == []


def test_a_name_lock_is_exclusive_though_its_file_comes_and_goes(tmp_path):
    inside, most = [], []

    def run() -> None:
        for _ in range(40):
            with locks.exclusive_name(tmp_path / "n"):
                inside.append(1)
                most.append(len(inside))
                locks.remove_unheld(tmp_path)
                inside.pop()
            locks.remove_unheld(tmp_path)

    at_once(*[run] * 4)
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- kill -9

POINTS = ("open", "mkdir", "rename", "unlink", "fsync", "chmod", "utime", "link", "symlink", "mknod", "rmdir", "close", "stat")


def counting(limit: int | None) -> list[int]:
    """Count calls to the system; at one of them, be killed. Not undone: for a process that ends."""
    calls = [0]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in POINTS:
        setattr(os, name, counted(getattr(os, name)))
    fcntl.flock = counted(fcntl.flock)
    return calls


def life(store: Store, paths: list[str]) -> None:
    """What a store goes through: there is always an image ``a``, and ``b`` comes and goes."""
    store.import_image(paths[1], "b")
    store.import_image(paths[1], "a")
    store.import_image(paths[0], "a")
    store.remove("b")
    store.prune()


@pytest.fixture
def lived(store, tmp_path):
    """A store with image ``a``, two sources, and how many calls their life takes."""
    paths = []
    for number in range(2):
        made = Layout(tmp_path / f"{number}", [LAYERS[number], tar({"d/": b"", "d/n": b"%d" % number})])
        paths.append(str(made.index(made.image())))
    store.import_image(paths[0], "a")
    shutil.copytree(store.root, tmp_path / "copy")
    read, write = os.pipe()

    def measure() -> None:
        calls = counting(None)
        life(Store(tmp_path / "copy"), paths)
        os.write(write, b"%d" % calls[0])

    assert os.waitpid(in_child(measure), 0)[1] == 0
    total = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    return store, paths, total


def check_after_death(store: Store, paths: list[str]) -> None:
    assert store.verify() == []
    assert list(store.root.glob("tmp/*")) == list(store.root.glob("locks/*")) == list(store.root.glob("**/*.new")) == []
    for image, _, _ in store.images():
        with store.lease(image.id) as lease:
            assert lease.layers[1].joinpath("d/n").exists()
    with store.lease("a"):
        pass  # it was never away
    store.import_image(paths[1], "b")
    store.import_image(paths[0], "a")
    store.remove("b")
    store.prune()
    assert len(list(store.root.glob("layers/*"))) == 2
    assert len(list(store.root.glob("images/*"))) == 1
    assert store.verify() == []


@pytest.mark.parametrize("part", range(4))
def test_killed_at_any_call(lived, part):
    store, paths, total = lived
    assert total > 300
    for limit in range(1 + part * 4, total, 16):
        child = in_child(lambda limit=limit: (counting(limit), life(Store(store.root), paths)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        check_after_death(store, paths)


def test_killed_at_any_time(lived):
    store, paths, _ = lived
    for turn in range(20):
        child = in_child(lambda: [life(Store(store.root), paths) for _ in range(100)])
        time.sleep(0.002 + turn * 0.0037)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        check_after_death(store, paths)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("AGENTRUN_IMAGES", str(tmp_path / "store"))

    def run(*args: object, code: int = 0) -> str:
        assert main(["image", *map(str, args)]) == code
        captured = capfd.readouterr()
        assert (captured.err == "") == (code != 2)
        return captured.out if code != 2 else captured.err

    return run


def test_from_the_command_line(shell, tmp_path):
    path = layout(tmp_path / "layout")
    assert shell("ls") == f"{'NAME':<4}  {'ID':<12}  {'LAYERS':>6}  {'SIZE':>10}  IMPORTED\n"
    answer = json.loads(shell("import", path, "app:1", "--json"))
    assert answer["names"] == ["app:1"]
    assert shell("import", path).split() == ["layout:latest", answer["id"][7:19], f"oci:{path}"]
    assert [line.split()[:3] for line in shell("ls").splitlines()[1:]] == [
        [name, answer["id"][7:19], "2"] for name in ("app:1", "layout:latest")
    ]
    [row] = json.loads(shell("ls", "--json"))
    assert (row["id"], row["names"], row["layers"], row["size"]) == (answer["id"], ["app:1", "layout:latest"], 2, 16)
    shown = json.loads(shell("show", "app:1", "--json"))
    assert (shown["config"]["env"], shown["config"]["workdir"]) == (["PATH=/bin", "A=b=c"], "/srv")
    assert [layer["diff_id"] for layer in shown["layers"]] == [f"sha256:{sha(data)}" for data in LAYERS]
    text = shell("show", "app:1")
    assert 'entrypoint  ["/bin/run"]' in text
    assert "env         A=b=c" in text
    assert shell("verify") == "the store is as it should be\n"
    assert shell("verify", "app:1") == "app:1: ok\n"
    assert shell("rm", "app:1") == "removed app:1\n"
    assert shell("rm", "layout") == "removed layout:latest\n"
    assert shell("prune") == "removed 0 images, 2 layers, 16 B\n"
    assert json.loads(shell("prune", "--json")) == {"images": [], "layers": [], "size": 0}


def test_what_it_was_taken_for_is_said(shell, tmp_path):
    made = layout(tmp_path / "layout")
    (tmp_path / "root.tar").write_bytes(LAYERS[0])
    (tmp_path / "root").mkdir()
    taken = {
        "oci": made,
        "oci-archive": pack(made, tmp_path / "layout.tar"),
        "docker-archive": saved(tmp_path / "saved.tar", ["a:1"]),
        "tar": tmp_path / "root.tar",
        "dir": tmp_path / "root",
    }
    for kind, path in taken.items():
        for reference in (path, f"{kind}:{path}"):
            assert shell("import", reference, "x").split()[2] == f"{kind}:{path}"
            assert json.loads(shell("import", reference, "x", "--json"))["source"] == f"{kind}:{path}"
        assert f"source      {kind}:{path}\n" in shell("show", "x")


@pytest.mark.parametrize("place", ["first", "last"])
def test_an_archive_of_images_with_a_stranger_in_it_is_told(store, tmp_path, monkeypatch, capfd, place):
    """It could be a root file system, so it is taken for one; not without a word."""
    monkeypatch.setenv("AGENTRUN_IMAGES", str(store.root))
    path, inside = tmp_path / "s.tar", tmp_path / "inside"
    with tarfile.open(saved(tmp_path / "plain.tar", ["app:1"], legacy=False)) as archive:
        archive.extractall(inside, filter="data")
    (inside / ("README" if place == "first" else "sums.txt")).write_text("for humans")
    pack(inside, path)
    assert main(["image", "import", str(path), "x"]) == 0
    said = capfd.readouterr()
    assert said.out.split()[2] == f"tar:{path}"
    assert said.err == (
        f"agentrun: {path}: taken as a root file system, though it has manifest.json at its top; if there are images in it,"
        " say so (docker-archive:PATH, oci-archive:PATH)\n"
    )
    for reference in (f"tar:{path}", f"docker-archive:{path}"):  # who says it is told nothing
        assert main(["image", "import", reference, "x"]) == 0
        assert capfd.readouterr().err == ""
    is_right(store, "x")


def test_what_the_command_line_exits_with(shell, tmp_path):
    path = layout(tmp_path / "layout")
    assert shell("show", "nope", code=2) == 'agentrun: image: there is no image "nope" (known: none)\n'
    assert "No such file" in shell("import", tmp_path / "nope", code=2)
    assert shell("import", path, "a b", code=2).startswith('agentrun: image: "a b" is not a name')
    assert "more than the 1K a layer may have" in shell("import", path, "--max-size", "1K", code=2)
    assert "one entry more than the 3" in shell("import", path, "--max-entries", "3", code=2)
    assert "--max-ratio" in shell("import", path, "--max-ratio", "x", code=2)
    shell("import", path, "a")
    change_byte(next((tmp_path / "store/layers").glob("*/fs/bin")).parent)
    assert shell("verify", code=125) == f"layer {sha(LAYERS[0])}: bin/run: has other content\n"
    [fault] = json.loads(shell("verify", "a", "--json", code=125))
    assert fault == {"what": f"layer {sha(LAYERS[0])}", "path": "bin/run", "problem": "has other content"}


def test_a_bar_for_those_who_look(tmp_path):
    """On a terminal something is drawn while it works, on stderr; the answer is the same."""
    path = layout(tmp_path / "layout")
    ours, theirs = os.openpty()
    out = (tmp_path / "out").open("wb")

    def run() -> None:
        os.environ["AGENTRUN_IMAGES"] = str(tmp_path / "store")
        os.environ["TERM"] = "xterm"
        os.dup2(out.fileno(), 1)
        os.dup2(theirs, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        assert main(["image", "import", str(path)]) == 0
        sys.stdout.flush()

    child = in_child(run)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO, once the other end is closed
        while chunk := os.read(ours, 65536):
            drawn += chunk
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    out.close()
    assert (tmp_path / "out").read_text().startswith("layout:latest")
    assert b"\x1b[" in drawn


def test_a_config_of_old():
    config = parse_config(b'{"config": {"Cmd": "echo hi", "Env": null}, "rootfs": null}', "x")
    assert (config.cmd, config.env, config.workdir, config.diff_ids) == (("/bin/sh", "-c", "echo hi"), (), "/", ())
