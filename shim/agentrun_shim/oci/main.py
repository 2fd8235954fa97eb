"""The entry of the runtime's Python half: ``main`` is called by ``shim/native/oci_front.c`` with what that has found out.

argv: the default root, what the native half wants done ("" for a command line as the engine wrote it), the engine's arguments.
"""

from __future__ import annotations

import os
import sys

from agentrun_shim.oci.errors import OciError, strerror
from agentrun_shim.oci.log import Log
from agentrun_shim.oci.options import GLOBAL, VALUE, Options, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agentrun_shim.oci.context import Context

_FULL_MAP = ["0", "0", "4294967295"]


def main() -> None:
    """Run the command line and end the process: nothing that Python would still do at its exit is needed."""
    code = _run(sys.argv[1], sys.argv[2], sys.argv[3:])
    try:
        sys.stdout.flush()
    except OSError:
        code = code or 1
    os._exit(code)


def _run(default_root: str, internal: str, arguments: list[str]) -> int:
    log, verb = _early(arguments)
    try:
        options = parse(arguments)
        if "version" in options or "help" in options or not options.verb:
            from agentrun_shim.oci.usage import show

            return show(options)
        _check_log(options)
        return _dispatch(options, os.path.abspath(options.get("root") or default_root), internal, log)
    except OciError as error:
        log.error(str(error))
    except OSError as error:
        log.error(f"{error.filename + ': ' if isinstance(error.filename, str) else ''}{strerror(error)}")
    except UnicodeEncodeError as error:  # JSON may have half a character: "\ud800"
        log.error(f"{error.object!r:.60} cannot be written as UTF-8")
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 -- an engine reads one line of JSON, not a traceback
        log.error(f"internal error: {type(error).__name__}: {error} (in {_where(error)})")
    return 255 if verb == "exec" else 1


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    place = "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _early(arguments: list[str]) -> tuple[Log, str]:
    """Where errors go, and the verb, found without understanding the rest: a wrong flag has to be said in the log as well.

    Only what stands before the verb is looked at: what a program in a container is given may look like a flag of ours.
    """
    log, rest = Log(), list(arguments)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if GLOBAL.get(name) == VALUE and not equals:
            value = rest.pop(0) if rest else ""
        if name == "log":
            log.path = os.path.abspath(value.removeprefix("file:"))  # directories are changed on the way
        elif name == "log-format":
            log.json = value == "json"
    return log, rest[0] if rest else ""


def _check_log(options: Options) -> None:
    kind = options.get("log-format", "text")
    if kind not in ("text", "json"):
        raise OciError(f"--log-format: {kind!r} is none of text, json")
    place = options.get("log") or ""
    if place.startswith(("journald:", "syslog:")):
        raise OciError(f"--log {place}: a file is needed")


def is_rootless(flag: str | None) -> bool:
    """Not the host's root: another user, or in a user namespace."""
    if flag in ("true", "false"):
        return flag == "true"
    if os.geteuid():
        return True
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != _FULL_MAP


def _dispatch(options: Options, root: str, internal: str, log: Log) -> int:
    from agentrun_shim.oci.context import Context

    manager = options.get("cgroup-manager") or ("systemd" if "systemd-cgroup" in options else "cgroupfs")
    if manager not in ("cgroupfs", "systemd", "disabled"):
        raise OciError(f"--cgroup-manager: {manager!r} is none of cgroupfs, systemd, disabled")
    context = Context(root, log, manager=manager, rootless=is_rootless(options.get("rootless")))
    if internal:
        from agentrun_shim.oci import later

        return int(getattr(later, internal)(context, options))
    verb = options.verb
    if verb in ("create", "run"):
        from agentrun_shim.oci import create

        name = _one(options)
        if verb == "run":
            return create.run(context, options, name)
        create.create(context, options, name)
        return 0
    if verb == "exec":
        from agentrun_shim.oci.execute import execute

        return execute(context, options)
    if verb in ("spec", "features"):
        from agentrun_shim.oci import documents

        return int(getattr(documents, verb)(options))
    if verb in ("state", "start", "kill", "delete"):
        _plainly(context, options)
    from agentrun_shim.oci import verbs

    return int(getattr(verbs, f"{verb}_")(context, options))


def _one(options: Options) -> str:
    if len(options.operands) != 1:
        raise OciError(f"{options.verb}: exactly one container id is needed, not {len(options.operands)}")
    return options.operands[0]


def _plainly(context: Context, options: Options) -> None:
    """Become the native half, which did not take the command line as it was written: it knows only the plain forms.

    Raises:
        OciError: it was not only written otherwise.
    """
    from agentrun_shim.oci.launch import NATIVE
    from agentrun_shim.oci.state import check_id

    verb, operands = options.verb, options.operands
    if "regex" in options:
        raise OciError(f"{verb}: --regex is not supported")
    if not 1 <= len(operands) <= (2 if verb == "kill" else 1):
        raise OciError(f"{verb}: exactly one container id is needed{', and at most one signal' if verb == 'kill' else ''}")
    check_id(operands[0])
    if any(word.startswith("-") for word in operands):
        raise OciError(f"{verb}: unknown signal {operands[1]!r}")
    flags = [f"--{name}" for name in ("force", "all") if name in options]
    os.execv(NATIVE, ["agentrun-oci", *context.front(), verb, *flags, *operands])


if __name__ == "__main__":
    main()
