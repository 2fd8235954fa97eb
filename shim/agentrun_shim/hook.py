"""``agentrun-hook``: the OCI hook for createRuntime, poststart and poststop of containers that other runtimes make.

    python -I -S -E hook.py [--socket=PATH] [--policies=PATH] [STAGE]        the container's state on standard input

createRuntime   the container's cgroup gets the limits of the policy its annotations name (``hook_state``), the daemon is told,
                which governs its bursts and records its set-up; without a daemon the limits alone
poststart       a daemon that was started in between is told
poststop        the daemon forgets it

Exit status 1, in createRuntime only, keeps the container from starting: fail closed. Only the standard library is imported, and
of that as little as can be: a container's start waits for this. It is run as a script, with no ``site``, no PATH and no HOME.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # as a script it has to find its own package; -I -S leave the standard library only
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from agentrun_shim import hook_static
from agentrun_shim.hook_cgroup import HARMLESS, Merged, cgroup_of, read_files, why_missing, write_files
from agentrun_shim.hook_state import PREFIX, STAGES, Container, HookError, unknown_annotations
from agentrun_shim.hook_wire import NoDaemon, Refused, ask

LOG = "hook.log"
"""Beside the socket. crun gives a hook no standard error but what an annotation names (run.oci.hooks.stderr)."""
_LOG_MOST = 1 << 20
USAGE = b"usage: agentrun-hook [--socket=PATH] [--policies=PATH] [createRuntime|poststart|poststop]\n"


class Hook:
    """One run of it."""

    def __init__(self, socket: str, cache: str) -> None:
        self._socket, self._cache = socket, cache
        self._open = False
        """What keeps the policy from being in force does not keep the container from starting."""

    def run(self, raw: bytes, stage: str) -> int:
        """Carry out one stage; the exit status."""
        try:
            container = Container(raw, stage)
        except HookError as error:
            # Who fails open has said so in a place that could not be read.
            self._say("?", f"not started: {error}")
            return 1
        if strange := unknown_annotations(raw):
            self._say(container.name, f"not known: {', '.join(strange)} ({PREFIX}policy, tenant, memory, fail and daemon are)")
            if not container.policy:  # whoever wrote `io.agentrun.polcy` wanted a policy
                return 1 if container.stage == "createRuntime" and container.fail != "open" else 0
        if not container.policy:
            return 0
        if container.stage == "createRuntime":
            return self._create(container)
        try:
            if container.stage == "poststart":
                if os.path.exists(f"/proc/{container.pid}"):  # or it has ended already
                    self._register(container, started=True)
            else:
                hook_static.drop_record(self._socket, container)
                ask(self._socket, {"v": 1, "op": "unregister", "id": container.id, "bundle": container.bundle})
        except NoDaemon:
            pass  # that was said when it was created
        except (HookError, Refused) as error:
            self._say(container.name, f"{container.stage}: {error}")
        return 0

    def _create(self, container: Container) -> int:
        self._open = container.fail == "open"
        try:
            self._apply(container)
        except (HookError, Refused) as error:
            if self._open:
                self._say(container.name, f"policy {container.policy} is not enforced: {error}")
                return 0
            self._say(container.name, f"not started: policy {container.policy} is not enforced: {error}")
            return 1
        return 0

    def _apply(self, container: Container) -> None:
        try:
            directory, answer = self._register(container, started=False)
        except NoDaemon as error:
            why = f"no daemon at {self._socket}: {error}"
            if container.needs_daemon:
                raise HookError(f"{why}, and {PREFIX}daemon is required") from None
            self._apply_alone(container, why)
            return
        self._open = bool(answer["open"])
        write, kept = answer["write"], answer["kept"]
        assert isinstance(write, dict)
        assert isinstance(kept, dict)
        self._write(container, directory, write)
        for item in _lines(answer["unenforced"]):
            self._say(container.name, f"not enforced: {item[0]}: {item[1]}")
        for note in _lines(answer["notes"]):
            self._say(container.name, str(note))

    def _register(self, container: Container, *, started: bool) -> tuple[str, dict[str, object]]:
        cgroup, directory = cgroup_of(container.pid)
        request: dict[str, object] = {
            "v": 1, "op": "register", "id": container.id, "bundle": container.bundle, "cgroup": cgroup,
            "inode": _inode(directory), "policy": container.policy, "tenant": container.tenant, "hint": container.memory,
            "fail": container.fail, "started": started,
        }  # fmt: skip
        return directory, ask(self._socket, request)

    def _write(self, container: Container, directory: str, files: dict[str, str]) -> None:
        fd = _open_directory(directory)
        try:
            self._write_to(fd, container, directory, files)
        except HookError:
            self._forget(container)
            raise
        finally:
            os.close(fd)

    def _write_to(self, fd: int, container: Container, directory: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            try:
                write_files(fd, {name: text}, directory)
            except HookError as error:
                if not self._open:
                    raise
                self._say(container.name, f"not enforced: {error}")

    def _forget(self, container: Container) -> None:
        hook_static.drop_record(self._socket, container)
        try:
            ask(self._socket, {"v": 1, "op": "unregister", "id": container.id, "bundle": container.bundle})
        except (NoDaemon, Refused):
            return

    def _apply_alone(self, container: Container, why: str) -> None:
        policy = hook_static.find_policy(self._cache, container)
        self._open = policy.open
        cgroup, directory = cgroup_of(container.pid)
        fd = _open_directory(directory)
        try:
            found = read_files(fd, list(policy.files))
            merged = Merged(found, policy.files)
            missing = [name for name in merged.missing if name not in HARMLESS]
            if refused := [name for name in missing if name in policy.insisted]:
                raise HookError(f"{refused[0]}: {why_missing(fd, refused[0])} ({why})")
            self._write_to(fd, container, directory, merged.write)
            hook_static.save_record(self._socket, container, cgroup, _inode(directory), found)
            for name in missing:
                self._say(container.name, f"not enforced: {name}: {why_missing(fd, name)}")
        finally:
            os.close(fd)
        bursts = "above memory.high it is slowed down and has no burst; " if policy.governed else ""
        slow = "; policies had to be read anew (agentrun setup oci saves that)" if policy.slow and not container.memory else ""
        self._say(
            container.name,
            f"{why}: the static limits of policy {container.policy} are in force; {bursts}its set-up is not recorded{slow}",
        )

    def _say(self, name: str, text: str) -> None:
        """One line, to whoever listens: standard error, which runc shows and crun does not, and the log beside the socket."""
        line = f"agentrun-hook: {name}: {''.join(c if c.isprintable() else '?' for c in text)}\n"
        data = line.encode("utf-8", "backslashreplace")
        beside = os.path.dirname(self._socket)
        path = os.path.join(beside, LOG)
        try:
            if beside == os.path.dirname(hook_static.DEFAULT_SOCKET):  # of directories only our own is made
                os.makedirs(beside, mode=0o755, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.fstat(fd).st_size > _LOG_MOST:
                    os.ftruncate(fd, 0)
                os.write(fd, b"%s %s" % (_now(), data))
            finally:
                os.close(fd)
        except OSError:
            pass  # there is standard error
        try:
            os.write(2, data)
        except OSError:
            return


def _now() -> bytes:
    from time import gmtime, strftime

    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime()).encode()


def _inode(directory: str) -> int:
    try:
        return os.stat(directory).st_ino
    except OSError as error:
        raise HookError(f"{directory}: {error.strerror}") from error


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HookError(f"{path}: {error.strerror}") from error


def _lines(value: object) -> list[list[str]]:
    return value if isinstance(value, list) else []


def main(words: list[str]) -> int:
    """The program; ``words`` are its arguments."""
    socket, cache, stage = hook_static.DEFAULT_SOCKET, hook_static.DEFAULT_CACHE, ""
    for word in words:
        if word.startswith("--socket="):
            socket = word.removeprefix("--socket=")
        elif word.startswith("--policies="):
            cache = word.removeprefix("--policies=")
        elif word in STAGES.values():
            stage = word
        else:
            os.write(2, USAGE)
            return 2
    with open(0, "rb", closefd=False) as stdin:
        raw = stdin.read(1 << 20)
    return Hook(socket, cache).run(raw, stage)


def program() -> None:
    """The entry point ``agentrun-hook``."""
    try:
        status = main(sys.argv[1:])
    except Exception as error:  # noqa: BLE001  a container's start must not end in a traceback that nobody sees
        os.write(2, f"agentrun-hook: internal error: {type(error).__name__}: {error}\n".encode())
        status = 1
    os._exit(status)  # what Python does at its end takes a millisecond, and nothing here needs it


if __name__ == "__main__":
    program()
