# SPDX-License-Identifier: Apache-2.0
"""`agentrun setup oci`: what it prints and writes, and what the engines themselves make of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from agentrun import engines
from agentrun_shim import hook
from agentrun_shim.data import data_path
from tests.requirements import lacking
from tests.support import BIN

RUNTIME = "/opt/agentrun/bin/agentrun-oci"
CONFIG = data_path("shim/config")


STAGES = ("createRuntime", "poststart", "poststop")


def setup(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([BIN / "agentrun-cli", "setup", "oci", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done
    return done


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A machine's root with everything in it, to look at."""
    root = tmp_path_factory.mktemp("filled")
    setup("--engine", "all", "--runtime", RUNTIME, "--root", str(root))
    return root


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


OURS = {
    "etc/containers/containers.conf.d/agentrun.conf", "etc/docker/daemon.json",
    *(f"etc/containers/oci/hooks.d/agentrun-{stage}.json" for stage in STAGES),
    "etc/containerd/conf.d/agentrun.toml", "etc/containerd/config.toml", "etc/crio/crio.conf.d/10-agentrun.conf",
    "var/lib/agentrun/hook-policies.json",
}  # fmt: skip


def test_a_dry_run_writes_nothing_and_prints_it_all(root):
    said = setup("--dry-run", "--engine", "all", "--runtime", RUNTIME, "--root", str(root)).stdout
    assert files(root) == {}
    for name in OURS - {"var/lib/agentrun/hook-policies.json"}:
        assert f"# /{name}: " in said, name
    assert said.count(RUNTIME) == 5
    assert "kubectl apply -f" in said


def test_everything_is_written_and_nothing_twice(filled):
    first = files(filled)
    assert set(first) == OURS
    again = setup("--engine", "all", "--runtime", RUNTIME, "--root", str(filled)).stdout
    assert again.count("as it was") == len(OURS) - 1 - 1  # config.toml is there now; the policies are worked out anew
    assert {name: text for name, text in files(filled).items() if "policies" not in name} == {
        name: text for name, text in first.items() if "policies" not in name
    }


def test_it_is_taken_back_whole(filled, root):
    shutil.copytree(filled, root, dirs_exist_ok=True)
    setup("--remove", "--root", str(root))
    assert files(root) == {}


def test_what_others_wrote_into_our_files_stays(filled, root):
    shutil.copytree(filled, root, dirs_exist_ok=True)
    main, docker = root / "etc/containerd/config.toml", root / "etc/docker/daemon.json"
    main.write_text(main.read_text() + 'root = "/srv/containerd"\n')
    docker.write_text(json.dumps(json.loads(docker.read_text()) | {"debug": True}))
    text = main.read_text()
    setup("--remove", "--root", str(root))
    assert set(files(root)) == {"etc/docker/daemon.json", "etc/containerd/config.toml"}
    assert (main.read_text(), json.loads(docker.read_text())) == (text, {"debug": True})


def test_what_docker_was_told_already_stays(root):
    path = root / "etc/docker/daemon.json"
    path.parent.mkdir(parents=True)
    before = {"log-driver": "journald", "runtimes": {"kata": {"path": "/usr/bin/kata"}}}
    path.write_text(json.dumps(before))
    path.chmod(0o600)
    setup("--engine", "docker", "--runtime", RUNTIME, "--root", str(root))
    assert json.loads(path.read_text()) == before | {"runtimes": {**before["runtimes"], "agentrun": {"path": RUNTIME}}}
    assert path.stat().st_mode & 0o777 == 0o600
    setup("--remove", "--root", str(root))
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"runtimes": []}'])
def test_a_file_that_cannot_be_merged_is_left_alone(root, text):
    path = root / "etc/docker/daemon.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert "daemon.json" in setup("--engine", "docker", "--runtime", RUNTIME, "--root", str(root), code=2).stderr
    assert path.read_text() == text


def test_a_containerd_that_imports_nothing_is_not_touched(root):
    path = root / "etc/containerd/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("version = 2\n")
    said = setup("--engine", "containerd", "--runtime", RUNTIME, "--root", str(root)).stdout
    assert path.read_text() == "version = 2\n"
    assert 'add: imports = ["/etc/containerd/conf.d/*.toml"]' in said
    path.write_text('imports = ["/etc/containerd/conf.d/*.toml"]\n')
    assert "add: imports" not in setup("--engine", "containerd", "--runtime", RUNTIME, "--root", str(root)).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "containers"], "invalid choice"),
        (["--engine", "podman", "--runtime", "agentrun-oci"], "not an absolute path"),
        (["--engine", "podman", "--runtime", RUNTIME, "--socket", "s"], "not an absolute path"),
        (["--engine", "podman", "--root", "/nowhere"], "no directory"),
    ],
)
def test_wrong_usage(words, message):
    assert message in setup(*words, code=2).stderr


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("stage", STAGES)
def test_the_hook_is_started_by_an_absolute_interpreter(filled, stage):
    document = json.loads((filled / f"etc/containers/oci/hooks.d/agentrun-{stage}.json").read_text())
    command = document["hook"]
    assert command["path"] == sys.executable
    assert command["args"][:5] == ["agentrun-hook", "-I", "-S", "-E", os.path.abspath(hook.__file__)]
    assert (document["stages"], command["args"][-1]) == ([stage], stage)
    (pattern,) = document["when"]["annotations"]
    assert re.search(pattern, "io.agentrun.policy")
    assert not re.search(pattern, "org.agentrun.policy")
    state = b'{"id": "a", "status": "created", "annotations": {}}'
    done = subprocess.run([command["path"], *command["args"][1:]], input=state, env={}, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_policies_for_hooks_without_a_daemon(filled):
    document = json.loads((filled / "var/lib/agentrun/hook-policies.json").read_text())
    assert {"default", "strict", "test", "build"} <= document["policies"].keys()
    assert document["policies"]["test"]["files"]["memory.high"] == str(1 << 30)
    assert str(data_path("policies/test.toml")) in document["sources"]


@pytest.mark.parametrize(
    "name", ["containerd/agentrun-1.toml", "containerd/agentrun-2.toml", "crio/10-agentrun.conf", "podman/agentrun.conf"]
)
def test_shipped_files_are_what_they_say(name):
    document = tomllib.loads((CONFIG / name).read_text())
    if name.startswith("containerd"):
        version, plugin = (2, "io.containerd.grpc.v1.cri") if name.endswith("1.toml") else (3, "io.containerd.cri.v1.runtime")
        assert document["version"] == version
        handler = document["plugins"][plugin]["containerd"]["runtimes"]["agentrun"]
        assert handler["runtime_type"] == "io.containerd.runc.v2"
        assert handler["options"] == {"BinaryName": "/usr/bin/agentrun-oci", "SystemdCgroup": True}
    elif name.startswith("crio"):
        handler = document["crio"]["runtime"]["runtimes"]["agentrun"]
        assert handler == {"runtime_path": "/usr/bin/agentrun-oci", "runtime_type": "oci", "runtime_root": "/run/agentrun-oci"}
    else:
        assert {"agentrun", "agentrun-oci", "crun", "runc"} <= set(document["engine"]["runtime_supports_json"])
        for key in ("runtime_supports_nocgroup", "runtime_supports_nocgroups"):
            assert {"agentrun", "agentrun-oci", "crun"} <= set(document["engine"][key])
        assert document["engine"]["runtimes"]["agentrun"] == ["/usr/bin/agentrun-oci"]


def test_the_runtime_class_has_the_fields_of_its_kind():
    lines = [line for line in (CONFIG / "kubernetes/runtimeclass.yaml").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["apiVersion: node.k8s.io/v1", "kind: RuntimeClass", "metadata:", "  name: agentrun", "handler: agentrun"]


# ---------------------------------------------------------------- the engines


def need(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        lacking(f"no {program}")
    return path


@pytest.fixture
def runtime(tmp_path):
    """Something that podman takes for a runtime: it only asks for its version here."""
    path = tmp_path / "agentrun-oci"
    path.write_text("#!/bin/sh\necho agentrun-oci version 0.1.0\n")
    path.chmod(0o755)
    return path


def test_podman_takes_the_drop_in(tmp_path, root, runtime):
    podman = need("podman")
    setup("--engine", "podman", "--runtime", str(runtime), "--root", str(root))
    conf = root / "etc/containers/containers.conf.d/agentrun.conf"
    env = {
        **os.environ, "CONTAINERS_CONF": str(conf), "XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path),
    }  # fmt: skip
    short = tempfile.mkdtemp(prefix="agentrun-test-")  # podman takes no runroot of more than 50 characters
    places = ["--root", f"{short}/storage", "--runroot", f"{short}/run", "--tmpdir", f"{short}/tmp"]
    argv = [
        podman,
        *places,
        "--storage-driver=vfs",
        "--cgroup-manager=cgroupfs",
        "--events-backend=file",
        "--runtime",
        "agentrun-oci",
    ]
    done = subprocess.run([*argv, "info", "--format", "json"], env=env, capture_output=True, text=True, timeout=60)
    shutil.rmtree(short)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["host"]["ociRuntime"]["path"] == str(runtime)
    assert json.loads(done.stdout)["host"]["ociRuntime"]["name"] == "agentrun-oci"


def test_containerd_takes_the_handler(tmp_path, root):
    containerd = need("containerd")
    said = subprocess.run([containerd, "--version"], capture_output=True, text=True, timeout=30).stdout
    major = int(re.search(r"\bv?(\d+)\.\d+\.\d+", said)[1])
    setup("--engine", "containerd", "--runtime", RUNTIME, "--root", str(root))
    main = root / "etc/containerd/config.toml"
    # Its import names a directory of the machine's root; here it is another.
    main.write_text(main.read_text().replace("/etc/containerd/conf.d", str(root / "etc/containerd/conf.d")))
    done = subprocess.run([containerd, "--config", main, "config", "dump"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    plugin = "io.containerd.grpc.v1.cri" if major < 2 else "io.containerd.cri.v1.runtime"
    handler = tomllib.loads(done.stdout)["plugins"][plugin]["containerd"]["runtimes"]["agentrun"]
    assert handler["options"]["BinaryName"] == RUNTIME
    assert handler["pod_annotations"] == ["io.agentrun.*"]


DOCKERD = """
mount -t tmpfs tmpfs /run
dockerd --config-file "$1" --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \\
    --data-root /run/data --exec-root /run/exec --storage-driver vfs -H unix:///run/d.sock --pidfile /run/d.pid > /run/log 2>&1 &
for try in $(seq 100); do
    curl -s --unix-socket /run/d.sock http://docker/info > /run/info && exec cat /run/info
    sleep 0.2
done
cat /run/log >&2
exit 1
"""
"""In namespaces of its own, so that it changes nothing and ends with them."""


def test_dockerd_takes_the_runtime(root):
    """Installing it would start it, so it is used where it is."""
    if shutil.which("dockerd") is None:
        pytest.skip("no dockerd here")
    setup("--engine", "docker", "--runtime", "/usr/bin/crun", "--root", str(root))
    argv = [
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        DOCKERD,
        "sh",
        root / "etc/docker/daemon.json",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["Runtimes"]["agentrun"]["path"] == "/usr/bin/crun"


def test_every_engine_has_a_plan():
    assert set(engines.ENGINES) == set(engines._PLANS)
