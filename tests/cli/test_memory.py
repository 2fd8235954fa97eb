# SPDX-License-Identifier: Apache-2.0
"""Memory control from the command line: a daemon with its probes process, and what it tells of bursts, usage and phases."""

import json
import subprocess

import pytest

from tests.hog import compile_hog
from tests.kernel.wall import public_directory
from tests.requirements import lacking
from tests.support import BIN, eventually, missing_requirement, open_daemon, result_of

pytestmark = pytest.mark.host

POLICY = """
name = "burst"
description = "64 MB, half as much again for a second."
memory = { high = "64M", burst = "32M", burst_seconds = 1, max = "1G", on_exhausted = "stop", freeze_seconds = 0.5 }
"""


@pytest.fixture(scope="module")
def probing():
    if reason := missing_requirement():
        lacking(reason)
    with open_daemon(config="probes = true") as running:
        memory = running.ask(op="status")["data"]["memory"]
        if not memory["hook"]:
            lacking(f"no program could be attached: {memory['refused']}")
        yield running


@pytest.fixture(scope="module")
def files():
    with public_directory() as directory:
        (directory / "burst.toml").write_text(POLICY)
        yield str(compile_hog(directory)), str(directory / "burst.toml")


def test_strict_is_not_refused(probing):
    """Its limits hold here, with or without a memory controller."""
    result = result_of(probing.exec("--json", "--policy", "strict", "--", "true"))
    assert result["outcome"] == "exited"
    assert result["memory_mode"] in ("bpf", "controller+bpf")
    assert not [item for item in result["unenforced"] if item["limit"].startswith("memory.")]


def test_the_story_of_a_burst(probing, files):
    """Told three times: as it happens, in the result, and to whoever looks meanwhile."""
    hog, policy = files
    with subprocess.Popen([BIN / "agentrun", "bursts", "--json"], env=probing.env, stdout=subprocess.PIPE, text=True) as stream:
        try:
            assert json.loads(stream.stdout.readline())["event"] == "listening"
            call = subprocess.Popen(
                [BIN / "agentrun", "exec", "--json", "--policy", policy, "--", hog, "hold", "80"],
                env=probing.env, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            with call:
                granted = lambda: [row for row in probing.ask(op="top")["data"]["calls"] if row["rung"] == "granted"]  # noqa: E731
                rows = eventually(granted, "granted")
                said, _ = call.communicate(timeout=20)
            result = json.loads(said)
            steps = []
            while "killed" not in steps:
                news = json.loads(stream.stdout.readline())
                steps += [news["rung"]] if news["event"] == "step" else []
                assert (news["tenant"], news["argv"][0]) == ("default", hog)
        finally:
            stream.terminate()
    assert rows[0]["memory"] > 64 << 20
    assert 0 <= rows[0]["credit"] <= 1
    assert steps == ["granted", "frozen", "killed"]
    assert [step["rung"] for step in result["bursts"]] == steps
    assert result["outcome"] == "memory_killed"
    assert call.returncode == 137


def test_top_prints_a_row_for_each_call(probing, files):
    hog, policy = files
    with subprocess.Popen([BIN / "agentrun", "exec", "--policy", policy, "--", hog, "hold", "16"], env=probing.env) as call:
        try:
            eventually(lambda: probing.ask(op="top")["data"]["calls"], "it runs")
            done = probing.cli("top", "0.1", "2")
            assert done.returncode == 0, done
            assert done.stdout.count(hog) == 2
            assert "memory is held by: " in done.stdout
        finally:
            call.terminate()


def test_phases_are_recorded(probing):
    eventually(lambda: result_of(probing.exec("--json", "--timings", "--", "true"))["phases"]["exec"], "a phase")
    done = probing.cli("lat", "-p", "exec")
    assert "usecs" in done.stdout, done


@pytest.mark.parametrize("words", [("bursts", "--count", "0"), ("top", "-1"), ("top", "1", "0"), ("lat", "0")])
def test_numbers_that_are_none(probing, words):
    done = probing.cli(*words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 or "usage" in done.stderr


def test_doctor_names_the_mode(probing):
    report = json.loads(probing.cli("doctor", "--json").stdout)
    found = {finding["feature"]: finding for finding in report["findings"]}
    assert "mode " in found["memory control"]["detail"]
    assert found["programs in the kernel"]["state"] == "works"


@pytest.mark.parametrize("words", [["lat"], ["lat", "0.1", "1"], ["bursts", "--count", "1"], ["top", "1", "1"], ["stats"]])
def test_a_full_disk_is_one_line(probing, words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [BIN / "agentrun", *words], env=probing.env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False
        )
    assert (done.returncode, done.stderr) == (125, f"agentrun: {words[0]}: No space left on device\n")
