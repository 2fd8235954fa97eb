"""The VM lane itself: statuses and output come back, and a lost machine is not a failed test.

The kernels come from the environment variable KERNELS.  A boot costs about five seconds, so each test asks
several things of one guest.  Where QEMU is missing the tests are skipped with the reason; in CI they fail.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.requirements import lacking
from tests.vm import image, initramfs, kernels, run

ROOT = Path(__file__).resolve().parents[2]
KERNELS = os.environ.get("KERNELS", "6.1 6.12").split()

pytestmark = pytest.mark.vm


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


Guest = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def _requirements() -> None:
    if missing := run.missing_requirements(ext4=True):
        lacking("; ".join(missing))


@pytest.fixture(params=KERNELS)
def guest(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Runs a shell script in the guest; temporary directories of the lane go to `tmp_path` / "lane"."""
    kernel: str = request.param
    lane = tmp_path / "lane"
    lane.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(lane))

    def run_script(script: str, *, timeout: float = 240, ext4: bool = False, cwd: Path = ROOT) -> Result:
        stdout, stderr = io.BytesIO(), io.BytesIO()
        command = ["sh", "-c", script]
        try:
            status = run.run(
                kernel,
                command,
                timeout=timeout,
                ext4=ext4,
                cwd=cwd,
                env={"K": "a 'b'"},
                stdout=stdout,
                stderr=stderr,
            )
        finally:
            assert not list(lane.iterdir()), "the lane left files behind"
        return Result(status, stdout.getvalue().decode(), stderr.getvalue().decode())

    run_script.kernel = kernel  # type: ignore[attr-defined]
    return run_script


def test_success_output_and_environment(guest: Guest) -> None:
    result = guest(
        """
        echo out; echo err >&2; echo reopened > /dev/stderr
        pwd; echo "$K"; echo "$AGENTRUN_VM $HOME $PYTHONDONTWRITEBYTECODE"
        touch /written && ls /written
        cat /sys/fs/cgroup/cgroup.subtree_control
        """
    )
    kernel: str = guest.kernel  # type: ignore[attr-defined]
    assert result.stderr == "err\nreopened\n"
    *lines, controllers = result.stdout.splitlines()
    assert lines == ["out", str(ROOT), "a 'b'", f"{kernel} /root 1", "/written"]
    assert {"cpu", "io", "memory", "pids"} <= set(controllers.split())
    assert result.status == 0
    assert not Path("/written").exists()


def test_failure_leftovers_and_bulk(guest: Guest, tmp_path: Path) -> None:
    """A status other than 0, though a process still holds the pipes; much output; ext4; a cwd below /tmp."""
    (tmp_path / "marker").touch()
    result = guest("stat -f -c %T /mnt/ext4; ls; seq 200000; sleep 1000 & exit 7", ext4=True, cwd=tmp_path)
    first, *rest = result.stdout.splitlines()
    assert first == "ext2/ext3"  # which is how stat calls the family
    assert "marker" in rest[:2]
    assert rest[2:] == [str(n) for n in range(1, 200001)]
    assert result.status == 7


@pytest.mark.parametrize("guest", KERNELS[:1], indirect=True)  # QEMU is what is ended, whatever runs in it
def test_timeout(guest: Guest) -> None:
    started = time.monotonic()
    with pytest.raises(run.TimedOut):
        guest("sleep 1000", timeout=8)
    assert time.monotonic() - started < 20


def test_crash_is_a_lost_vm(guest: Guest) -> None:
    with pytest.raises(run.LostVM, match="sysrq"):
        guest("echo c > /proc/sysrq-trigger; sleep 1000")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--timeout", "0.5", KERNELS[0], "--", "true"], run.EXIT_TIMED_OUT, "still running after 0.5 s"),
        (["--memory", "none", KERNELS[0], "--", "true"], run.EXIT_NO_VERDICT, "was lost"),
        (["0.99", "--", "true"], run.EXIT_NO_VERDICT, "no kernel '0.99'"),
        (["--env", "K", KERNELS[0], "--", "true"], 2, "K=V expected"),
        ([KERNELS[0]], 2, "no COMMAND"),
    ],
)
def test_command_line_without_verdict(arguments: list[str], status: int, message: str) -> None:
    kernels.ensure(KERNELS[0])
    process = subprocess.run(
        [sys.executable, "-m", "tests.vm.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert message in process.stderr
    assert process.returncode == status


def test_first_failure_counts_and_kernels_have_headers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = {"6.1": 0, "6.12": 3, "7.2": 1}
    monkeypatch.setattr(run, "run", lambda kernel, *_, **__: statuses[kernel])
    assert run.main(["6.1", "6.12", "7.2", "--", "true"]) == 3
    assert capsys.readouterr().out.splitlines() == [f"=== kernel {name} ===" for name in statuses]


def test_only_whole_kernels_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTRUN_VM_CACHE", str(tmp_path))
    for name in (
        "6.12.99+deb12-amd64",
        "6.12.100+deb12-amd64",
        ".fetch-6.12.200",
        "6.12.101+deb12-cloud-amd64",
    ):
        (tmp_path / name).mkdir()
    newest = kernels.unpacked("6.12")
    assert newest is not None
    assert newest.release == "6.12.100+deb12-amd64"
    assert kernels.unpacked("6.1") is None


def test_newest_package_set() -> None:
    names = {
        *(
            "linux-image-7.2.9+deb14-amd64",
            "linux-modules-7.2.9+deb14-amd64",
            "linux-binary-7.2.9+deb14-amd64",
        ),
        *("linux-image-7.2.13+deb14-amd64", "linux-binary-7.2.13+deb14-amd64"),  # its modules are missing
        *("linux-image-6.1.0-9-amd64", "linux-image-6.1.0-50-cloud-amd64", "linux-image-6.1.0-10-amd64"),
    }
    newest = {name: kernels._newest(kernels.find(name), names) for name in ("6.1", "6.12", "7.2")}
    assert newest["6.1"] == ["linux-image-6.1.0-10-amd64"]
    assert newest["6.12"] == []
    assert newest["7.2"] == ["linux-binary-7.2.9+deb14-amd64", "linux-modules-7.2.9+deb14-amd64"]


@pytest.mark.parametrize(
    ("name", "text", "derived"),
    [
        ("a.list", "deb [arch=x] u old main\ndeb u old-updates main\n", "deb [arch=x] u new main\n"),
        ("a.sources", "URIs: x\nSuites: old old-updates\n\nSuites: old-security\n", "URIs: x\nSuites: new"),
        ("b.sources", "Suites: new-old old\n", "Suites: new\n\n\n"),
        ("c.sources", "Suites: folder/\n", ""),
    ],
)  # fmt: skip
def test_derived_sources(name: str, text: str, derived: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"VERSION_CODENAME": "old"})
    source = tmp_path / name
    source.write_text(text)
    kernels._derive_source(source, tmp_path / "derived", "new")
    assert (tmp_path / "derived").read_text().split() == derived.split()


def test_cpio_is_what_the_format_says() -> None:
    archive = b"".join(initramfs.cpio([initramfs.Entry("ab", 0o100644, b"xyz")]))
    header, name, data, rest = archive[:110], archive[110:116], archive[116:120], archive[120:]
    assert header[:6] == b"070701"
    assert [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in (1, 6, 11)] == [0o100644, 3, 3]  # mode, sizes
    assert (name, data) == (b"ab\0\0\0\0", b"xyz\0")  # each padded to a multiple of four
    assert rest[110:121] == b"TRAILER!!!\0"


def test_busybox_probe_wants_a_static_one() -> None:
    busybox = initramfs.find_busybox()
    assert busybox is not None
    assert initramfs.is_static(busybox)
    assert not initramfs.is_static(Path("/bin/sh"))


def test_not_a_kernel_is_not_extracted() -> None:
    with pytest.raises(image.NotExtractable):
        image.extract_vmlinux(bytes(4096))
