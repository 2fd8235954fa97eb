# SPDX-License-Identifier: Apache-2.0
"""`agentrun lat`, `--timings`, metrics: of a daemon without a probes process. With one: tests/kernel/test_latency.py."""

import socket

import pytest

from agentrun.latency import PHASES
from tests.support import open_daemon, result_of

pytestmark = pytest.mark.host


def test_lat_says_that_nothing_is_recorded(daemon):
    done = daemon.cli("lat")
    assert (done.returncode, done.stdout) == (125, "")
    assert "records no phases" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0"], "interval: not a positive number"),
        (["-p", "naptime"], "phase: there is no naptime"),
        (["1", "0"], "count: not a positive number"),
    ],
)
def test_wrong_usage_of_lat(daemon, words, message):
    done = daemon.cli("lat", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_timings_are_null_where_nothing_is_recorded(daemon):
    assert result_of(daemon.exec("--json", "--timings", "--", "true"))["phases"] == dict.fromkeys(PHASES)
    assert result_of(daemon.exec("--json", "--", "true"))["phases"] is None
    done = daemon.exec("--timings=1", "--", "true")
    assert (done.returncode, done.stderr) == (2, b"agentrun: option '--timings' takes no value (see agentrun exec --help)\n")


def test_metrics_on_a_unix_socket(tmp_path):
    path = tmp_path / "metrics"
    with open_daemon(config=f'metrics = "{path}"') as running:
        running.works()
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: agentrun\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert b"\nagentrun_calls_total 1\n" in answer
        assert b"\nagentrun_probes_recording 0\n" in answer
    assert not path.exists()
