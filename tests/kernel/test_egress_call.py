# SPDX-License-Identifier: Apache-2.0
"""A policy's hosts from where a call sees them: through the executor and the client, with a server of this machine."""

import http.server
import threading

import pytest

from agentrun import Policy, UsageError
from agentrun.policy import Egress, Process
from tests.support import open_daemon

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    """An HTTP server on the host's loopback, which a policy reaches only by pinning a name to it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"page " + self.headers["Host"].encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def egress(port: int) -> Policy:
    rules = Egress(allow=(f"files.test:{port}",), hosts=(("files.test", "127.0.0.1"),))
    return Policy(name="fetch", net="egress", egress=rules, process=Process(hostname="box"))


def test_an_allowed_host_and_nothing_else(executor, server):
    script = f"""
import socket, urllib.request
print(urllib.request.urlopen("http://files.test:{server}/", timeout=10).read().decode())
for target in (("127.0.0.1", {server}), ("files.test", 81), ("other.test", 80), ("192.0.2.1", {server}), ("169.254.169.254", 80)):
    try:
        socket.create_connection(target, timeout=10)
        print("connected", target)
    except OSError as error:
        print(type(error).__name__)
"""
    result = executor.python(script, policy=egress(server))
    assert result.stdout.decode().split("\n") == [
        f"page files.test:{server}", "ConnectionRefusedError", "ConnectionRefusedError", "gaierror", "ConnectionRefusedError",
        "ConnectionRefusedError", "",
    ]  # fmt: skip
    denied = {d.what: d.reason for d in result.denied if d.kind == "network"}
    assert set(denied) == {"files.test:81", "other.test", f"192.0.2.1:{server}", "169.254.169.254:80"}
    assert "metadata" in denied["169.254.169.254:80"]
    assert str(server) in denied["files.test:81"]


def test_calls_do_not_see_each_others_refusals(executor, server):
    policy = egress(server)
    assert [d.what for d in executor.sh("getent hosts one.test", policy=policy).denied] == ["one.test"]
    assert [d.what for d in executor.sh("getent hosts two.test", policy=policy).denied] == ["two.test"]
    assert executor.sh("getent hosts box localhost", policy=policy).denied == ()


def test_without_egress_the_same_call_reaches_nothing(executor, server):
    result = executor.python(f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{server}/')")
    assert result.exit_code == 1
    assert b"Connection refused" in result.stderr


@pytest.mark.parametrize(("rule", "text"), [("1.2.3.4:80", "1.2.3.4"), ("a.test", "a.test"), ("a.test:99999", "99999")])
def test_a_rule_that_is_none_is_named(executor, rule, text):
    with pytest.raises(UsageError, match=r"policy web: net\.allow") as caught:
        executor.sh(":", policy=Policy(name="web", net="egress", egress=Egress(allow=(rule,))))
    assert text in str(caught.value)


def test_through_the_daemon(tmp_path, server):
    file = tmp_path / "fetch.toml"
    file.write_text(
        'name = "fetch"\ndescription = "d"\n[net]\nmode = "egress"\n'
        f'allow = ["files.test:{server}"]\nhosts = {{"files.test" = "127.0.0.1"}}\n'
    )
    with open_daemon() as daemon:
        fetch = f"import urllib.request as r; print(r.urlopen('http://files.test:{server}/').read())"
        for _ in range(3):  # the first from a sandbox that is built for it, the others from warm ones
            done = daemon.exec("--policy", str(file), "--", "python3", "-c", fetch)
            assert (done.returncode, done.stdout) == (0, f"b'page files.test:{server}'\n".encode())
