# SPDX-License-Identifier: Apache-2.0
"""``agentrun policy``: what it prints, and what it exits with."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from agentrun.policystore import PolicyStore
from tests.requirements import lacking
from tests.support import BIN, CLIENT

SHIPPED = Path(__file__).parents[2] / "policies"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


class Shell:
    """The command line, with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.own = home / "agentrun" / "policies"
        self.own.mkdir(parents=True)
        self.env = {**os.environ, "XDG_CONFIG_HOME": str(home)}

    def run(self, *args: object, program: object = BIN / "agentrun-cli") -> subprocess.CompletedProcess:
        command = [program, "policy", *map(str, args)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False, cwd=self.own)

    def prints(self, *args: object, code: int = 0) -> str:
        done = self.run(*args)
        assert (done.returncode, done.stderr) == (code, "")
        return done.stdout

    def complains(self, *args: object) -> list[str]:
        done = self.run(*args)
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert all(line.isprintable() for line in lines)
        return lines

    def write(self, name: str, more: str = "", *, called: str = "") -> Path:
        path = self.own / f"{name}.toml"
        path.write_text(f'name = "{called or name}"\ndescription = "my own"\n{more}')
        return path


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_the_list(shell):
    mine, broken = shell.write("default", "pids.max = 3"), shell.write("broken", "pids.max = 0")
    lines = shell.prints("list").splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert {*NAMES, "broken"} <= set(names)
    assert names == sorted(names)
    at = next(number for number, line in enumerate(lines) if line.startswith("default "))
    assert lines[at].endswith("  my own")
    assert lines[at + 1].strip().startswith(f"{mine}, overrides ")
    assert lines[at + 1].endswith(f", overrides {SHIPPED}/default.toml")
    at = next(number for number, line in enumerate(lines) if line.startswith("broken "))
    assert f"does not load: {broken}: pids.max: 0 is not a whole number" in lines[at]


def test_the_list_as_json(shell):
    mine = shell.write("default", "pids.max = 3")
    shell.write("broken", "x")
    rows = {row["name"]: row for row in json.loads(shell.prints("list", "--json"))}
    assert rows["default"]["file"] == str(mine)
    assert rows["default"]["overrides"][-1] == f"{SHIPPED}/default.toml"
    assert (rows["default"]["description"], rows["default"]["error"]) == ("my own", None)
    assert rows["broken"]["description"] is None
    assert rows["broken"]["error"].startswith("does not load: ")
    assert rows["strict"]["overrides"] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_is_shown_loads_to_the_same(shell, name):
    text = shell.prints("show", SHIPPED / f"{name}.toml")
    (shell.own / f"{name}.toml").write_text(text)
    store = PolicyStore([shell.own])
    assert store.find(name) == PolicyStore([SHIPPED]).find(name)
    assert f"as {shell.own}/{name}.toml resolves" in shell.prints("show", name).splitlines()[0]


def test_a_policy_that_extends_is_shown_whole(shell):
    shell.write("mine", 'extends = "strict"\npids.max = 3')
    tree = tomllib.loads(shell.prints("show", "mine"))
    assert "extends" not in tree
    assert (tree["pids"]["max"], tree["memory"]["max"], tree["seccomp"]["profile"]) == (3, "256M", "strict")
    assert json.loads(shell.prints("show", "mine", "--json"))["limits"]["pids_max"] == 3


def test_a_name_may_be_a_file(shell):
    shell.write("mine")
    for name in ("mine", "mine.toml", "./mine.toml", shell.own / "mine.toml"):
        assert 'name = "mine"\n' in shell.prints("show", name)


def test_policies_that_load(shell):
    path = shell.write("mine")
    assert shell.prints("check", "mine", "strict") == f"{path}: ok\n{SHIPPED}/strict.toml: ok\n"
    everything = shell.prints("check").splitlines()
    assert {f"{path}: ok", *(f"{SHIPPED}/{name}.toml: ok" for name in NAMES)} <= set(everything)


def test_a_line_for_each_that_does_not(shell):
    good, bad = shell.write("good"), shell.write("bad", 'memory.high = "3G"')
    done = shell.run("check", "bad", "good", "nope", "/dev/zero", "a\x1b[2J.toml")
    assert done.returncode == 2
    assert done.stdout == f"{good}: ok\n"
    first, second, third, fourth = done.stderr.splitlines()
    assert first.startswith(f'{bad}: memory.high: "3G" is above memory.max, "2G"')
    assert second.startswith('policy: there is no policy "nope" (known: ')
    assert third == "/dev/zero: not a regular file"
    assert fourth == '"a\\u001b[2J.toml": No such file or directory'
    assert shell.run("check").returncode == 2


def test_a_profile_that_is_not_there_or_is_none(shell, tmp_path):
    """No call has to find out."""
    (tmp_path / "p.json").write_text("{}")
    for profile, words in (("nope", "no such profile"), (f"{tmp_path}/no.json", "No such file"), (f"{tmp_path}/p.json", "")):
        path = shell.write("mine", f'seccomp.profile = "{profile}"')
        (line,) = shell.complains("check", "mine")
        assert line.startswith(f"{path}: seccomp.profile: ")
        assert words in line
    shipped = SHIPPED / "seccomp" / "strict.json"
    shell.write("mine", f'seccomp.profile = "{shipped}"')
    shell.prints("check", "mine")


@pytest.mark.host
def test_what_this_host_does_not_enforce(shell):
    """Whatever it is: a line each, after the policy; and what the policy itself asks for is refused, unless it need not be."""
    path, soft = shell.write("mine", "cpu.max = 1\ncpu.weight = 7"), shell.write("soft", 'extends = "mine"\nbest_effort = true')
    first, *lines = shell.prints("check", "--host", "mine").splitlines()
    assert first == f"{path}: ok"
    for line in lines:
        asked = line.startswith(f"{path}: cpu.")
        assert f" is not enforced here, calls {'are refused' if asked else 'run without it'}: " in line
    others = shell.prints("check", "--host", "soft").splitlines()[1:]
    assert [line.split(": ")[:2] for line in others] == [
        [str(soft), line.split(": ")[1].replace("are refused", "run without it")] for line in lines
    ]


def test_what_differs(shell):
    shell.write("mine", 'extends = "strict"\npids.max = 3\nprocess.env.set.A = "1"\nprocess.rlimits.nofile = [100, 256]')
    assert shell.prints("diff", "strict", "mine", code=1).splitlines() == [
        "pids.max: 32 → 3",
        "process.rlimits.nofile: 256 → [100, 256]",
        'process.env.set.A: (not set) → "1"',
    ]
    assert json.loads(shell.prints("diff", "strict", "mine", "--json", code=1))[0] == {"key": "pids.max", "old": "32", "new": "3"}
    assert shell.prints("diff", "strict", "strict") == ""
    assert shell.prints("diff", "strict", "strict", "--json") == "[]\n"


def test_the_schema(shell):
    schema = json.loads(shell.prints("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    for name in NAMES:
        judge.validate(tomllib.loads((SHIPPED / f"{name}.toml").read_text()))
    assert not judge.is_valid({"name": "x"})


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "the following arguments are required: ACTION"),
        (("nope",), "invalid choice"),
        (("show",), "the following arguments are required: NAME"),
        (("show", "nope"), 'agentrun: policy: there is no policy "nope" (known: '),
        (("show", "a", "b"), "unrecognized arguments: b"),
        (("diff", "strict"), "the following arguments are required: B"),
        (("diff", "strict", "nope"), 'agentrun: policy: there is no policy "nope"'),
        (("list", "--nope"), "unrecognized arguments: --nope"),
    ],
)
def test_wrong_usage(shell, args, words):
    assert words in shell.complains(*args)[-1]


def test_it_is_a_verb_of_the_native_client(shell):
    if not Path(CLIENT).exists():
        lacking("the native client is not built (make build)")
    shell.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = shell.run("show", "strict", program=CLIENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'name = "strict"' in done.stdout


def test_letters_that_the_terminal_has_not(shell):
    shell.write("mine", 'process.env.set.A = "é"')
    shell.env["PYTHONIOENCODING"] = "ascii"
    assert 'A = "\\xe9"' in shell.prints("show", "mine")
    assert shell.prints("diff", "default", "mine", code=1) == 'process.env.set.A: (not set) \\u2192 "\\xe9"\n'


def test_a_reader_that_goes_away_is_no_traceback(shell):
    command = f"{BIN / 'agentrun-cli'} policy schema | head -1"
    done = subprocess.run(command, shell=True, env=shell.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- and exec --policy


@pytest.mark.host
def test_a_call_under_a_policy_of_a_name_or_a_file(daemon, shell):
    assert daemon.exec("--policy", "readonly", "--", "sh", "-c", "echo x > /tmp/f && echo well").stdout == b"well\n"
    path = shell.write("mine", 'process.env.set.MINE = "1"\nprocess.hostname = "mine"')
    done = daemon.exec("--policy", str(path), "--", "sh", "-c", "echo $MINE; uname -n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1\nmine\n", b"")


@pytest.mark.host
def test_a_policy_that_does_not_load_is_no_call(daemon, shell):
    path = shell.write("bad", "pids.max = 0")
    done = daemon.exec("--policy", str(path), "--", "true")
    assert done.returncode == 2
    expected = f"{path}: pids.max: 0 is not a whole number from 1 to 4194304"
    assert done.stderr.decode().removeprefix("agentrun: ").startswith(expected)
    assert done.stderr.count(b"\n") == 1
    done = daemon.exec("--policy", "nope", "--", "true")
    assert done.returncode == 2
    assert b'there is no policy "nope" (known: build, default, ' in done.stderr


@pytest.mark.host
def test_a_workspace_that_the_policy_does_not_allow(daemon, tmp_path):
    done = daemon.exec("--policy", "readonly", "--workspace", str(tmp_path), "--", "true")
    assert done.returncode == 2
    assert done.stderr == b"agentrun: workspace: policy readonly allows it read-only (say :ro, or :cow to change a copy)\n"
    assert daemon.exec("--policy", "readonly", "--workspace", f"{tmp_path}:ro", "--", "true").returncode == 0


@pytest.mark.host
def test_strict_without_what_it_needs(daemon):
    """It is refused, and runs if that is said to be good enough."""
    controllers = daemon.ask(op="status")["data"]["controllers"]
    done = daemon.exec("--policy", "strict", "--", "true")
    if "memory" in controllers:
        assert done.returncode == 0
    else:
        assert done.returncode == 125
        assert b"memory.max cannot be enforced here" in done.stderr
    assert daemon.exec("--policy", "strict", "--best-effort", "--", "true").returncode == 0
