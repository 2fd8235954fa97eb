# SPDX-License-Identifier: Apache-2.0
"""The systemd units: checked by systemd itself, and the directives the design rests on checked one by one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
NAMES = ("agentrun.service", "agentrun.socket", "agentrun.slice")
CAPABILITY_HEADER = Path("/usr/include/linux/capability.h")


def settings(name: str) -> dict[str, list[str]]:
    """Every `Section.Key` of a unit with its values, in order: systemd repeats keys, so no configparser."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (UNITS / name).read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(f"{section}.{match[1]}", []).append(match[2])
        else:
            assert line == "" or line.startswith("#"), f"{name}: {line!r}"
    return found


def verify(directory: Path) -> subprocess.CompletedProcess[str]:
    """`systemd-analyze verify` on the units in `directory`, with nothing of the host's locale or pager."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if "CI" in os.environ:
            pytest.fail("systemd-analyze is missing, and CI must run it")
        pytest.skip("systemd-analyze is not installed")
    environment = {"PATH": os.defpath, "LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_PAGER": ""}
    command = [tool, "verify", *(str(directory / name) for name in NAMES)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """The units, with an ExecStart that exists."""
    for name in NAMES:
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("ExecStart=/usr/bin/agentrun ", "ExecStart=/bin/true "))
    return tmp_path


def test_systemd_accepts_the_units_without_a_warning(copies: Path) -> None:
    result = verify(copies)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "line", "broken"),
    [
        ("agentrun.service", "OOMPolicy=continue", "OOMPolicy=forgive"),
        ("agentrun.service", "Delegate=yes", "DelegateMore=yes"),
        ("agentrun.service", "ExecStart=/bin/true", "ExecStart=/nonexistent"),
        ("agentrun.socket", "SocketMode=0600", "SocketMode=rw"),
    ],
)
def test_systemd_would_have_warned(copies: Path, name: str, line: str, broken: str) -> None:
    """It exits 0 on most mistakes, so the test above reads what it prints: here it has something to print."""
    text = (copies / name).read_text()
    assert text.count(f"\n{line}") == 1
    (copies / name).write_text(text.replace(f"\n{line}", f"\n{broken}"))
    result = verify(copies)
    assert result.returncode != 0 or name in result.stderr


@pytest.mark.parametrize(
    ("name", "directive", "values"),
    [
        ("agentrun.service", "Service.Type", ["notify"]),
        ("agentrun.service", "Service.NotifyAccess", ["main"]),
        ("agentrun.service", "Service.ExecStart", ["/usr/bin/agentrun daemon"]),
        ("agentrun.service", "Service.Delegate", ["yes"]),
        ("agentrun.service", "Service.Slice", ["agentrun.slice"]),
        ("agentrun.service", "Service.OOMPolicy", ["continue"]),
        ("agentrun.service", "Service.ManagedOOMPreference", ["avoid"]),
        ("agentrun.service", "Service.KillMode", ["mixed"]),
        ("agentrun.service", "Service.Restart", ["on-failure"]),
        ("agentrun.service", "Service.TasksMax", ["infinity"]),
        ("agentrun.service", "Service.LimitNOFILE", ["1048576"]),
        ("agentrun.service", "Service.Nice", ["-10"]),
        ("agentrun.service", "Service.RuntimeDirectory", ["agentrun"]),
        ("agentrun.service", "Service.RuntimeDirectoryMode", ["0700"]),
        ("agentrun.service", "Service.RuntimeDirectoryPreserve", ["yes"]),
        ("agentrun.service", "Service.NoNewPrivileges", ["yes"]),
        ("agentrun.service", "Unit.Requires", ["agentrun.socket"]),
        ("agentrun.service", "Install.Also", ["agentrun.socket"]),
        ("agentrun.socket", "Socket.ListenStream", ["/run/agentrun/agentrun.sock"]),
        ("agentrun.socket", "Socket.SocketMode", ["0600"]),
        ("agentrun.socket", "Socket.DirectoryMode", ["0700"]),
    ],
)
def test_the_directive_the_design_rests_on(name: str, directive: str, values: list[str]) -> None:
    assert settings(name).get(directive) == values


def test_nothing_unshares_or_filters_the_daemon() -> None:
    """Each of these means a mount or user namespace of its own, or something every tool would inherit."""
    harmful = re.compile(
        "Private|Protect|ReadWrite|ReadOnly|Inaccessible|Bind|TemporaryFileSystem|RootDirectory|MountFlags"
        "|Restrict[A-Z]|SystemCall|LockPersonality|MemoryDenyWriteExecute|DynamicUser|OOMScoreAdjust|MemoryMax"
    )
    present = [key for key in settings("agentrun.service") if harmful.match(key.removeprefix("Service."))]
    assert present == []


def test_capabilities_are_dropped_by_name_and_none_the_daemon_needs() -> None:
    dropped: set[str] = set()
    for line in settings("agentrun.service")["Service.CapabilityBoundingSet"]:
        assert line.startswith("~"), "one plain line would mean: only these"
        dropped |= set(line[1:].split())
    if CAPABILITY_HEADER.exists():  # systemd says nothing about a name it does not know
        assert dropped <= set(re.findall(r"#define (CAP_\w+)", CAPABILITY_HEADER.read_text()))
    needed = """CAP_SYS_ADMIN CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_NICE CAP_SYS_RESOURCE CAP_BPF CAP_PERFMON
    CAP_SYSLOG CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_SETFCAP CAP_CHOWN CAP_FOWNER CAP_FSETID
    CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_KILL CAP_MKNOD"""
    assert not dropped & set(needed.split())


def test_every_unit_is_documented_and_says_its_license() -> None:
    for name in NAMES:
        assert settings(name)["Unit.Documentation"]
        assert (UNITS / name).read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
