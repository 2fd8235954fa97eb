"""Make tracefs visible to this process, whatever the machine has mounted; and read what tracepoints say of themselves."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 16384, 1 << 18


def see_tracefs() -> None:
    """Mount it in a mount namespace of our own if it is not there: the machine's mounts stay as they are.

    Raises:
        OSError: the kernel has no tracefs, or this process may not mount.
    """
    if (TRACING / "events").is_dir():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.unshare(_CLONE_NEWNS) == 0
    done = done and libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) == 0
    if not (done and libc.mount(b"tracefs", str(TRACING).encode(), b"tracefs", ctypes.c_ulong(0), None) == 0):
        code = ctypes.get_errno()
        raise OSError(code, f"mounting tracefs: {os.strerror(code)}")


def gfp_flag(name: str) -> int:
    """A flag of memory allocation as the running kernel numbers it, from the print format of kmem:mm_page_alloc.

    Raises:
        LookupError: it is not named there.
    """
    text = (TRACING / "events/kmem/mm_page_alloc/format").read_text()
    # {( unsigned long)(( gfp_t)((((1UL))) << (3))), "__GFP_MOVABLE"} since 6.10; {(unsigned long)((gfp_t)0x08u), "…"} before.
    for entry in re.findall(r"\{([^{}]*)\}", text):
        value, _, label = entry.rpartition(",")
        if label.strip() == f'"{name}"':
            if found := re.search(r"<< \((\d+)\)", value):
                return 1 << int(found[1])
            if found := re.search(r"0x([0-9a-fA-F]+)", value):
                return int(found[1], 16)
    raise LookupError(f"{name} is not among the flags of kmem:mm_page_alloc")
