# SPDX-License-Identifier: Apache-2.0
"""Every shipped policy with the real tools it is for, and what it refuses them; what policies say about environment, umask,
workspace, budgets and hints.
"""

import base64
import functools
import hashlib
import http.server
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import zipfile
from pathlib import Path

import msgspec
import pytest

from agentrun import LimitError, Limits, Policy, UsageError, Workspace
from agentrun.hints import apply_hint
from agentrun.policy import DEFAULT, Filesystem, Process
from agentrun.policychecks import RLIMITS
from agentrun.policyfile import read_tables
from agentrun.policyresolve import resolve
from agentrun.policystore import PolicyStore
from agentrun.types import Hint
from agentrun.units import GIB, MIB
from agentrun_shim import landlock
from tests.requirements import lacking
from tests.support import FORK_STORM, PYTHON, with_executor

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
STORE = PolicyStore([ROOT / "policies"])


def needs(*programs: str):
    missing = [program for program in programs if shutil.which(program, path=os.defpath) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def project():
    """A git repository of root's, as people have them; below /opt, which a sandbox shows as it is."""
    with tempfile.TemporaryDirectory(prefix="agentrun-test-", dir="/opt") as name:
        path = Path(name)
        (path / "src").mkdir()
        (path / "src/main.c").write_text('#include "lib.h"\n#include <stdio.h>\nint main(void) { printf("%d\\n", six() * 7); }\n')
        (path / "src/lib.c").write_text('#include "lib.h"\nint six(void) { return 6; }\n')
        (path / "src/lib.h").write_text("int six(void); /* TODO: seven */\n")
        (path / "Makefile").write_text(
            "CFLAGS = -O2 -Wall -Werror\nprogram: src/main.o src/lib.o\n\t$(CC) -o $@ $^\nsrc/main.o src/lib.o: src/lib.h\n"
        )
        git = ["git", "-C", name, "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
        if shutil.which("git"):
            for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
                subprocess.run([*git, *command], check=True, timeout=60)
        yield path


def succeeds(result) -> str:
    """What a tool printed; it must have succeeded and complained about nothing."""
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout.decode()


# ---------------------------------------------------------------- looking: readonly, default, test, host-tools

LOOKING = ["readonly", "default", "build", "test", "host-tools", "strict"]


def may_run(executor, name: str) -> Policy | str:
    """A shipped policy by its name; as best effort if this host lacks what it insists on."""
    policy = STORE.find(name)
    if policy.best_effort or "memory" in executor.executor.tree.controllers or policy.limits == DEFAULT.limits:
        return name
    return msgspec.structs.replace(policy, best_effort=True)


@pytest.fixture(params=LOOKING)
def look(request, executor, project):
    """Run a command on the project, read-only, under one policy after the other."""
    workspace = Workspace(str(project), "ro")
    return functools.partial(executor.run, policy=may_run(executor, request.param), workspace=workspace)


def test_ls_and_cat(look, project):
    assert succeeds(look(["ls", "-R"])).split() == [".:", "Makefile", "src", "./src:", "lib.c", "lib.h", "main.c"]
    assert succeeds(look(["cat", "src/lib.h"])) == (project / "src/lib.h").read_text()


def test_grep_find_and_a_pipe(look):
    assert succeeds(look(["grep", "-rn", "TODO", "."])) == "./src/lib.h:1:int six(void); /* TODO: seven */\n"
    assert succeeds(look(["sh", "-c", "find src -name '*.c' | sort | xargs wc -l | tail -1"])).split() == ["5", "total"]


@needs("rg")
def test_ripgrep(look):
    assert succeeds(look(["rg", "--sort", "path", "-c", "six"])) == "src/lib.c:1\nsrc/lib.h:1\nsrc/main.c:1\n"


@needs("git")
def test_git(look, project):
    (project / "src/lib.c").write_text("changed\n")
    assert succeeds(look(["git", "status", "--porcelain"])) == " M src/lib.c\n"
    assert "+changed\n" in succeeds(look(["git", "diff"]))
    assert succeeds(look(["git", "log", "--format=%s"])) == "first\n"


@needs("node")
def test_node(look):
    assert succeeds(look(["node", "-e", "console.log(require('fs').readdirSync('src').length, 6 * 7)"])) == "3 42\n"


def test_python(look):
    script = "import hashlib, json, sqlite3, threading; t = threading.Thread(target=print, args=[6 * 7]); t.start(); t.join()"
    assert succeeds(look([PYTHON, "-c", script])) == "42\n"


@pytest.mark.parametrize("name", ["readonly", "strict"])
def test_looking_is_all_they_may(executor, project, name):
    policy = may_run(executor, name)
    with pytest.raises(
        UsageError, match=f"^workspace: policy {name} allows it read-only \\(say :ro, or :cow to change a copy\\)$"
    ):
        executor.run(["true"], policy=policy, workspace=str(project))
    result = executor.sh("echo x > new; echo x > Makefile; rm Makefile", policy=policy, workspace=Workspace(str(project), "ro"))
    assert result.returncode != 0
    assert result.stderr.count(b"Read-only file system") == 3
    assert not (project / "new").exists()


# ---------------------------------------------------------------- build


@needs("make", "cc")
def test_build_makes_a_c_project(executor, project):
    result = executor.run(["make", "-j4"], policy="build", workspace=str(project))
    assert result.returncode == 0, result
    built = project / "program"
    assert (built.stat().st_uid, built.stat().st_gid) == (os.geteuid(), os.getegid())
    assert succeeds(executor.run(["./program"], policy="build", workspace=str(project))) == "42\n"
    assert subprocess.run([built], capture_output=True, check=True, timeout=60).stdout == b"42\n"
    assert succeeds(executor.run(["make"], policy="build", workspace=str(project))) == "make: 'program' is up to date.\n"
    spoilt = executor.sh("echo 'int six(void) { return }' > src/lib.c && make", policy="build", workspace=str(project))
    assert spoilt.returncode == 2
    assert b"error:" in spoilt.stderr


@needs("npm", "node")
def test_build_installs_an_npm_package(executor, project):
    (project / "dep").mkdir()
    (project / "dep/package.json").write_text('{ "name": "dep", "version": "1.0.0", "main": "i.js" }')
    (project / "dep/i.js").write_text("module.exports = 42\n")
    (project / "package.json").write_text('{ "name": "x", "version": "1.0.0" }')
    command = ["npm", "install", "--offline", "--no-audit", "--no-fund", "--install-links", "./dep"]
    done = executor.run(command, policy="build", workspace=str(project), timeout=120)
    assert done.returncode == 0, done
    assert succeeds(executor.run(["node", "-p", "require('dep')"], policy="build", workspace=str(project))) == "42\n"


def make_wheel(directory: Path) -> str:
    """A wheel with one module and one program, made by hand: what an index would have."""
    files = {
        "tiny.py": "def main():\n    print('tiny and', 6 * 7)\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = [f"{name},sha256={digests[name]},{len(text)}" for name, text in files.items()]
    files["tiny-1.0.dist-info/RECORD"] = "\n".join([*record, "tiny-1.0.dist-info/RECORD,,", ""])
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(directory / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name


def test_build_installs_a_package_into_a_virtual_environment(executor, project):
    """venv and pip as they are, from an index (PEP 503) on disk: there is no network."""
    index = project / "simple" / "tiny"
    index.mkdir(parents=True)
    wheel = make_wheel(index)
    (index / "index.html").write_text(f'<!DOCTYPE html><html><body><a href="{wheel}">{wheel}</a></body></html>')
    build = functools.partial(executor.run, policy="build", workspace=str(project), timeout=120)
    made = build([PYTHON, "-m", "venv", "env"])
    if b"ensurepip is not available" in made.stdout:
        lacking("not installed: python3-venv")
    assert made.returncode == 0, made
    pip = ["env/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--index-url", f"file://{project}/simple"]
    done = build([*pip, "tiny"])
    assert b"Successfully installed tiny-1.0" in done.stdout, done
    assert succeeds(build(["env/bin/tiny"])) == "tiny and 42\n"
    assert {path.stat().st_uid for path in (project / "env").rglob("*")} == {os.geteuid()}
    targeted = build([*pip, "--target", "vendor", "tiny"])
    assert targeted.returncode == 0, targeted
    assert succeeds(build([PYTHON, "-c", "import tiny; tiny.main()"], env={"PYTHONPATH": "vendor"})) == "tiny and 42\n"
    assert b"No matching distribution found for nothing" in build([*pip, "nothing"]).stderr


# ---------------------------------------------------------------- test


@pytest.fixture
def venv(executor):
    """A Python with our virtual environment's packages that the sandbox sees, and its environment."""
    packages = next((ROOT / ".venv/lib").glob("python*/site-packages"), ROOT)
    # A virtual environment's own may be a link to one below /root or /home; then the system's, if it is of the same version.
    for python, env in ((str(ROOT / ".venv/bin/python"), {}), (PYTHON, {"PYTHONPATH": str(packages)})):
        seen = executor.run([python, "-c", "import pytest, hypothesis, msgspec"], workspace=Workspace(str(ROOT), "ro"), env=env)
        if seen.ok:
            return python, env
    return lacking(f"our virtual environment does not work in a sandbox: {seen.stderr.decode()[-200:]}")


def test_test_runs_our_own_unit_tests(executor, venv):
    python, env = venv
    command = [python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/test_capture.py"]
    env = {**env, "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis"}
    result = executor.run(command, policy="test", workspace=Workspace(str(ROOT), "ro"), env=env, timeout=120)
    assert result.returncode == 0, result
    assert b" passed" in result.stdout


def test_test_says_which_test_fails(executor, project):
    """And the suite may do what suites do: temporary files, threads, processes, a server on loopback."""
    for name in ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        shutil.copytree(Path(importlib.import_module(name).__file__).parent, project / "vendor" / name)
    shutil.copy(Path(importlib.import_module("py").__file__), project / "vendor")
    (project / "test_it.py").write_text(
        "import http.server, subprocess, sys, threading, urllib.request\n"
        "def test_server(tmp_path):\n"
        "    (tmp_path / 'f').write_text('served')\n"
        "    class Handler(http.server.SimpleHTTPRequestHandler):\n"
        "        def __init__(self, *a): super().__init__(*a, directory=tmp_path)\n"
        "    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:\n"
        "        threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "        url = f'http:' + f'//127.0.0.1:{server.server_port}/f'\n"
        "        assert urllib.request.urlopen(url).read() == b'served'\n"
        "        server.shutdown()\n"
        "def test_processes():\n"
        "    assert subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout == b'1\\n'\n"
        "def test_fails():\n"
        "    assert 6 * 7 == 43\n"
    )
    command, env = [PYTHON, "-m", "pytest", "-q", "test_it.py"], {"PYTHONPATH": "vendor"}
    result = executor.run(command, policy="test", workspace=str(project), env=env, timeout=120)
    assert result.returncode == 1, result.stderr.decode()
    assert result.stderr == b""
    assert b"FAILED test_it.py::test_fails - assert (6 * 7) == 43" in result.stdout
    assert b"1 failed, 2 passed" in result.stdout
    assert (project / ".pytest_cache").is_dir(), "the workspace is the suite's to write"


# ---------------------------------------------------------------- host-tools


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the host")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """An HTTP server on the host's loopback; its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


FETCH = "import sys, urllib.request; print(urllib.request.urlopen('http:' + '//' + sys.argv[1], timeout=5).read().decode())"


def test_host_tools_reach_the_hosts_loopback(executor, server):
    assert succeeds(executor.python(FETCH, server, policy="host-tools")) == "hello from the host\n"


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], sys.argv[2]), timeout=5)"


@pytest.mark.parametrize("name", ["default", "readonly", "test", "build", "strict"])
def test_the_others_do_not(executor, server, name):
    policy = may_run(executor, name)
    address, port = server.split(":")
    local = executor.python(CONNECT, address, port, policy=policy)
    remote = executor.python(CONNECT, "192.0.2.1", "80", policy=policy)
    assert (local.returncode, remote.returncode) == (1, 1)
    if name == "strict":  # there is not even a socket
        assert local.stderr.count(b"Address family not supported") == remote.stderr.count(b"Address family not supported") == 1
    else:
        assert b"ConnectionRefusedError" in local.stderr, "its loopback is its own"
        assert b"Network is unreachable" in remote.stderr


def test_host_tools_have_no_socket_of_the_hosts_services(executor):
    """No docker, no systemd: /run is the sandbox's own."""
    path = f"/run/agentrun-test-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            os.chmod(path, 0o777)
            listener.listen()
            connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            for place in (path, path.replace("/run", "/var/run")):
                assert b"FileNotFoundError" in executor.python(connect, place, policy="host-tools").stderr
        finally:
            os.unlink(path)


def test_abstract_sockets_of_the_host_are_in_reach_only_without_landlocks_scopes(executor):
    """What policies/host-tools.toml says of itself."""
    name = f"agentrun-test-{os.getpid()}"
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        assert executor.python(connect, policy="host-tools").ok == (landlock.version() < 6)
        assert not executor.python(connect).ok


def test_host_tools_know_the_proxy(monkeypatch):
    """What the daemon, or the embedding program, has."""
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.delenv("HTTP_PROXY", raising=False)

    async def check(executor):
        result = await executor.run(["env"], policy="host-tools")
        assert b"HTTPS_PROXY=proxy.example:3128\n" in result.stdout
        assert b"HTTP_PROXY=" not in result.stdout
        assert b"PROXY" not in (await executor.run(["env"])).stdout

    with_executor(check)


# ---------------------------------------------------------------- strict


@pytest.fixture
def strict(executor):
    return may_run(executor, "strict")


def test_strict_is_refused_where_it_cannot_be_held_to(executor):
    if "memory" in executor.executor.tree.controllers:
        result = executor.python("bytearray(400 << 20)", policy="strict")
        assert (result.outcome, result.verdict.reason) == ("memory_killed", "memory")
    else:
        with pytest.raises(LimitError, match=r"^memory\.max cannot be enforced here: "):
            executor.run(["true"], policy="strict")


def test_strict_bounds_processes(executor, strict):
    assert 28 <= int(succeeds(executor.python(FORK_STORM, policy=strict))) <= 32


def test_strict_bounds_what_is_written(executor, strict):
    result = executor.sh("head -c 40000000 /dev/zero > /tmp/a; head -c 30000000 /dev/zero > /tmp/b", policy=strict)
    assert b"File too large" in result.stderr or b"File size limit exceeded" in result.stderr, result
    result = executor.sh("for n in 1 2 3 4 5; do head -c 10000000 /dev/zero > /tmp/$n || exit $n; done", policy=strict)
    assert result.returncode == 4, "32 MB of scratch take three files of 10 MB"
    assert b"No space left on device" in result.stderr


def test_strict_bounds_descriptors_and_locked_memory(executor, strict):
    script = "import resource as r; print(*(r.getrlimit(n) for n in (r.RLIMIT_NOFILE, r.RLIMIT_MEMLOCK, r.RLIMIT_MSGQUEUE)))"
    assert succeeds(executor.python(script, policy=strict)) == "(256, 256) (65536, 65536) (0, 0)\n"


def test_strict_bounds_time(executor, strict):
    result = executor.python("while True: pass", policy=strict, timeout=1)
    assert result.outcome == "timed_out"
    script = "import resource as r; print(r.getrlimit(r.RLIMIT_CPU)[0])"
    assert succeeds(executor.python(script, policy=strict)) == "30\n"


def test_strict_lets_nobody_load_something_else(executor, strict):
    with pytest.raises(UsageError, match=r"^environment variable LD_PRELOAD: policy strict forbids to set it$"):
        executor.run(["true"], policy=strict, env={"LD_PRELOAD": "/tmp/evil.so"})
    assert executor.run(["true"], policy=strict, env={"LANG": "C"}).ok


@pytest.mark.skipif(not (ROOT / "policies/seccomp/strict.json").exists(), reason="the profile strict is not there")
def test_strict_has_no_ptrace(executor, strict):
    script = (
        "import ctypes, errno\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "PTRACE_TRACEME = 0\n"
        "print(libc.ptrace(PTRACE_TRACEME, 0, 0, 0), errno.errorcode.get(ctypes.get_errno()))\n"
    )
    assert succeeds(executor.python(script, policy=strict)) == "-1 EPERM\n"
    assert succeeds(executor.python(script)).startswith("0 "), "the test tests nothing"


# ---------------------------------------------------------------- environment and umask


def policy_with(**process) -> Policy:
    return Policy(name="mine", process=Process(**process))


def environment(executor, policy: Policy, **given: str) -> dict[str, str]:
    lines = succeeds(executor.run(["env", "-0"], policy=policy, env=given)).split("\0")
    return dict(line.split("=", 1) for line in lines if line)


def test_variables_that_are_passed_on(monkeypatch):
    monkeypatch.setenv("PASSED", "mine, with = and \n")
    monkeypatch.setenv("NOT_PASSED", "secret")
    monkeypatch.delenv("NOT_THERE", raising=False)

    async def check(executor):
        result = await executor.run(["env", "-0"], policy=policy_with(env_pass=("PASSED", "NOT_THERE")))
        assert b"PASSED=mine, with = and \n\0" in result.stdout
        assert b"NOT_PASSED" not in result.stdout
        assert b"NOT_THERE" not in result.stdout
        assert b"PASSED" not in (await executor.run(["env"])).stdout

    with_executor(check)


def test_variables_that_are_set(executor):
    policy = policy_with(env_set=(("LANG", "de_DE"), ("MINE", "é=1\n")))
    found = environment(executor, policy)
    assert (found["LANG"], found["MINE"]) == ("de_DE", "é=1\n")
    assert set(found) - set(environment(executor, DEFAULT)) == {"MINE"}
    assert environment(executor, policy, MINE="the caller's")["MINE"] == "the caller's"


def test_what_is_set_wins_over_what_is_passed(monkeypatch):
    monkeypatch.setenv("BOTH", "passed")

    async def check(executor):
        result = await executor.run(["printenv", "BOTH"], policy=policy_with(env_pass=("BOTH",), env_set=(("BOTH", "set"),)))
        assert result.stdout == b"set\n"

    with_executor(check)


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_", "TOKEN", "PATH"])
def test_variables_that_are_forbidden(executor, name):
    policy = policy_with(env_forbid=("LD_*", "TOKEN", "PATH"), env_set=(("TOKEN", "the policy's"),))
    with pytest.raises(UsageError, match=f"^environment variable {name}: policy mine forbids to set it$"):
        environment(executor, policy, **{name: "x", "OTHER": "y"})
    assert environment(executor, policy, LDX="1", TOKEN_2="2")["TOKEN"] == "the policy's"


def test_no_variable_at_all(executor):
    policy = policy_with(env_forbid=("*",))
    with pytest.raises(UsageError, match="environment variable A: policy mine"):
        environment(executor, policy, A="x")
    assert environment(executor, policy) == environment(executor, DEFAULT)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, "644"), (0o077, "600"), (0o002, "664"), (0, "666"), (0o777, "0")])
def test_the_umask(executor, project, umask, mode):
    script = 'umask; : > "$1"; stat -c %a "$1"'
    policy = policy_with(umask=umask)
    for path in ("/tmp/f", str(project / "f")):
        text = executor.text(script, path, policy=policy, workspace=str(project))
        assert text.split() == [f"{umask:04o}", mode]
    assert f"{(project / 'f').stat().st_mode & 0o777:o}" == mode


# ---------------------------------------------------------------- the extremes that a file may say


@pytest.mark.parametrize(
    "lines",
    [
        *(f"process.rlimits.{name} = {number}" for name, number in (("nofile", 16), ("as", 1 << 20), ("data", 1 << 20),
                                                                    ("stack", 64 << 10))),
        *(f"process.rlimits.{name} = {number}" for name in RLIMITS if name != "nproc" for number in (1 << 53, '"none"')),
        *(f"process.rlimits.{name} = 0" for name in RLIMITS if name not in ("nproc", "nofile", "as", "data", "stack")),
        "pids.max = 1", "pids.max = 4194304", 'fs.scratch = "1M"', 'fs.scratch = "1T"', 'fs.file_size = "1"', "time.cpu = 1",
        "process.user = 1", "process.user = 65535", "process.group = 65535", "process.groups = [0, 5, 5, 65535]",
        f'process.hostname = "{"a" * 63}"', "process.oom_score_adj = 0", "process.oom_score_adj = 1000",
        'fs.masked = ["/nowhere", "/etc/passwd", "/tmp", "/proc/self", "/dev/shm"]', "fs = { masked = [], read_only = [] }",
        'fs.read_only = ["/nowhere", "/proc", "/tmp", "/dev", "/home"]', 'memory = { swap = "none", max = "none" }',
    ],
)  # fmt: skip
def test_a_sandbox_can_be_built_of_what_loads(executor, lines):
    """The tool may not get far, but it is the tool that fails."""
    policy = resolve(read_tables(f'name = "x"\ndescription = "d"\nbest_effort = true\n{lines}'.encode(), "x.toml"), "x.toml")
    result = executor.run(["/bin/true"], policy=policy)
    out_of_time = "cpu = 0" in lines and result.signal in (signal.SIGKILL, signal.SIGXCPU)  # a clock tick may come before the end
    unloadable = result.outcome == "exited" and b"error while loading shared libraries" in result.stderr
    assert result.ok or unloadable or out_of_time, result


# ---------------------------------------------------------------- workspace


@pytest.mark.parametrize(
    ("most", "asked", "text"),
    [
        ("none", "ro", "workspace: policy mine allows none"),
        ("none", "rw", "workspace: policy mine allows none"),
        ("ro", "rw", "workspace: policy mine allows it read-only (say :ro, or :cow to change a copy)"),
        ("ro", "ro", None), ("rw", "ro", None), ("rw", "rw", None),
    ],
)  # fmt: skip
def test_the_workspace_a_policy_allows(executor, project, most, asked, text):
    policy = Policy(name="mine", fs=Filesystem(workspace=most))
    workspace = Workspace(str(project), asked)
    if text is not None:
        with pytest.raises(UsageError) as caught:
            executor.run(["true"], policy=policy, workspace=workspace)
        assert str(caught.value) == text
        return
    result = executor.sh("cat src/lib.h && echo x > new", policy=policy, workspace=workspace)
    assert result.stdout == (project / "src/lib.h").read_bytes()
    assert result.ok == (project / "new").exists() == (asked == "rw")


def test_a_call_without_a_workspace_needs_none(executor):
    assert executor.run(["true"], policy=Policy(name="mine", fs=Filesystem(workspace="none"))).ok


# ---------------------------------------------------------------- budgets and hints

BUDGET = Limits(memory_max=256 * MIB, memory_swap_max=None, pids_max=None)


def with_budget(function):
    with_executor(function, tenant_limits={"small": BUDGET})


def enforced(executor) -> bool:
    return "memory" in executor.tree.controllers


def test_a_policy_beyond_the_tenants_budget():
    async def check(executor):
        with pytest.raises(UsageError) as caught:
            await executor.run(["true"], policy="build", tenant="small")
        assert str(caught.value) == "policy build: memory.max: 4G is above the budget of tenant 'small', 256M"
        assert (await executor.run(["true"], policy="build", tenant="other")).ok
        assert (await executor.run(["true"], tenant="small")).ok, "the built-in default asks for nothing"
        fits = Policy(name="fits", limits=Limits(memory_max=256 * MIB), best_effort=True)
        assert (await executor.run(["true"], policy=fits, tenant="small")).ok

    with_budget(check)


@pytest.mark.parametrize(
    ("hint", "policy", "size"),
    [
        ("memory:low", "default", 256 * MIB),
        ("memory:medium", "default", GIB),
        ("memory:high", "default", 8 * GIB),
        ("memory=high", "default", 8 * GIB),
        ("memory:3g", "default", 3 * GIB),
        ("memory:128m", "default", 128 * MIB),
        ("memory:high", "readonly", 512 * MIB),
    ],
)
def test_a_hint(executor, hint, policy, size):
    result = executor.sh("cat /sys/fs/cgroup/memory.max || true", policy=policy, hint=hint)
    assert result.hint == Hint(asked=f"memory:{hint[7:]}", memory_max=size, clamped_to=None)
    if enforced(executor.executor):
        assert int(result.stdout) == size
    else:
        assert "memory.max" in [item.limit for item in result.unenforced]


def test_no_hint_is_none(executor):
    assert executor.run(["true"]).hint is None


def test_a_hint_is_clamped_to_the_tenants_budget():
    async def check(executor):
        for hint, size, clamp in (("high", 256 * MIB, "tenant"), ("4g", 256 * MIB, "tenant"), ("low", 256 * MIB, None),
                                  ("100m", 100 * MIB, None)):  # fmt: skip
            result = await executor.run(["cat", "/sys/fs/cgroup/memory.max"], tenant="small", hint=f"memory:{hint}")
            assert result.hint == Hint(asked=f"memory:{hint}", memory_max=size, clamped_to=clamp)
            if enforced(executor):
                assert int(result.stdout) == size
        result = await executor.run(["true"], tenant="small", hint="memory:high", policy="build")
        assert (result.ok, result.hint.memory_max) == (True, 256 * MIB), "a hint brings a large policy into a small budget"

    with_budget(check)


@pytest.mark.parametrize(
    "hint", ["memory", "memory:", "cpu:high", "memory:enormous", "memory:0", "high", "memory:-1g", "\x1b[2J\n"]
)
def test_what_is_no_hint(executor, hint):
    with pytest.raises(UsageError, match=r"^hint: ") as caught:
        executor.run(["true"], hint=hint)
    assert str(caught.value).isprintable()


def test_a_hint_scales_a_burst_with_it(executor):
    """The steady part keeps its share of what the hint asks for: of `test`'s 4 GB it is 1."""
    assert STORE.find("test").limits.memory_high == GIB
    policy, hint = apply_hint(STORE.find("test"), "memory:2g", None)
    limits = policy.limits
    assert (hint.memory_max, limits.memory_max, limits.memory_high) == (2 * GIB, 2 * GIB, GIB // 2)
    assert (limits.memory_burst, limits.burst_seconds) == (3 * GIB // 2, 30)
    assert executor.run(["true"], policy="test", hint="memory:2g").hint == hint
