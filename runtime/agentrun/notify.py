# SPDX-License-Identifier: Apache-2.0
"""The two conversations with a service manager: sockets it passes us, states we tell it.

Both protocols are a few environment variables and stable by promise, so no libsystemd. Sources: sd_notify(3),
sd_listen_fds(3): a protocol systemd promises to keep. `notify` blocks only while the manager's queue
is full, as libsystemd's does.
"""

import os
import re
import socket
from typing import Final

LISTEN_FDS_START: Final = 3
LISTEN_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def notify(state: str) -> bool:
    """Send `state` ("READY=1", "STATUS=...", several joined by newlines) to the service manager.

    False when no manager listens (`NOTIFY_SOCKET` is unset).

    Raises:
        ValueError: `NOTIFY_SOCKET` is neither an absolute path nor an abstract name (`@...`).
        OSError: the datagram was not delivered; `filename` is the address.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address[0] not in "/@" or len(address) == 1:
        raise ValueError(f"NOTIFY_SOCKET={address!r}: not an absolute path and not an abstract name")
    target = "\0" + address[1:] if address[0] == "@" else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), socket.MSG_NOSIGNAL, target)
        except OSError as error:
            if error.errno is None:  # CPython's own "AF_UNIX path too long"
                raise ValueError(f"NOTIFY_SOCKET={address!r}: {error}") from None
            raise OSError(error.errno, error.strerror, address) from None
    return True


def listen_fds() -> list[tuple[int, str]]:
    """The descriptors the service manager opened for this process, each with its name, now close-on-exec.

    Empty when there are none, or when they are meant for another process (`LISTEN_PID`). The variables are
    removed in any case: what is started later must not take the descriptors for its own.

    Raises:
        ValueError: a variable is malformed; the message names it.
        OSError: a descriptor that was announced is not open.
    """
    pid, count, names = (os.environ.pop(name, None) for name in LISTEN_VARIABLES)
    if pid is None or _number("LISTEN_PID", pid) != os.getpid() or count is None:
        return []
    fds = range(LISTEN_FDS_START, LISTEN_FDS_START + _number("LISTEN_FDS", count))
    labels = (names or "").split(":") if fds or names else []
    if names is None:
        labels = ["unknown"] * len(fds)  # what systemd calls them
    if len(labels) != len(fds):
        raise ValueError(f"LISTEN_FDNAMES={names!r}: {len(labels)} names for {len(fds)} descriptors")
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise OSError(error.errno, f"LISTEN_FDS={count}: {error.strerror}", f"fd {fd}") from None
    return list(zip(fds, labels, strict=True))


def _number(name: str, text: str) -> int:
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise ValueError(f"{name}={text!r}: not a number")
    return int(text)
