# SPDX-License-Identifier: Apache-2.0
"""The escape suite's machinery: the same attack outside and inside, and how far it got in both places.

``outside`` is the host's root with no sandbox at all, in throw-away mount, IPC, network and UTS namespaces so that nothing
of an attack stays behind; ``inside`` is a tool call with the default policy. An attack is an ordinary function of a test
file: its first argument is an ``attacker.Attacker``, it may use the names of attacker.py, and it is sent as source text.
"""

from __future__ import annotations

import inspect
import os
import secrets
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentrun_shim.syscall_table import NUMBERS
from tests.kernel import attacker
from tests.support import PATIENCE, PYTHON, Blocking

DISPOSABLE = "AGENTRUN_VM" in os.environ
"""This machine is a guest of the VM lane: the half without the wall may do what would harm a host."""
NOT_REACHED = "-"
NOBODY = 54321
"""A user and group that nobody here is."""

Attack = Callable[..., None]
Outcomes = dict[str, str]
_SOURCE = Path(attacker.__file__).read_text()


class BrokenAttack(Exception):
    """The attack itself failed: no verdict about the wall."""


class Hole(AssertionError):
    """Outside everything was as expected, and inside something got through. The one failure that ``hole`` tolerates."""


def hole(reason: str, *, where: bool = True) -> pytest.MarkDecorator:
    """A test of a wall that is not there yet, or not here. It fails as soon as the wall stands, or the attack is broken."""
    return pytest.mark.xfail(where, strict=True, raises=Hole, reason=f"hole: {reason}")


def program(how: str, where: str, *args: str) -> list[str]:
    """The command that runs the attacker."""
    return [PYTHON, "-I", "-S", "-c", _SOURCE, f"{how} {where}", repr(NUMBERS), *args]


def request(attack: Attack, params: Mapping[str, Any], *more: object) -> str:
    """An attack as the attacker reads it."""
    return repr((inspect.getsource(attack), attack.__name__, dict(params), *more))


def outcomes(said: list[tuple[Any, ...]], status: int) -> Outcomes:
    """Step → how it ended: ``ok``, an errno, a signal's name, or the step's own word.

    Raises:
        BrokenAttack: it ended in another way.
    """
    found: Outcomes = {}
    pending = None
    for kind, *words in said:
        if kind == "broken":
            raise BrokenAttack(words[0])
        if kind == "begin":
            (pending,) = words
        else:
            pending = None
            found[words[0]] = words[1]
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and pending is not None:
        found[pending] = signal.Signals(-code).name
    elif code != 0 or pending is not None:
        raise BrokenAttack(f"it ended with {code} after {found}, in {pending}")
    return found


class Attackers:
    """A process that tries attacks, one at a time, over two pipes. ``start`` gives it its ends, and is called in a thread."""

    def __init__(self, start: Callable[[int, int], None]) -> None:
        stdin, self._requests = os.pipe2(os.O_CLOEXEC)
        answers, stdout = os.pipe2(os.O_CLOEXEC)
        self._answers = os.fdopen(answers, "rb")
        self._failure: BaseException | None = None

        def main() -> None:
            try:
                start(stdin, stdout)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asks
                self._failure = error
            finally:
                os.close(stdin)
                os.close(stdout)  # now the answers end

        self._thread = threading.Thread(target=main)
        self._thread.start()

    def attack(self, attack: Attack, *, stay: bool = False, **params: Any) -> Outcomes:
        """Try it in a new process; with ``stay`` in the one that lives until the end, so that what it opens stays open."""
        os.write(self._requests, (request(attack, params, stay) + "\n").encode())
        said = []
        for line in self._answers:
            words = eval(line)
            if words[0] == "done":
                return outcomes(said, words[1])
            said.append(words)
        self.close()
        raise BrokenAttack(f"the attacker is gone; it had said {said}")

    def close(self) -> None:
        """End it; what went wrong with it is raised."""
        if self._requests >= 0:
            os.close(self._requests)
            self._requests = -1
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._answers.close()
        if self._failure:
            raise self._failure


def attackers_inside(executor: Blocking, **options: Any) -> Attackers:
    """Attackers in one tool call."""

    def start(stdin: int, stdout: int) -> None:
        result = executor.run(program("serve", "inside"), stdin=stdin, stdout=stdout, **{"timeout": 300, **options})
        assert (result.returncode, result.stderr) == (0, b""), result

    return Attackers(start)


def attackers_outside() -> Attackers:
    """Attackers without any wall."""

    def start(stdin: int, stdout: int) -> None:
        done = subprocess.run(program("serve", "outside"), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (0, b""), done

    return Attackers(start)


class Walls:
    """Both places."""

    def __init__(self, executor: Blocking) -> None:
        self.executor = executor
        self.inside = attackers_inside(executor)
        self.outside = attackers_outside()

    def check(
        self,
        attack: Attack,
        expected: Mapping[str, tuple[str, str]],
        *,
        outside: Mapping[str, Any] | None = None,
        inside: Mapping[str, Any] | None = None,
        unshown: str = "",
    ) -> None:
        """Try an attack in both places; ``expected`` has for each step its outcome outside and inside, ``a|b`` for either.

        Outside it has to get further than inside in some step, or nothing is shown about the wall; ``unshown`` says why that
        cannot be on some machines (which the alternatives in ``expected`` then allow).
        """
        without = self.outside.attack(attack, **(outside or {}))
        within = self.inside.attack(attack, **(inside or {}))
        compare(without, within, expected, unshown=unshown)

    def alone(self, attack: Attack, *, params: Mapping[str, Any] | None = None, **options: Any) -> Outcomes:
        """Try it as a call of its own: it is the tool itself, the leader of its session."""
        result = self.executor.run(program("alone", "inside", request(attack, params or {})), **options)
        assert result.stderr == b"", result
        status = result.signal if result.signal is not None else (result.exit_code or 0) << 8
        return outcomes([eval(line) for line in (result.stdout or b"").splitlines()], status)

    def close(self) -> None:
        try:
            self.inside.close()
        finally:
            self.outside.close()


def compare(without: Outcomes, within: Outcomes, expected: Mapping[str, tuple[str, str]], *, unshown: str = "") -> None:
    """Every step has an outcome that was expected there, there is no other step, and the wall makes a difference."""
    assert {*without, *within} <= {*expected}, f"steps nobody expected: {without}, {within}"
    places = ("outside", without, AssertionError), ("inside", within, Hole)
    for number, (place, found, error) in enumerate(places):
        wrong = [
            f"{place}: {step}: {found.get(step, NOT_REACHED)}, not {want[number]}"
            for step, want in expected.items()
            if found.get(step, NOT_REACHED) not in want[number].split("|")
        ]
        if wrong:
            raise error("\n".join(wrong))
    assert without != within or unshown, f"the wall makes no difference: {without}"


# ---------------------------------------------------------------- an attack that is a process of its own


def alone_outside(attack: Attack, *, params: Mapping[str, Any] | None = None, **options: Any) -> Outcomes:
    """Try it as a process of its own, without any wall."""
    done = subprocess.run(
        program("alone", "outside", request(attack, params or {})),
        **{"stdin": subprocess.DEVNULL, "capture_output": True, "start_new_session": True, "timeout": 60, **options},
        check=False,
    )
    assert done.stderr == b"", done
    status = -done.returncode if done.returncode < 0 else done.returncode << 8
    return outcomes([eval(line) for line in done.stdout.splitlines()], status)


class _Recorder(attacker.Attacker):
    """What it says is kept instead of written."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def say(self, *words: object) -> None:
        self.said.append(words)


def in_this_process(attack: Attack, **params: Any) -> Outcomes:
    """Try it right here, in the host's own namespaces: only for attacks that change nothing."""
    recorder = _Recorder()
    attack(recorder, **params)
    return outcomes(recorder.said, 0)


# ---------------------------------------------------------------- places and people


@contextmanager
def public_directory(parent: str = "/opt") -> Iterator[Path]:
    """A directory of root's that everybody may enter, and that the sandbox shows: not below /tmp, /root or /home."""
    with tempfile.TemporaryDirectory(prefix="agentrun-wall-", dir=parent) as path:
        os.chmod(path, 0o755)
        yield Path(path)


@contextmanager
def workspace_directory() -> Iterator[Path]:
    """A public directory whose file system can map owners: in a guest with an old kernel only its scratch disk can."""
    disk = "/mnt/ext4"
    with public_directory(disk if DISPOSABLE and os.path.ismount(disk) else "/opt") as path:
        yield path


def maps_owners(path: str) -> bool:
    """Whether the file system there may be mounted with other owners, as the image is."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(place), kind) for place, kind in mounts if place == "/" or f"{path}/".startswith(f"{place}/")]
    return max(above)[1] not in ("9p", "overlay")


def token() -> str:
    """A word that is found nowhere else."""
    return f"agentrun-wall-{secrets.token_hex(8)}"


def as_nobody(*argv: str) -> list[str]:
    """The command, as an ordinary user of the host."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *argv]
