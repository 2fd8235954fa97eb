"""Changes as people read them: a line for each path, and text as a patch."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator

from agentrun.changes.beneath import FILE, opened
from agentrun.changes.model import Change, ChangeSet, count
from agentrun.changes.nodes import kind_name
from agentrun.tomltext import show_path

_LARGEST = 1 << 20
"""Bytes of a file that is compared line by line."""
_ESCAPES = {ord('"'): b'\\"', ord("\\"): b"\\\\", ord("\n"): b"\\n", ord("\t"): b"\\t", ord("\r"): b"\\r"}
_LETTERS = {"added": "A", "modified": "M", "deleted": "D", "type": "T", "mode": "m", "time": "t"}


def describe(changes: ChangeSet) -> Iterator[str]:
    """A line for each change, and one for all together."""
    for change in changes.changes:
        details = _details(change)
        warning = "  (the original was changed while the call ran)" if change.raced else ""
        yield f"{_LETTERS[change.kind]}  {show_name(change)}{'  ' + details if details else ''}{warning}"
    counts = ", ".join(f"{number} {kind}" for kind, number in count(changes.changes).items() if number)
    yield f"{len(changes.changes)} changes to {show_path(changes.workspace)}: {counts}"


def show_name(change: Change) -> str:
    """Its path, a directory with a slash behind it."""
    entry = change.new or change.old
    return show_path(os.fsdecode(change.path) or ".") + ("/" if entry is not None and entry.kind == "d" else "")


def _details(change: Change) -> str:
    new, old = change.new, change.old
    if new is None or (old is None and new.kind == "d"):
        return ""
    if old is None:
        return f"{new.size} bytes" if new.kind == "f" else _what(change)
    if old.kind != new.kind:
        return f"{kind_name(old.kind)} → {_what(change)}"
    parts = []
    if "content" in change.what:
        parts.append(f"{old.size} → {new.size} bytes")
    if "target" in change.what:
        parts.append(_what(change))
    if "mode" in change.what:
        parts.append(f"mode {old.mode:04o} → {new.mode:04o}")
    if "owner" in change.what:
        parts.append(f"owner {old.uid}:{old.gid} → {new.uid}:{new.gid}")
    if "xattrs" in change.what:
        parts.append("extended attributes")
    return ", ".join(parts)


def _what(change: Change) -> str:
    assert change.new is not None
    target = f" to {show_path(os.fsdecode(change.new.target))}" if change.new.kind == "l" else ""
    return kind_name(change.new.kind) + target


def make_patch(changes: ChangeSet, upper: int, base: int) -> Iterator[bytes]:
    """Text files that came, went or have other content, as a unified diff; of others only that they differ.

    Args:
        upper: a descriptor of the directory with the new files.
        base: that of the workspace.
    """
    for change in changes.changes:
        was_file, is_file = (entry is not None and entry.kind == "f" for entry in (change.old, change.new))
        if not (was_file or is_file) or (was_file and is_file and "content" not in change.what):
            continue
        before, after = _read(base, change.path) if was_file else b"", _read(upper, change.path) if is_file else b""
        yield from _compare(change.path, before, after, was_file=was_file, is_file=is_file)


def _read(root: int, path: bytes) -> bytes | None:
    """A file's content; None if it is too large, or gone."""
    try:
        with opened(root, path, FILE) as fd:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
                return None
            return os.pread(fd, _LARGEST, 0)
    except OSError:
        return None


def _compare(path: bytes, before: bytes | None, after: bytes | None, *, was_file: bool, is_file: bool) -> Iterator[bytes]:
    old, new = _quote(b"a/" + path) if was_file else b"/dev/null", _quote(b"b/" + path) if is_file else b"/dev/null"
    if before is None or after is None or b"\0" in before or b"\0" in after:
        yield b"Files " + old + b" and " + new + b" differ\n"
        return
    # What is behind a tab is no name any more: so one may have spaces in it.
    old, new = (name + b"\t" if b" " in name and name[:1] != b'"' else name for name in (old, new))
    for line in difflib.diff_bytes(difflib.unified_diff, _lines(before), _lines(after), old, new, lineterm=b"\n"):
        yield line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"


def _quote(name: bytes) -> bytes:
    """As git writes it, and patch(1) reads it: a name with line feeds could else pretend to be lines of the patch."""
    if not any(letter < 32 or letter in b'"\\\x7f' for letter in name):
        return name
    escaped = (_ESCAPES.get(letter) or (b"%c" if 32 <= letter != 127 else b"\\%03o") % letter for letter in name)
    return b'"' + b"".join(escaped) + b'"'


def _lines(text: bytes) -> list[bytes]:
    """Lines as diff(1) knows them, which only a line feed ends."""
    lines = text.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
