"""The command line, as runc and crun have it: flags of both are taken, and those that mean nothing here are ignored knowingly."""

from __future__ import annotations

from agentrun_shim.oci.errors import OciError

FLAG, VALUE, MANY = "flag", "value", "many"

GLOBAL = {
    "root": VALUE, "log": VALUE, "log-format": VALUE, "log-level": VALUE, "debug": FLAG, "systemd-cgroup": FLAG,
    "cgroup-manager": VALUE, "rootless": VALUE, "criu": VALUE, "help": FLAG, "version": FLAG,
}  # fmt: skip
_CREATE = {
    "bundle": VALUE, "config": VALUE, "pid-file": VALUE, "console-socket": VALUE, "pidfd-socket": VALUE, "preserve-fds": VALUE,
    "no-pivot": FLAG, "no-new-keyring": FLAG, "no-subreaper": FLAG,
}  # fmt: skip
_FORMAT = {"format": VALUE}
VERBS = {
    "create": _CREATE,
    "run": {**_CREATE, "detach": FLAG, "keep": FLAG},
    "start": {},
    "state": {},
    "kill": {"all": FLAG, "regex": FLAG},
    "delete": {"force": FLAG, "regex": FLAG},
    "exec": {
        "process": VALUE, "detach": FLAG, "pid-file": VALUE, "console-socket": VALUE, "pidfd-socket": VALUE,
        "preserve-fds": VALUE, "tty": FLAG, "cwd": VALUE, "env": MANY, "user": VALUE, "additional-gids": MANY,
        "process-label": VALUE, "apparmor": VALUE, "no-new-privs": FLAG, "cap": MANY, "ignore-paused": FLAG, "cgroup": VALUE,
        "no-subreaper": FLAG,
    },
    "ps": _FORMAT,
    "list": {**_FORMAT, "quiet": FLAG},
    "update": {
        "resources": VALUE, "memory": VALUE, "memory-reservation": VALUE, "memory-swap": VALUE, "cpu-quota": VALUE,
        "cpu-period": VALUE, "cpu-share": VALUE, "cpu-burst": VALUE, "cpu-idle": VALUE, "cpuset-cpus": VALUE,
        "cpuset-mems": VALUE, "cpu-rt-period": VALUE, "cpu-rt-runtime": VALUE, "pids-limit": VALUE, "blkio-weight": VALUE,
        "kernel-memory": VALUE,
        "kernel-memory-tcp": VALUE,
    },
    "pause": {},
    "resume": {},
    "events": {"stats": FLAG, "interval": VALUE},
    "spec": {"bundle": VALUE, "rootless": FLAG},
    "features": {},
}  # fmt: skip
_SHORT = {
    "b": "bundle", "f": "config", "d": "detach", "a": "all", "p": "process", "t": "tty", "e": "env", "u": "user", "c": "cap",
    "g": "additional-gids", "q": "quiet", "r": "resources", "h": "help", "v": "version",
}  # fmt: skip
_SHORT_OF_VERB = {("delete", "f"): "force", ("ps", "f"): "format", ("list", "f"): "format", ("spec", "b"): "bundle"}
UNSUPPORTED = ("checkpoint", "restore")


class Options:
    """A parsed command line: ``verb``, its ``operands``, and flags by their long names."""

    def __init__(self, flags: dict[str, str], many: dict[str, list[str]], verb: str, operands: list[str]) -> None:
        self.flags, self.many, self.verb, self.operands = flags, many, verb, operands

    def __contains__(self, name: str) -> bool:
        return name in self.flags or name in self.many

    def get(self, name: str, default: str | None = None) -> str | None:
        """The value of a flag."""
        return self.flags.get(name, default)

    def number(self, name: str, default: int = 0) -> int:
        """The value of a flag that is a number.

        Raises:
            OciError: it is none.
        """
        text = self.flags.get(name)
        if text is None:
            return default
        try:
            return int(text)
        except ValueError:
            raise OciError(f"--{name}: {text!r} is not a number") from None


def parse(arguments: list[str]) -> Options:
    """Parse; flags of the verb may stand before and after its operands, up to ``--`` and, for exec, up to the command.

    Raises:
        OciError: an unknown flag or verb, or a missing value.
    """
    flags: dict[str, str] = {}
    many: dict[str, list[str]] = {}
    rest = list(arguments)
    _take(rest, GLOBAL, "", flags, many)
    if not rest or "help" in flags or "version" in flags:
        return Options(flags, many, rest[0] if rest else "", [])
    verb = rest.pop(0)
    if verb in UNSUPPORTED:
        raise OciError(f"{verb}: checkpoints are not supported")
    if verb not in VERBS:
        raise OciError(f"unknown command {verb!r} (known: {', '.join(VERBS)})")
    known = {**VERBS[verb], "help": FLAG}
    operands: list[str] = []
    while rest:
        _take(rest, known, verb, flags, many)
        if rest and rest[0] == "--":
            operands += rest[1:]
            break
        if rest:
            operands.append(rest.pop(0))
        if verb == "exec" and operands:
            operands += rest[1:] if rest[:1] == ["--"] else rest
            break
    return Options(flags, many, verb, operands)


def _take(rest: list[str], known: dict[str, str], verb: str, flags: dict[str, str], many: dict[str, list[str]]) -> None:
    """Move flags from the front of ``rest``."""
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("--") and len(name) == 1:
            name = _SHORT_OF_VERB.get((verb, name), _SHORT.get(name, name))
        kind = known.get(name)
        if kind is None:
            raise OciError(f"{verb + ': ' if verb else ''}unknown flag {word}")
        if kind == FLAG:
            if value in ("", "true", "1"):
                flags[name] = "true"
            else:
                flags.pop(name, None)
            continue
        if not equals:
            if not rest:
                raise OciError(f"{word}: a value is missing")
            value = rest.pop(0)
        if kind == MANY:
            many.setdefault(name, []).append(value)
        else:
            flags[name] = value
