"""Compile a program of ``bpf/`` with BCC. Nothing else in the project imports ``bcc``."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentrun_shim.data import data_path

DIST_PACKAGES = "/usr/lib/python3/dist-packages"
"""Where Debian's python3-bpfcc is. It is pure Python over libbcc.so, so any interpreter can use it."""
_CFLAGS = ("-Wno-duplicate-decl-specifier",)  # BCC's own headers under clang 14
_INCLUDE = re.compile(r'^#include "(.+)"$')


class ProbesError(Exception):
    """A program could not be compiled, loaded or attached; the message says what the compiler or the kernel said."""


def import_bcc() -> Any:
    """The module ``bcc``: the distribution's. PyPI has an unrelated package of that name.

    Raises:
        ProbesError: it is not installed.
    """
    for path in ("", DIST_PACKAGES):
        if path and path not in sys.path:
            sys.path.append(path)
        for name in [name for name in sys.modules if name.split(".")[0] == "bcc"]:
            del sys.modules[name]
        with contextlib.suppress(ImportError):
            module = importlib.import_module("bcc")
            if hasattr(module, "BPF"):
                return module
    raise ProbesError("BCC is not installed (apt-get install python3-bpfcc; PyPI's `bcc` is something else)")


def load(name: str, defines: Mapping[str, int | str]) -> Any:
    """Compile ``bpf/<name>.c`` and create its maps; returns BCC's ``BPF``. Programs are loaded when they are attached.

    BCC attaches what its naming conventions tell it to right here: ``RAW_TRACEPOINT_PROBE``, ``KFUNC_PROBE``, ``kprobe__``.

    Raises:
        ProbesError: the compiler, the verifier or the attach point refused.
    """
    bcc = import_bcc()
    directory = data_path("bpf")
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    flags = [*_CFLAGS, f"-I{directory}", *(f"-D{key}={value}" for key, value in defines.items())]
    with captured() as said:
        try:
            return bcc.BPF(text="\n".join(included(directory / f"{name}.c", set())), cflags=flags)
        except Exception as error:
            # BCC raises plain Exception; what was wrong is on descriptor 2.
            raise ProbesError(f"{name}.c: {error}: {said()}") from error


def included(path: Path, seen: set[Path]) -> Iterator[str]:
    """A file's lines with our own headers in place: BCC gives map operations their meaning only in the main file it compiles."""
    if path in seen:
        return
    seen.add(path)
    yield f'#line 1 "{path.name}"'
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line == "#pragma once":
            yield ""
        elif found := _INCLUDE.match(line):
            yield from included(path.parent / found[1], seen)
            yield f'#line {number + 1} "{path.name}"'
        else:
            yield line


@contextlib.contextmanager
def captured() -> Iterator[Any]:
    """Descriptor 2 goes to a file; ``said()`` is the last of what was written, in one line."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            return "; ".join(lines[-3:])

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
