# SPDX-License-Identifier: Apache-2.0
"""The wheel, built by the real backend: what is in it, and that it is all a machine needs."""

import email
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agentrun_shim.data import data_path

ROOT = Path(__file__).parents[2]
UNTRACKED = shutil.ignore_patterns(".venv", ".git", "*_cache", "__pycache__", "_native", "build", "dist", ".hypothesis", "out")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: the backend compiles into the source tree, and other tests run what is there."""
    tmp = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, tmp / "source", ignore=UNTRACKED)
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", tmp, tmp / "source"],
        capture_output=True, text=True, timeout=110, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    if done.returncode and not isolation and "hatchling" in done.stderr and "ould not find" in done.stderr:
        pytest.skip("no hatchling here, and no package index to get it from")
    assert done.returncode == 0, done.stderr
    (path,) = tmp.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_it_is_for_this_platform_and_any_python(wheel):
    assert wheel.name == "agentrun-0.1.0-py3-none-linux_x86_64.whl"


def test_both_packages_are_whole(names):
    for package in (ROOT / "runtime" / "agentrun", ROOT / "shim" / "agentrun_shim"):
        modules = {str(file.relative_to(package.parent)) for file in package.rglob("*.py")}
        assert {name for name in names if name.startswith(package.name + "/") and name.endswith(".py")} == modules
        assert f"{package.name}/py.typed" in names


def test_the_native_programs(wheel, names):
    assert "agentrun_shim/_native/agentrun-slot" in names
    with zipfile.ZipFile(wheel) as archive:
        scripts = [f"agentrun-0.1.0.data/scripts/{name}" for name in ("agentrun", "agentrun-oci")]
        for name in ("agentrun_shim/_native/agentrun-slot", "agentrun_shim/_native/agentrun-oci", *scripts):
            assert archive.read(name)[:4] == b"\x7fELF"
            assert archive.getinfo(name).external_attr >> 16 & 0o111 == 0o111, f"{name} is not executable"


def test_a_checkout_has_its_own_data():
    assert data_path("policies/seccomp/default.json") == ROOT / "policies" / "seccomp" / "default.json"


@pytest.mark.parametrize("directory", ["bpf", "images", "policies", "shim/config", "systemd"])
def test_data_comes_along(names, directory):
    files = {
        str(file.relative_to(ROOT))
        for file in (ROOT / directory).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files
    assert {f"agentrun/_data/{file}" for file in files} <= names


def test_the_licence_and_the_names(wheel, names):
    assert "agentrun-0.1.0.dist-info/licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read("agentrun-0.1.0.dist-info/METADATA"))
        scripts = archive.read("agentrun-0.1.0.dist-info/entry_points.txt").decode()
    assert (metadata["Name"], metadata["License-Expression"], metadata["Requires-Python"]) == ("agentrun", "Apache-2.0", ">=3.11")
    assert {line.split(">")[0] for line in metadata.get_all("Requires-Dist")} == {"idna", "msgspec", "rich", "trio"}
    assert "agentrun-cli = agentrun.cli:main" in scripts
    assert "agentrun-hook = agentrun_shim.hook:program" in scripts


def test_nothing_else_is_in_it(names):
    tops = {name.split("/")[0] for name in names}
    assert tops == {"agentrun", "agentrun_shim", "agentrun-0.1.0.dist-info", "agentrun-0.1.0.data"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".o"))]


def test_what_was_installed_from_it_runs(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", tmp_path, wheel],
        check=True, timeout=60, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    code = "import agentrun_shim.native as n, agentrun; print(n.slot_program()); print(agentrun.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())
    # The data of the installation, not of this checkout: a profile is found and compiled.
    code = "import agentrun_shim.seccomp as s; print(s.default_profile().name, len(s.default_filter()) % 8)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path}/agentrun/_data/policies/seccomp/default.json 0\n", "")
    # And the hook, which gets no help to find itself.
    hook = [sys.executable, "-I", "-S", "-E", tmp_path / "agentrun_shim" / "hook.py", f"--socket={tmp_path}/s"]
    state = '{"id": "a", "status": "created", "annotations": {"io.agentrun.polcy": "x"}}'
    done = subprocess.run(hook, input=state, env={}, cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stderr[:37]) == (1, "agentrun-hook: a: not known: io.agent")
    usage = subprocess.run([tmp_path / "bin" / "agentrun", "exec", "--help"], capture_output=True, text=True)
    assert (usage.returncode, usage.stdout[:20]) == (0, "usage: agentrun exec")
    # The OCI runtime finds its package from where it is, without PATH, HOME and PYTHONPATH.
    done = subprocess.run([tmp_path / "bin" / "agentrun-oci", "features"], cwd="/", env={}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ociVersionMin"] == "1.0.0"
