# SPDX-License-Identifier: Apache-2.0
"""Images from where they are kept: a registry's own server on loopback, and podman's storage. Nothing in between is ours."""

import json
import shutil

import pytest

from agentrun.image.shelf import full_name
from tests.image.support import Podman, image, need, registry, sh

# Layers: something, less of it, a directory whose content is replaced, links, a config.
CONTAINERFILE = """
FROM scratch
COPY busybox /bin/busybox
COPY busybox /bin/sh
RUN for name in cat chmod chown find ls ln mkdir rm sort stat tr; do /bin/busybox ln -s busybox /bin/$name; done
RUN mkdir -p /data/inner /data/keep /tmp && echo one > /data/inner/one && echo gone > /data/gone \
    && echo kept > /data/keep/kept && ln /data/keep/kept /data/keep/link && chown 33:44 /data/keep && chmod 1777 /tmp
RUN rm /data/gone && rm -r /data/inner && mkdir /data/inner && echo two > /data/inner/two
RUN rm -r /data/keep/link && ln -s kept /data/keep/symlink && chmod 4755 /data/keep/kept
ENV GREETING="a = b"
WORKDIR /data
USER 33:44
ENTRYPOINT ["/bin/busybox"]
CMD ["cat", "/data/inner/two"]
"""
TREE = "/data|/data/inner|/data/inner/two|/data/keep|/data/keep/kept|/data/keep/symlink"


@pytest.fixture
def server(tmp_path):
    """One for each test: skopeo remembers by address in which compressions a blob was seen, and would not compress it again."""
    with registry(tmp_path) as address:
        yield address


@pytest.fixture(scope="module")
def podman(scratch):
    return Podman(scratch)


@pytest.fixture(scope="module")
def built(podman, scratch):
    """An image of several layers that podman has built."""
    need("busybox")
    directory = scratch / "context"
    directory.mkdir()
    shutil.copy(str(shutil.which("busybox")), directory / "busybox")
    podman.build(directory, CONTAINERFILE, "localhost/layers:1")
    return "localhost/layers:1"


def is_right(store, inside, name: str) -> None:
    """It is the image of CONTAINERFILE, and its programs are run as docker would run them."""
    assert inside(name, "sh", "-c", "find /data | sort | tr '\\n' '|'").rstrip("|") == TREE
    assert inside(name, "cat", "inner/two", "/data/keep/symlink") == "two\nkept\n", "in its directory, by its entry point"
    assert inside(name, "sh", "-c", "echo $GREETING; id -u; id -g") == "a = b\n33\n44\n"
    assert inside(name, "stat", "-c", "%a %u %g", "keep/kept", "keep").splitlines() == ["4755 0 0", "755 33 44"]
    config = store.find(name).config
    assert (config.workdir, config.user, config.command()) == ("/data", "33:44", ("/bin/busybox", "cat", "/data/inner/two"))
    assert store.verify(name) == []


def test_what_podman_has(store, inside, podman, built):
    image(store, "pull", podman.reference(built), "from-podman")
    is_right(store, inside, "from-podman")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["oci", "v2s2"])
def test_what_a_registry_has(store, inside, server, podman, built, compression, kind):
    if (kind, compression) == ("v2s2", "zstd"):
        pytest.skip("docker's own manifests have no zstd")
    reference = f"{server}/app-{kind}:{compression}"
    options = ["--dest-tls-verify=false", "--format", kind, "--dest-compress-format", compression]
    sh("skopeo", "copy", "--quiet", *options, podman.reference(built), f"docker://{reference}")
    raw = json.loads(sh("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{reference}"))
    assert all(("zstd" in layer["mediaType"]) == (compression == "zstd") for layer in raw["layers"])
    assert len(raw["layers"]) >= 4
    image(store, "pull", "--insecure", reference)
    is_right(store, inside, full_name(reference))


def test_one_layer_however_it_came(store, server, podman, built):
    """The same uncompressed layers are the same layers."""
    reference = f"{server}/same:1"
    sh("skopeo", "copy", "--quiet", "--dest-tls-verify=false", podman.reference(built), f"docker://{reference}")
    image(store, "pull", podman.reference(built), "one")
    before = {path.name: path.stat().st_ino for path in (store.root / "layers").iterdir()}
    image(store, "pull", "--insecure", reference, "two")
    assert store.find("one").layers == store.find("two").layers
    assert {path.name: path.stat().st_ino for path in (store.root / "layers").iterdir()} == before


def test_plain_http_has_to_be_asked_for(store, server):
    said = image(store, "pull", f"{server}/app:1", code=125)
    assert "skopeo copy failed" in said
    assert "HTTP response to HTTPS client" in said


def test_what_is_not_there(store, server, podman):
    assert "manifest unknown" in image(store, "pull", "--insecure", f"{server}/nothing:1", code=125)
    assert "skopeo copy failed" in image(store, "pull", podman.reference("localhost/nothing:1"), "x", code=125)
    assert list(store.root.glob("tmp/*")) == []


def test_python_by_way_of_podman_and_the_registry(store, inside, server, podman, python, scratch):
    """Real tools in both: the tree of the recipe, imported by podman; one more layer; pushed; pulled."""
    [layer] = store.find(python).layers
    tar = scratch / "python.tar"
    sh("tar", "-C", store.root / "layers" / layer / "fs", "--xattrs", "-cf", tar, ".")
    podman("import", tar, "localhost/python:base")
    tar.unlink()
    context = scratch / "more"
    context.mkdir()
    text = "FROM localhost/python:base\nRUN rm -r /etc/cron.daily && echo x > /etc/more\n"
    podman.build(context, text, "localhost/python:more")
    image(store, "pull", podman.reference("localhost/python:more"), "podman-python")
    inside.can("podman-python", "python", "apt", "git")
    reference = f"{server}/python:more"
    options = ["--dest-tls-verify=false", "--format", "oci", "--dest-compress-format", "zstd"]
    sh("skopeo", "copy", "--quiet", *options, podman.reference("localhost/python:more"), f"docker://{reference}")
    image(store, "pull", "--insecure", reference, "registry-python")
    inside.can("registry-python", "python", "apt", "git")
    assert inside("registry-python", "sh", "-c", "ls -d /etc/cron.daily /etc/more 2>/dev/null || true") == "/etc/more\n"
