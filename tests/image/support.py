# SPDX-License-Identifier: Apache-2.0
"""What the tests of real images share: programs that have to be there, a registry on loopback, podman with storage of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from agentrun.image.store import Store
from tests.requirements import lacking
from tests.support import Daemon

LOOPBACK = "127.0.0.1"


def need(*programs: str) -> None:
    """Skip, or under CI fail, where a program is missing; and where we are not root."""
    if os.geteuid() != 0:
        lacking("not root")
    if missing := [program for program in programs if not shutil.which(program)]:
        lacking(f"not installed: {', '.join(missing)}")


def sh(*words: object, **more: object) -> str:
    """Run a program; what it prints."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return str(done.stdout)


def image(store: Store, *words: object, code: int = 0) -> str:
    """``agentrun image``, as a program of its own; what it prints, or says on stderr where it has to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "agentrun.cli", "image", *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "AGENTRUN_IMAGES": str(store.root)},
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout if code == 0 else done.stderr


class Inside:
    """Calls in the images of a store, by ``agentrun exec`` and a daemon of our own."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def __call__(self, name: str, *words: str) -> str:
        """Run a program in an image; what it prints."""
        done = self._daemon.exec("--image", name, "--timeout", "60", "--", *words)
        assert done.returncode == 0, f"{words} in {name}: {done.returncode}: {done.stdout[-500:]!r} {done.stderr[-2000:]!r}"
        return str(done.stdout.decode())

    def can(self, name: str, *tools: str) -> None:
        """See that the tools which agents call most work in an image."""
        if "python" in tools:
            assert self(name, "python3", "-c", "import ssl, sqlite3, json; print(6 * 7)") == "42\n"
        if "apt" in tools:
            listed = self(name, "apt", "list", "--installed").splitlines()
            assert any(line.startswith("libc6/") for line in listed)
            assert len(listed) > 80
        if "git" in tools:
            assert self(name, "git", "--version").startswith("git version 2.")
            commit = "touch a && git add a && git -c user.name=a -c user.email=b commit -qm c && git log"
            assert "Author: a <b>" in self(name, "sh", "-c", f"cd /tmp && git init -q r && cd r && {commit}")
        if "node" in tools:
            assert self(name, "node", "-e", "console.log(6 * 7)") == "42\n"
            assert self(name, "npm", "--version")[0].isdigit()


@contextlib.contextmanager
def registry(directory: Path):
    """A registry server on loopback, empty; its address."""
    need("docker-registry", "skopeo")
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        "log: {level: warn, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'registry'}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{LOOPBACK}:{port}', headers: {{X-Content-Type-Options: [nosniff]}}}}\n"
    )
    with (directory / "registry.log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log, cwd=directory)
        try:
            _wait_listening(server, port, directory / "registry.log")
            yield f"{LOOPBACK}:{port}"
        finally:
            server.terminate()
            server.wait(20)


def _wait_listening(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    end = time.monotonic() + 20
    while True:
        assert server.poll() is None, log.read_text()
        try:
            socket.create_connection((LOOPBACK, port), 1).close()
        except OSError:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        else:
            return


class Podman:
    """podman with storage below a directory, and nothing of the machine's own."""

    def __init__(self, directory: Path) -> None:
        need("podman", "skopeo")
        self._root, self._runroot = directory / "storage", directory / "run"
        where = ["--root", self._root, "--runroot", self._runroot]
        self._options = [*where, "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]

    def __call__(self, *words: object, **more: object) -> str:
        return sh("podman", *self._options, *words, **more)

    def build(self, directory: Path, text: str, name: str) -> None:
        """Build a Containerfile. Each step is a layer, and runs in a chroot: nothing is asked of cgroups."""
        (directory / "Containerfile").write_text(text)
        self("build", "--isolation", "chroot", "--layers", "--network", "host", "--tag", name, directory)

    def reference(self, name: str) -> str:
        """What ``agentrun image pull`` calls an image of it, and skopeo too."""
        return f"containers-storage:[vfs@{self._root}+{self._runroot}]{name}"
