# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime as another user: no engine, no privilege, one id or those of /etc/subuid."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from agentrun_shim import native
from agentrun_shim.oci.documents import example
from tests.oci_support import PATIENCE, make_rootfs, missing_requirement
from tests.requirements import lacking

pytestmark = pytest.mark.host
UID, GID = 4747, 4848


class Rootless:
    """An installation, a bundle and a runtime directory that are another user's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        package = Path(native.__file__).parent
        shutil.copytree(package, directory / "agentrun_shim", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        self.runtime = directory / "agentrun_shim" / "_native" / "agentrun-oci"
        self.bundle, self.run = directory / "bundle", directory / "run"
        make_rootfs(self.bundle / "rootfs")
        self.run.mkdir()
        subprocess.run(["chown", "-R", f"{UID}:{GID}", self.bundle, self.run], check=True)

    def write(self, script: str, **process: object) -> None:
        made = example(rootless=True)
        made["process"] |= {"terminal": False, "args": ["sh", "-c", script], "env": ["PATH=/bin"], **process}
        made["linux"]["uidMappings"][0]["hostID"], made["linux"]["gidMappings"][0]["hostID"] = UID, GID
        (self.bundle / "config.json").write_text(json.dumps(made))

    def __call__(self, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if quiet else {"capture_output": True}
        return subprocess.run(
            [self.runtime, *arguments], user=UID, group=GID, extra_groups=[], env={"XDG_RUNTIME_DIR": str(self.run)},
            cwd=self.bundle, stdin=subprocess.DEVNULL, text=True, timeout=60, **streams,
        )  # fmt: skip


@pytest.fixture(scope="module")
def rootless():
    if reason := missing_requirement():
        lacking(reason)
    with tempfile.TemporaryDirectory(prefix="agentrun-oci-rootless-") as name:
        os.chmod(name, 0o755)
        yield Rootless(Path(name))


def test_run(rootless):
    rootless.write("id -u; cat /proc/self/uid_map; touch /dev/shm/x && echo made; echo x > /dev/null && hostname; exit 3")
    done = rootless("run", "mine")
    assert (done.returncode, done.stderr) == (3, "")
    uid, ids, *rest = done.stdout.split("\n")
    assert (uid, ids.split(), rest) == ("0", ["0", str(UID), "1"], ["made", "agentrun", ""])
    assert os.listdir(rootless.run / "agentrun-oci") == []


def test_a_whole_life(rootless):
    rootless.write("sleep 1000")
    assert rootless("create", "mine", quiet=True).returncode == 0
    assert json.loads(rootless("state", "mine").stdout)["status"] == "created"
    assert rootless("start", "mine").returncode == 0
    done = rootless("exec", "mine", "sh", "-c", "id -u; hostname; exit 4")
    assert (done.returncode, done.stdout, done.stderr) == (4, "0\nagentrun\n", "")
    assert rootless("kill", "mine", "KILL").returncode == 0
    deadline = time.monotonic() + PATIENCE
    while json.loads(rootless("state", "mine").stdout)["status"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert rootless("delete", "mine").returncode == 0
    assert os.listdir(rootless.run / "agentrun-oci") == []


def test_what_needs_more_is_refused(rootless):
    rootless.write("true", user={"uid": 5, "gid": 5})
    done = rootless("run", "mine")
    assert (done.returncode, done.stdout) == (1, "")
    made = json.loads((rootless.bundle / "config.json").read_text())
    made["process"]["user"] = {"uid": 0, "gid": 0}
    made["linux"]["resources"] = {"pids": {"limit": 5}}
    (rootless.bundle / "config.json").write_text(json.dumps(made))
    done = rootless("run", "mine")
    assert (done.returncode, "no cgroup was delegated" in done.stderr) == (1, True)
    assert os.listdir(rootless.run / "agentrun-oci") == []
