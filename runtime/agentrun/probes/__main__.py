"""The probes process: ``python -m agentrun.probes FD OPTIONS``.

``FD`` is a socket (SOCK_SEQPACKET). One message goes out over it for each thing that was asked for, JSON with descriptors;
then nothing, until the other end closes it, and that is the end of this process and of everything it attached.

    {"kind": "burst", "maps": [names, in the descriptors' order], "memory": bytes, "hook": …, "seconds": …, "refused": {…}}
    {"kind": "failed", "what": "burst", "error": …, …}
    {"kind": "ready", …}                    memory is held now, or will not be
    {"kind": "done", …}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from agentrun.probes.attach import Attached, attach_burst
from agentrun.probes.loader import ProbesError
from agentrun.probes.phases import attach_phases
from agentrun.probes.sched import attach_sched
from agentrun.probes.tracefs import see_tracefs


def main(argv: list[str]) -> int:
    """Attach what the options ask for, say so, and wait for the end."""
    sock = socket.socket(fileno=int(argv[0]))
    options = json.loads(argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for whoever started us
    tracefs = ""
    try:
        see_tracefs()
    except OSError as error:
        tracefs = f" (tracefs: {error.strerror})"
    attachers: dict[str, Callable[[], Attached]] = {}
    if options.get("burst"):
        attachers["burst"] = partial(attach_burst, options["burst"])
    if options.get("sched"):
        attachers["sched"] = attach_sched
    if options.get("phases"):
        attachers["phases"] = attach_phases
    held = []
    for what, attach in attachers.items():
        try:
            found = attach()
        except ProbesError as error:
            _send(sock, {"kind": "failed", "what": what, "error": f"{error}{tracefs}"})
        else:
            held.append(found)  # what is attached stays as long as this is held: it goes with this process
            said = {"hook": found.hook, "seconds": round(found.seconds, 3), "refused": dict(found.refused)}
            _send(sock, {"kind": what, **said}, found.maps)
        if what == "burst":
            _send(sock, {"kind": "ready"})  # nobody has to wait for what follows
    _send(sock, {"kind": "done"})
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    return 0


def _send(sock: socket.socket, message: dict[str, Any], maps: Mapping[str, int] | None = None) -> None:
    named = maps or {}
    data = json.dumps({**message, "maps": list(named), "memory": _memory()}).encode()
    socket.send_fds(sock, [data], list(named.values()), socket.MSG_NOSIGNAL)


def _memory() -> int:
    """What this process takes, bytes: most of it is the compiler's."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # whoever started us has gone
        sys.exit(main(sys.argv[1:]))
