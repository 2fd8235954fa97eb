"""``linux.seccomp`` as a filter program, compiled by libseccomp as engines expect it: by name, for every architecture listed.

Tools' profiles have a compiler of their own (``agentrun_shim.seccomp``) that is stricter about architectures and adds rules of
agentrun's; a container gets what its configuration says. Engines pass the same few hundred rules for every container, so a
compiled program is kept beside the containers, under the hash of the text it was made from.
"""

from __future__ import annotations

import os

from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.jsontext import dumps
from agentrun_shim.oci.log import Log
from agentrun_shim.oci.seccomp_words import FLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NEW_LISTENER = 8
_NOTIFY = "SCMP_ACT_NOTIFY"
_CACHE = ".filters"
_KEPT = 64


def compile_filter(config: dict[str, Any], root: str, log: Log) -> tuple[bytes, int, bool]:
    """The program, the flags to load it with, and whether it has a listener.

    Raises:
        OciError: something in it is unknown, or libseccomp refuses it.
    """
    flags = 0
    for flag in config.get("flags") or ():
        if flag not in FLAGS:
            raise OciError(f"linux.seccomp.flags: unknown flag {flag}")
        flags |= FLAGS[flag]
    # One thread loads it, and TSYNC with a listener has an answer of its own (seccomp(2)).
    flags &= ~FLAGS["SECCOMP_FILTER_FLAG_TSYNC"]
    rules = config.get("syscalls") or []
    notify = any(rule.get("action") == _NOTIFY for rule in rules)
    if config.get("defaultAction") == _NOTIFY:
        raise OciError("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY would hold the runtime itself")
    if notify and not config.get("listenerPath"):
        raise OciError("linux.seccomp: SCMP_ACT_NOTIFY needs a listenerPath")
    if any(rule.get("action") == _NOTIFY and {"sendmsg", "write"} & set(rule.get("names") or ()) for rule in rules):
        raise OciError(
            "linux.seccomp: SCMP_ACT_NOTIFY cannot be used for sendmsg and write: the listener itself is passed on by them"
        )
    if notify:
        flags |= NEW_LISTENER
    where = f"{root}/{_CACHE}"
    name = f"{where}/{_digest(dumps(config))}"
    try:
        with open(name, "rb") as file:
            program = file.read()
    except FileNotFoundError:
        from agentrun_shim.oci.seccomp_compile import compile_rules

        program = compile_rules(config, rules, log)
        os.makedirs(where, 0o700, exist_ok=True)
        scratch = f"{name}.{os.getpid()}"
        with open(scratch, "wb") as file:
            file.write(program)
        os.rename(scratch, name)
        _prune(where)
    return program, flags, notify


def _digest(text: str) -> str:
    from _blake2 import blake2b

    return blake2b(f"2 {text}".encode(), digest_size=24).hexdigest()


def _prune(where: str) -> None:
    """Keep the newest: a machine sees few configurations, but may see them for long."""
    found = []
    for entry in os.scandir(where):
        found.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(found)[:-_KEPT]:
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
