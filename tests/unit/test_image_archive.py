# SPDX-License-Identifier: Apache-2.0
"""Layer archives, hostile and odd: what is refused is refused by name and leaves the store as it was; what is taken is right."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from agentrun.image.layers import Packed
from agentrun.image.limits import ArchiveError, Limits
from agentrun.image.manifest import difference, scan
from agentrun.image.sources import Source
from agentrun.image.store import Store
from agentrun.image.streams import Blob
from tests.requirements import lacking

END = bytes(1024)
ROOT = os.geteuid() == 0
LIMITS = Limits(size=8 << 20, entries=60, ratio=20, ratio_from=1 << 20, depth=20, metadata=4096, pieces=50)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# ---------------------------------------------------------------- archives by hand


def entry(
    name: str | bytes, content: bytes = b"", *, kind: bytes = b"0", link: str = "", mode: int = 0o644, **more: object
) -> bytes:
    """One entry, as written by someone who checks nothing. A long name is cut."""
    size = more.get("size", len(content))
    block = bytearray(512)
    raw = name if isinstance(name, bytes) else name.encode()
    block[: min(100, len(raw))] = raw[:100]
    block[100:108] = b"%07o\0" % mode
    block[108:116] = b"%07o\0" % int(str(more.get("uid", 0)))
    block[116:124] = b"%07o\0" % int(str(more.get("gid", 0)))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"%011o\0" % int(str(more.get("mtime", 1_600_000_000)))
    block[156:157] = kind
    block[157 : 157 + len(link)] = link.encode()
    block[257:265] = more.get("magic", b"ustar\00000")
    for at, value in more.get("fields", {}).items():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) + int(str(more.get("wrong", 0))))
    return bytes(block) + content + bytes(-len(content) % 512)


def folder(name: str, **more: object) -> bytes:
    return entry(name, kind=b"5", mode=0o755, **more)


def record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body)
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def pax(*records: tuple[str, bytes], kind: bytes = b"x") -> bytes:
    return entry("pax", b"".join(record(*pair) for pair in records), kind=kind)


def sparse(*words: int, size: int, data: bytes = b"") -> bytes:
    """GNU's version 1.0."""
    numbers = "".join(f"{word}\n" for word in (len(words) // 2, *words)).encode()
    content = numbers.ljust(512, b"\0") + data
    keys = (
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", b"%d" % size),
    )
    return pax(*keys) + entry("GNUSparseFile.0/holes", content)


def old_sparse(size: int, *pieces: tuple[int, int], data: bytes = b"") -> bytes:
    fields = {386 + 24 * n: b"%011o\0%011o\0" % piece for n, piece in enumerate(pieces)}
    return entry("holes", data, kind=b"S", magic=b"ustar  \0", fields={**fields, 483: b"%011o\0" % size})


def member(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


A = entry("a", b"content")
LINK_OUT = entry("l", kind=b"2", link="/etc")

# name → (archive, the entry that has to be named, words of the reason)
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "absolute": (A + entry("/etc/passwd", b"x") + END, "/etc/passwd", "absolute"),
    "absolute directory": (folder("/etc") + END, "/etc", "absolute"),
    "double slash": (entry("//etc/passwd") + END, "//etc/passwd", "absolute"),
    "dot dot": (A + entry("../b", b"x") + END, "../b", "leads out of its directory"),
    "dot dot inside": (entry("a/../../b", b"x") + END, "a/../../b", "leads out of its directory"),
    "dot dot at the end": (folder("a/..") + END, "a/..", "leads out of its directory"),
    "dot dot by pax": (pax(("path", b"x/../../y")) + entry("fine") + END, "x/../../y", "leads out of its directory"),
    "dot dot by a long name": (entry("", b"../long\0", kind=b"L") + entry("fine") + END, "../long", "leads out of its directory"),
    "dot dot by a prefix": (entry("passwd", fields={345: b"../etc"}) + END, "../etc/passwd", "leads out of its directory"),
    "dot dot by a sparse name": (
        pax(("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"../s"), ("GNU.sparse.realsize", b"0"))
        + entry("fine", b"0\n".ljust(512, b"\0"))
        + END,
        "../s",
        "leads out of its directory",
    ),
    "below a link": (LINK_OUT + entry("l/passwd", b"x") + END, "l/passwd", "below l, which is a symbolic link"),
    "below a link, directory": (LINK_OUT + folder("l/cron.d") + END, "l/cron.d", "below l, which is a symbolic link"),
    "below a link, link": (LINK_OUT + entry("l/x", kind=b"2", link="y") + END, "l/x", "below l"),
    "below a link, hard link": (A + LINK_OUT + entry("l/x", kind=b"1", link="a") + END, "l/x", "below l"),
    "below a link, whiteout": (LINK_OUT + entry("l/.wh.passwd") + END, "l/passwd", "below l"),
    "opaque through a link": (LINK_OUT + entry("l/.wh..wh..opq") + END, "l", "symbolic link"),
    "link chain": (
        folder("d") + entry("d/up", kind=b"2", link="..") + entry("d/up/up", kind=b"2", link="..") + END, "d/up/up", "below d/up",
    ),
    "link of a link": (
        entry("one", kind=b"2", link="two") + entry("two", kind=b"2", link="/") + entry("one/etc/x", b"x") + END,
        "one/etc/x",
        "below one",
    ),
    "directory, then link, then below": (
        folder("d") + entry("d", kind=b"2", link="/etc") + entry("d/passwd", b"x") + END, "d/passwd", "below d, which is a symb",
    ),
    "link out": (folder("a") + entry("a/l", kind=b"2", link="../../etc/passwd") + END, "a/l", "leads out"),
    "link out, the long way": (entry("l", kind=b"2", link="a/../../etc") + END, "l", "leads out"),
    "link to nothing": (entry("l", kind=b"2") + END, "l", "a path that is none"),
    "link with a NUL": (pax(("linkpath", b"a\0b")) + entry("l", kind=b"2") + END, "l", "a path that is none"),
    "hard link out": (entry("h", kind=b"1", link="../../etc/shadow") + END, "h", "hard link"),
    "hard link to the host": (entry("h", kind=b"1", link="/etc/shadow") + END, "h", "nothing in this layer"),
    "hard link through a link": (LINK_OUT + entry("h", kind=b"1", link="l/shadow") + END, "h", "nothing in this layer"),
    "hard link to a directory": (folder("d") + entry("h", kind=b"1", link="d") + END, "h", "which is a directory"),
    "hard link to a whiteout": (entry(".wh.w") + entry("h", kind=b"1", link="w") + END, "h", "which is a whiteout"),
    "hard link to itself": (A + entry("a", kind=b"1", link="a") + END, "a", "to itself"),
    "hard link ahead": (entry("h", kind=b"1", link="a") + A + END, "h", "nothing in this layer"),
    "hard link with data": (A + entry("h", b"data", kind=b"1", link="a") + END, "h", "with data"),
    "below a file": (A + entry("a/b", b"x") + END, "a/b", "below a, which is a file"),
    "file with entries": (folder("d") + entry("d/x") + entry("d", b"x") + END, "d", "a directory with entries in it"),
    "link with entries": (folder("d") + entry("d/x") + entry("d", kind=b"2", link="/etc") + END, "d", "a directory with entries"),
    "root as a link": (entry("./", kind=b"2", link="/etc") + END, ".", "root of the layer"),
    "root as a file": (entry(".", b"x") + END, ".", "root of the layer"),
    "character device": (entry("dev/null", kind=b"3") + END, "dev/null", "character device"),
    "block device": (entry("sda", kind=b"4") + END, "sda", "block device"),
    "FIFO": (entry("f", kind=b"6") + END, "f", "FIFO"),
    "whiteout in overlay's form": (entry("w", kind=b"3", fields={329: b"0000000\0" * 2}) + END, "w", "character device"),
    "whiteout of nothing": (entry(".wh.") + END, ".wh.", "no file can have"),
    "whiteout of this": (entry(".wh..") + END, ".wh..", "no file can have"),
    "whiteout of above": (entry("d/.wh...") + END, "d/.wh...", "no file can have"),
    "whiteout of a whiteout": (entry(".wh..wh.a") + END, ".wh..wh.a", "no file can have"),
    "whiteout with data": (entry(".wh.a", b"x") + END, ".wh.a", "whiteout"),
    "whiteout as a link": (entry(".wh.a", kind=b"2", link="x") + END, ".wh.a", "whiteout"),
    "whiteout as a directory": (folder(".wh.a") + END, ".wh.a", "whiteout"),
    "whiteout with whiteouts": (entry(".wh.a/.wh.b") + END, ".wh.a/.wh.b", "below a whiteout"),
    "whiteout with entries": (entry(".wh.a/b") + END, ".wh.a/b", "below a whiteout"),
    "overlay's redirect": (
        pax(("SCHILY.xattr.trusted.overlay.redirect", b"/etc")) + folder("d") + END, "d", "trusted.overlay.redirect",
    ),
    "overlay's redirect, a user's": (
        pax(("SCHILY.xattr.user.overlay.redirect", b"/etc")) + folder("d") + END, "d", "user.overlay.redirect",
    ),
    "overlay's metacopy": (pax(("SCHILY.xattr.trusted.overlay.metacopy", b"")) + A + END, "a", "trusted.overlay.metacopy"),
    "attribute without a name": (pax(("SCHILY.xattr.user.", b"x")) + A + END, "a", "has no name"),
    "NUL in a name": (pax(("path", b"a\0b")) + entry("x") + END, "a\0b", "NUL"),
    "empty name": (entry("") + END, "(an entry)", "empty"),
    "long component": (pax(("path", b"n" * 256)) + entry("x") + END, "n" * 200, "too long"),
    "long name": (entry("", b"n/" * 2047 + b"n\0", kind=b"L") + entry("x") + END, "n/" * 100, "too long"),
    "deep": (entry("d/" * 21 + "x") + END, "d/" * 21 + "x", "too long"),
    "unknown type": (entry("v", kind=b"V") + END, "v", "of a type"),
    "directory with data": (entry("d", b"x", kind=b"5") + END, "d", "with data"),
    "bomb of entries": (b"".join(entry(f"{n}") for n in range(61)) + END, "60", "one entry more"),
    "bomb of implied directories": (
        b"".join(entry(f"{n}/" * 10 + "x") for n in range(8)) + END, "5/5/5/5/5/5/5/5/5/5/x", "one entry more",
    ),
    "bomb of holes": (sparse(0, 0, size=1 << 40) + END, "holes", "more than the 8M"),
    "bomb of many holes": (b"".join(old_sparse(3 << 20) for _ in range(3)) + END, "holes", "more than the 8M"),
    "metadata bomb": (pax(("comment", b"x" * 5000)) + A + END, "the first header", "more than 4096"),
    "pieces bomb": (sparse(*range(120), size=200) + END, "holes", "more than 50 pieces"),
    "wrong checksum": (A + entry("b", wrong=1) + END, "a", "checksum"),
    "a size that is none": (entry("a", size=b"0000000009\0\0") + END, "a", "not a number"),
    "a negative size": (entry("a", size=b"\xff" * 12) + END, "a", "out of bounds"),
    "an endless size": (entry("a", size=b"\x80" + b"\xff" * 11) + END, "a", "out of bounds"),
    "a large owner": (pax(("uid", b"4294967295")) + A + END, "a", "out of bounds"),
    "a size that is a word": (pax(("size", b"0x10")) + A + END, "a", "not a number"),
    "a time that is none": (pax(("mtime", b"nan")) + A + END, "a", "not a time"),
    "damaged extended header": (entry("p", b"99 path=x\n", kind=b"x") + A + END, "the first header", "damaged"),
    "two paths": (pax(("path", b"x"), ("path", b"y")) + A + END, "the first header", "several values"),
    "two extended headers": (pax(("path", b"x")) + pax(("path", b"y")) + A + END, "the first header", "two extended"),
    "two kinds of names": (entry("", b"x\0", kind=b"L") + pax(("path", b"y")) + A + END, "the first header", "long name"),
    "a global path": (pax(("path", b"x"), kind=b"g") + A + END, "the first header", "for all that follow"),
    "an extended header of nothing": (A + pax(("path", b"x")) + END, "a", "ends between"),
    "overlapping map": (sparse(0, 4, 2, 4, size=8, data=b"12345678") + END, "holes", "overlaps"),
    "map beyond the end": (sparse(0, 4, 90, 4, size=50, data=b"12345678") + END, "holes", "overlaps"),
    "map of more than is there": (sparse(0, 4, 10, 400, size=500, data=b"12345678") + END, "holes", "does not come to"),
    "map that is none": (sparse(0, -4, size=8) + END, "holes", "not a number"),
    "map that goes on": (sparse(0, 1, size=8, data=b"1").replace(b"1\n0\n1\n", b"9\n0\n1\n") + END, "holes", "truncated"),
    "map of another version": (
        pax(("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")) + A + END, "a", "of a version that is not known",
    ),
    "map with a part missing": (pax(("GNU.sparse.offset", b"0"), ("GNU.sparse.size", b"7")) + A + END, "a", "damaged"),
    "old map out of order": (old_sparse(100, (50, 2), (10, 2), data=b"abcd") + END, "holes", "out of order"),
    "old map that is none": (
        entry("holes", kind=b"S", fields={386: b"9" * 24, 483: b"%011o\0" % 9}) + END, "holes", "not a number",
    ),
    "truncated in a header": (A + entry("b")[:300], "a", "truncated"),
    "truncated in a file": (A + entry("b", b"x" * 5000)[:2000], "b", "truncated"),
    "truncated in an extended header": (pax(("path", b"x" * 900))[:700], "the first header", "truncated"),
    "no end": (A, "a", "truncated"),
    "nothing at all": (b"", "the first header", "truncated"),
    "not a tar": (b"#!/bin/sh\n" * 100, "the first header", "not a number"),
    "something after the end": (A + END + entry("b", b"x"), "a", "after the end"),
    "something far after the end": (A + END + bytes(1 << 20) + b"x", "a", "after the end"),
    "gzip: truncated": (member(A + END)[:-9], "layer", "truncated"),
    "gzip: without its sum": (member(A + END)[:-4], "layer", "truncated"),
    "gzip: wrong sum": (member(A + END)[:-8] + b"\0" * 8, "layer", "damaged"),
    "gzip: garbage after": (member(A + END) + b"garbage", "layer", "after the end of the compressed"),
    "gzip: one byte after": (member(A + END) + b"\x1f", "layer", "after the end of the compressed"),
    "gzip: garbage after zeros": (member(A + END) + bytes(300_000) + b"x", "layer", "after the end of the compressed"),
    "gzip: bomb": (member(entry("z", bytes(7 << 20)) + END), "layer", "decompression bomb"),
    "gzip: bomb after the end": (member(A + END + bytes(7 << 20)), "layer", "decompression bomb"),
    "gzip: bomb of members": (member(A + END) + member(bytes(500_000)) * 8, "layer", "decompression bomb"),
    "gzip: too much": (member(entry("z", os.urandom(9 << 20)) + END), "z", "more than the 8M"),
    "xz": (b"\xfd7zXZ\0" + bytes(100), "layer", "compressed with xz"),
    "bzip2": (b"BZh9" + bytes(100), "layer", "compressed with bzip2"),
}  # fmt: skip


def source(path: Path, data: bytes, **more: str) -> Source:
    path.write_bytes(data)
    return Source("made here", (Packed(Blob(str(path), "layer", digest=more.get("digest")), more.get("diff_id")),), None, ("x",))


def listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted(
        (str(path.relative_to(root)), path.lstat().st_ino, path.lstat().st_size)
        for path in root.rglob("*")
        if path.parent != root  # whose directories have times, and whose lock is a file
    )


def refuse(store: Store, tmp_path: Path, given: Source, limits: Limits = LIMITS) -> ArchiveError:
    """Importing fails, and neither the store nor anything near it has changed."""
    (tmp_path / "victim").write_bytes(b"as it was")
    store.add(source(tmp_path / "first.tar", entry("first", b"1") + END), ("first",))
    before = listing(store.root)
    around = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ArchiveError) as caught:
        store.add(given, ("x",), limits)
    assert listing(store.root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == around
    assert (tmp_path / "victim").read_bytes() == b"as it was"
    assert store.verify() == []
    assert [names for _, names, _ in store.images()] == [("first:latest",)]
    assert str(caught.value).isprintable()
    return caught.value


def test_the_corpus_is_large_enough():
    assert len(HOSTILE) >= 100
    assert len({data for data, _, _ in HOSTILE.values()}) == len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive(store, tmp_path, name):
    data, where, words = HOSTILE[name]
    error = refuse(store, tmp_path, source(tmp_path / "layer.tar", data))
    assert error.entry.removeprefix("./") == where.removeprefix("./")
    assert error.exit_code == 2
    assert re.search(words, error.reason)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (lambda data: data[:-5], "zstd refuses it"),
        (lambda data: data + b"garbage", "zstd refuses it"),
        (lambda data: data[:20] + b"\xff" * 8 + data[28:], "zstd refuses it"),
    ],
    ids=["truncated", "garbage after", "damaged"],
)
def test_hostile_zstd(store, tmp_path, blob, words):
    with pytest.raises(ArchiveError, match=words):
        raise refuse(store, tmp_path, source(tmp_path / "layer.tar", blob(zstd(entry("a", os.urandom(3000)) + END))))


def test_a_zstd_bomb(store, tmp_path):
    error = refuse(store, tmp_path, source(tmp_path / "layer.tar", zstd(entry("z", bytes(7 << 20)) + END)))
    assert "decompression bomb" in error.reason


@pytest.mark.parametrize("compress", [bytes, member], ids=["plain", "gzip"])
@pytest.mark.parametrize("which", ["digest", "diff_id"])
def test_a_digest_that_is_wrong(store, tmp_path, compress, which):
    """Of the blob, or of what comes out of it: all else was right, and it is as if it had never been there."""
    data = compress(A + END)
    right = {"digest": digest(data), "diff_id": digest(A + END)}
    error = refuse(store, tmp_path, source(tmp_path / "layer.tar", data, **{**right, which: digest(b"other")}))
    assert error.entry == "layer"
    assert error.reason.startswith("digest mismatch: it should be sha256:")
    store.add(source(tmp_path / "layer.tar", data, **right), ("x",))


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        lacking("zstd is not installed")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("cut", range(0, 3 * 512 + 1024, 128))
def test_cut_anywhere(store, tmp_path, cut):
    """However short: up to the first block of the mark of its end, it is truncated."""
    data = A + entry("b", b"x" * 300) + END
    whole = len(data) - 512
    given = source(tmp_path / "layer.tar", data[: min(cut, whole - 1)])
    assert "truncated" in refuse(store, tmp_path, given).reason


# ---------------------------------------------------------------- archives that are fine


def take(store: Store, tmp_path: Path, data: bytes, limits: Limits | None = None) -> Path:
    """The tree of a layer that is taken, after the store has found nothing wrong with it."""
    store.add(source(tmp_path / "layer.tar", data), ("x",), limits)
    assert store.verify() == []
    with store.lease("x") as lease:
        return lease.layers[0]


def names(tree: Path) -> list[str]:
    return sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))


def test_what_an_entry_is_like(store, tmp_path):
    if not ROOT:
        lacking("not root: owners are our own")
    tree = take(
        store,
        tmp_path,
        entry("./", kind=b"5", mode=0o751, uid=5)
        + folder("bin/", uid=1, gid=2, mtime=1_111_111_111)
        + entry("bin/su", b"#!", mode=0o4755, uid=3, gid=4, mtime=1_234_567_890)
        + entry("bin/l", kind=b"2", link="/bin/su", uid=6, gid=7)
        + END,
    )
    found = {path: (tree / path).lstat() for path in ("", "bin", "bin/su", "bin/l")}
    assert {path: (oct(stat.S_IMODE(of.st_mode)), of.st_uid, of.st_gid) for path, of in found.items()} == {
        "": ("0o751", 5, 0),
        "bin": ("0o755", 1, 2),
        "bin/su": ("0o4755", 3, 4),
        "bin/l": ("0o777", 6, 7),
    }
    assert found["bin"].st_mtime == 1_111_111_111, "what was written into it came after its time"
    assert found["bin/su"].st_mtime == 1_234_567_890
    assert (tree / "bin/su").read_bytes() == b"#!"
    assert os.readlink(tree / "bin/l") == "/bin/su"


def test_nobody_else_walks_the_store(store, tmp_path):
    take(store, tmp_path, entry("su", mode=0o4755) + END)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_whiteouts(store, tmp_path):
    if not ROOT:
        lacking("not root: no trusted.* attributes")
    tree = take(
        store,
        tmp_path,
        folder("etc") + entry("etc/.wh.passwd") + folder("opt") + entry("opt/.wh..wh..opq") + entry("opt/x") + END,
    )
    found = (tree / "etc/passwd").lstat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == 0
    assert os.getxattr(tree / "opt", "trusted.overlay.opaque") == b"y"
    assert names(tree) == ["etc", "etc/passwd", "opt", "opt/x"], "a .wh. name is on disk"
    assert "trusted.overlay.opaque" not in os.listxattr(tree / "etc")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_whiteout_hides_only_what_is_below(store, tmp_path, order):
    """Whatever comes first, what the layer has itself is there, and of what is below nothing is."""
    if not ROOT:
        lacking("not root: no trusted.* attributes")
    parts = [entry(".wh.d") + entry(".wh.f") + entry(".wh.only"), folder("d") + entry("d/x") + entry("f", b"new")]
    tree = take(store, tmp_path, b"".join(parts[number] for number in order) + END)
    assert os.getxattr(tree / "d", "trusted.overlay.opaque") == b"y"
    assert (tree / "f").read_bytes() == b"new"
    assert stat.S_ISCHR((tree / "only").lstat().st_mode)
    assert names(tree) == ["d", "d/x", "f", "only"]


def test_an_opaque_directory_that_comes_later(store, tmp_path):
    if not ROOT:
        lacking("not root: no trusted.* attributes")
    tree = take(store, tmp_path, entry("d/.wh..wh..opq") + folder("d", uid=3) + END)
    assert (tree / "d").stat().st_uid == 3
    assert os.getxattr(tree / "d", "trusted.overlay.opaque") == b"y"


def test_hard_links(store, tmp_path):
    tree = take(store, tmp_path, entry("a", b"1") + entry("b", kind=b"1", link="a") + entry("c", kind=b"1", link="/b") + END)
    assert {(tree / name).stat().st_ino for name in "abc"} == {(tree / "a").stat().st_ino}
    (tree / "c").unlink()
    (tree / "c").write_bytes(b"1")
    (tree / "c").chmod(0o644)
    [fault] = store.verify()
    assert (fault.path, fault.problem) == ("c", "is not the hard link that it should be")


def test_a_hard_link_outlives_what_it_was_made_of(store, tmp_path):
    tree = take(store, tmp_path, entry("a", b"1") + entry("b", kind=b"1", link="a") + entry("a", b"22") + END)
    assert ((tree / "a").read_bytes(), (tree / "b").read_bytes()) == (b"22", b"1")


def test_a_hard_link_to_a_symbolic_link(store, tmp_path):
    tree = take(store, tmp_path, entry("a", kind=b"2", link="/nowhere") + entry("b", kind=b"1", link="a") + END)
    assert os.readlink(tree / "b") == "/nowhere"
    assert (tree / "b").lstat().st_ino == (tree / "a").lstat().st_ino


def test_a_later_entry_replaces_an_earlier_one(store, tmp_path):
    tree = take(
        store,
        tmp_path,
        entry("f", b"old", mode=0o600) + entry("f", b"new", mode=0o640)
        + folder("d") + entry("d/x", b"1") + folder("d", mtime=99) + entry("d/x", kind=b"2", link="y")
        + folder("e") + entry("e", b"now a file")
        + entry("g", b"a file") + folder("g") + entry("g/x")
        + END,
    )  # fmt: skip
    assert ((tree / "f").read_bytes(), stat.S_IMODE((tree / "f").stat().st_mode)) == (b"new", 0o640)
    assert (os.readlink(tree / "d/x"), (tree / "d").stat().st_mtime) == ("y", 99)
    assert (tree / "e").read_bytes() == b"now a file"
    assert names(tree) == ["d", "d/x", "e", "f", "g", "g/x"]


def test_a_link_may_lead_anywhere_inside(store, tmp_path):
    tree = take(store, tmp_path, folder("a") + entry("a/l", kind=b"2", link="../x") + entry("m", kind=b"2", link="/../etc") + END)
    assert os.readlink(tree / "a/l") == "../x"
    assert os.readlink(tree / "m") == "/../etc", "an absolute one ends at the root of the image, as everywhere"


def test_names_of_every_kind(store, tmp_path):
    long = "d" * 200 + "/" + "e" * 250
    tree = take(
        store,
        tmp_path,
        pax(("path", long.encode())) + entry("cut", b"pax")
        + entry("", b"g" * 150 + b"\0", kind=b"L") + entry("cut", b"gnu")
        + entry("", b"/target/" + b"t" * 120 + b"\0", kind=b"K") + entry("k", kind=b"2")
        + entry("name", b"prefix", fields={345: b"some/prefix"})
        + entry(b"caf\xe9\n\x1b", b"bytes")
        + entry("./././dots//x", b"dots")
        + pax(("comment", b"a commit"), kind=b"g") + entry("g")
        + END,
    )  # fmt: skip
    assert (tree / long).read_bytes() == b"pax"
    assert (tree / ("g" * 150)).read_bytes() == b"gnu"
    assert os.readlink(tree / "k") == "/target/" + "t" * 120
    assert (tree / "some/prefix/name").read_bytes() == b"prefix"
    assert Path(os.fsdecode(os.fsencode(tree) + b"/caf\xe9\n\x1b")).read_bytes() == b"bytes"
    assert (tree / "dots/x").read_bytes() == b"dots"


def test_large_numbers(store, tmp_path):
    if not ROOT:
        lacking("not root: owners are our own")
    tree = take(
        store,
        tmp_path,
        entry("gnu", fields={108: b"\x80\0\0\0" + (3_000_000_000).to_bytes(4, "big")})
        + pax(("uid", b"4294967294"), ("mtime", b"-1.5"), ("size", b"3")) + entry("pax", b"abc")
        + END,
    )  # fmt: skip
    assert (tree / "gnu").stat().st_uid == 3_000_000_000
    assert ((tree / "pax").stat().st_uid, (tree / "pax").stat().st_mtime) == (4294967294, -1.5)


SIZE = 3 << 20


def holes() -> dict[str, bytes]:
    """The same file in each of GNU's ways: four bytes at the start, four at 1 MiB, a hole up to the end."""
    data = b"headtail"
    pieces = (0, 4, 1 << 20, 4, SIZE, 0)
    text = ",".join(map(str, pieces)).encode()
    pairs = [
        pair
        for n in range(0, 6, 2)
        for pair in (("GNU.sparse.offset", b"%d" % pieces[n]), ("GNU.sparse.numbytes", b"%d" % pieces[n + 1]))
    ]
    return {
        "old": old_sparse(SIZE, (0, 4), (1 << 20, 4), (SIZE, 0), data=data),
        "old, extended": extended(SIZE, [(0, 1), (1, 1), (2, 1), (3, 1), (1 << 20, 4)], data),
        "0.0": pax(("GNU.sparse.size", b"%d" % SIZE), ("GNU.sparse.numblocks", b"3"), *pairs) + entry("holes", data),
        "0.1": pax(("GNU.sparse.size", b"%d" % SIZE), ("GNU.sparse.map", text), ("GNU.sparse.name", b"holes")) + entry("x", data),
        "1.0": sparse(*pieces, size=SIZE, data=data),
    }


def extended(size: int, pieces: list[tuple[int, int]], data: bytes) -> bytes:
    fields = {386 + 24 * n: b"%011o\0%011o\0" % piece for n, piece in enumerate(pieces[:4])}
    head = entry("holes", data, kind=b"S", magic=b"ustar  \0", fields={**fields, 482: b"\1", 483: b"%011o\0" % size})
    return head[:512] + b"".join(b"%011o\0%011o\0" % piece for piece in pieces[4:]).ljust(512, b"\0") + head[512:]


@pytest.mark.parametrize("way", holes())
def test_sparse_files_stay_sparse(store, tmp_path, way):
    tree = take(store, tmp_path, holes()[way] + entry("after", b"x") + END)
    data = (tree / "holes").read_bytes()
    assert len(data) == SIZE
    assert (data[:4], data[1 << 20 : (1 << 20) + 4], data.count(0)) == (b"head", b"tail", SIZE - 8)
    assert (tree / "holes").stat().st_blocks * 512 <= 64 << 10
    assert (tree / "after").read_bytes() == b"x"


def test_extended_attributes(store, tmp_path):
    prefix = "SCHILY.xattr."
    given = [
        ("user.mine", b"\0\xff\n="),
        ("security.capability", b"x" * 20),
        ("system.posix_acl_access", b"y"),
        ("trusted.md5", b"z"),
    ]
    data = pax(*((prefix + key, value) for key, value in given)) + entry("f") + pax((prefix + "user.d", b"1")) + folder("d") + END
    tree = take(store, tmp_path, data)
    assert {key: os.getxattr(tree / "f", key) for key in os.listxattr(tree / "f")} == {"user.mine": b"\0\xff\n="}
    assert os.getxattr(tree / "d", "user.d") == b"1"
    [(image, _, _)] = store.images()
    assert store.layer(image.layers[0]).dropped == {"security.capability": 1, "system.posix_acl_access": 1, "trusted.md5": 1}


def test_devices_can_be_left_out(store, tmp_path):
    data = folder("dev") + entry("dev/null", kind=b"3") + entry("dev/f", kind=b"6") + entry("dev/x") + END
    assert names(take(store, tmp_path, data, Limits(skip_special=True))) == ["dev", "dev/x"]


def several(data: bytes) -> bytes:
    return gzip.compress(data[:700]) + gzip.compress(b"") + gzip.compress(data[700:]) + bytes(3000)


@pytest.mark.parametrize("compress", [bytes, member, several, zstd, lambda data: zstd(data[:700]) + zstd(data[700:])])
def test_compressions(store, tmp_path, compress):
    content = os.urandom(700_000)
    tree = take(store, tmp_path, compress(entry("big", content) + entry("zeros", bytes(1 << 20)) + END + bytes(9 * 1024)))
    assert (tree / "big").read_bytes() == content
    assert (tree / "zeros").read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes(store, tmp_path, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in (("short", b"1"), ("d" * 60 + "/" + "e" * 60, b"2" * 10_000), ("ü", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    tree = take(store, tmp_path, buffer.getvalue())
    assert (tree / ("d" * 60) / ("e" * 60)).read_bytes() == b"2" * 10_000
    assert (tree / "ü").read_bytes() == b"3"


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix", "ustar", "v7"])
def test_what_gnu_tar_writes(store, tmp_path, form):
    """A tree of everything there is, as tar writes it and as it is on disk, are the same to the last attribute."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/a").write_bytes(b"program")
    (tree / "bin/a").chmod(0o4711)
    os.link(tree / "bin/a", tree / "bin/b")
    (tree / "l").symlink_to("bin/a")
    (tree / "empty").mkdir(0o1777)
    with (tree / "holes").open("wb") as file:
        for at in range(0, 10 << 20, 1 << 20):
            file.seek(at)
            file.write(b"x" * 4096)
        file.truncate(SIZE * 4)
    options = ["--sparse"] if form not in ("ustar", "v7") else []
    if form in ("pax", "posix"):
        os.setxattr(tree / "bin/a", "user.x", b"1\n2")
        options.append("--xattrs")
    path = tmp_path / "made.tar"
    subprocess.run(["tar", f"--format={form}", *options, "-C", tree, "-cf", path, "."], check=True)
    taken = take(store, tmp_path, path.read_bytes())
    one, other = (os.open(each, os.O_RDONLY) for each in (tree, taken))
    try:
        assert difference(scan(one), scan(other)) is None
    finally:
        os.close(one)
        os.close(other)
    assert (taken / "bin/a").stat().st_mtime_ns // 10**9 == (tree / "bin/a").stat().st_mtime_ns // 10**9
    if options:
        assert (taken / "holes").stat().st_blocks < 1000


# ---------------------------------------------------------------- what layers below have to do with it


def test_directories_a_layer_says_nothing_of_are_as_below(store, tmp_path):
    if not ROOT:
        lacking("not root: owners are our own")
    one = folder("tmp", fields={100: b"0001777\0"}) + folder("srv", uid=7, gid=8) + entry("srv/f") + END
    two = entry("tmp/x") + entry("srv/y") + entry("new/z") + END
    (tmp_path / "1.tar").write_bytes(one)
    (tmp_path / "2.tar").write_bytes(two)
    upper = Packed(Blob(str(tmp_path / "2.tar"), "two"), digest(two))
    lower = Packed(Blob(str(tmp_path / "1.tar"), "one"), digest(one))
    store.add(Source("both", (lower, upper), None, ()), ("both",))
    store.add(Source("alone", (upper,), None, ()), ("alone",))
    store.add(Source("again", (lower, upper), None, ()), ("again",))
    assert store.verify() == []
    with store.lease("both") as both, store.lease("alone") as alone, store.lease("again") as again:
        assert both.layers == again.layers, "it was built twice"
        assert both.layers[1] != alone.layers[0]
        tree, bare = both.layers[1], alone.layers[0]
    assert [stat.S_IMODE((each / "tmp").stat().st_mode) for each in (tree, bare)] == [0o1777, 0o755]
    assert [((each / "srv").stat().st_uid, (each / "srv").stat().st_gid) for each in (tree, bare)] == [(7, 8), (0, 0)]
    assert stat.S_IMODE((tree / "new").stat().st_mode) == 0o755


@pytest.mark.parametrize("hides", [".wh.d", ".wh..wh..opq", "d"])
def test_directories_that_a_layer_hides_are_not_as_below_it(store, tmp_path, hides):
    """A whiteout, an opaque directory above, a file in its place: whatever the lowest layer had there is no more."""
    layers = []
    for number, data in enumerate((folder("d", fields={100: b"0000711\0"}), entry(hides), entry("d/x"))):
        (tmp_path / f"{number}.tar").write_bytes(data + END)
        layers.append(Packed(Blob(str(tmp_path / f"{number}.tar"), str(number)), digest(data + END)))
    store.add(Source("three", tuple(layers), None, ()), ("three",))
    store.add(Source("two", (layers[0], layers[2]), None, ()), ("two",))
    with store.lease("three") as three, store.lease("two") as two:
        assert [stat.S_IMODE((lease.layers[-1] / "d").stat().st_mode) for lease in (three, two)] == [0o755, 0o711]


def test_a_root_that_hides_everything(store, tmp_path):
    if not ROOT:
        lacking("not root: no trusted.* attributes")
    layers = []
    for number, data in enumerate((entry("old"), entry(".wh..wh..opq") + entry("new"), entry("newer"))):
        (tmp_path / f"{number}.tar").write_bytes(data + END)
        layers.append(Packed(Blob(str(tmp_path / f"{number}.tar"), str(number))))
    store.add(Source("three", tuple(layers), None, ()), ("three",))
    with store.lease("three") as lease:
        assert [names(tree) for tree in lease.layers] == [["new"], ["newer"]]


def test_what_overlay_makes_of_it(store, tmp_path):
    """The kernel's own opinion: what is whited out is gone, what is opaque shows only its own, and a redirect leads nowhere."""
    if not ROOT or not shutil.which("unshare"):
        lacking("not root, or no unshare")
    lower = b"".join(folder(f"{name}/") + entry(f"{name}/old") for name in ("gone", "opaque", "again", "kept")) + entry(
        "file", b"1"
    )
    upper = entry(".wh.gone") + entry("opaque/.wh..wh..opq") + entry("opaque/new") + entry(".wh.again") + entry("again/new")
    layers = []
    for number, data in enumerate((lower, upper + entry("kept/new") + entry("file", b"22"))):
        (tmp_path / f"{number}.tar").write_bytes(data + END)
        layers.append(Packed(Blob(str(tmp_path / f"{number}.tar"), str(number))))
    store.add(Source("two", tuple(layers), None, ()), ("two",))
    (tmp_path / "mnt").mkdir()
    with store.lease("two") as lease:
        lowers = ":".join(map(str, reversed(lease.layers)))
        script = f"cd {tmp_path} && mount -t overlay overlay -o ro,lowerdir={lowers} mnt && cd mnt && find . -type f | sort"
        done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode and "mount" in done.stderr:
        lacking(f"no overlay here: {done.stderr}")
    assert done.stdout.split() == ["./again/new", "./file", "./kept/new", "./kept/old", "./opaque/new"]


# ---------------------------------------------------------------- whatever comes


def test_a_flipped_bit_is_noticed_or_harmless(store, tmp_path):
    """Any one byte of a header changed: refused, or an archive that means something else, and the store is right about it."""
    data = folder("d") + entry("d/f", b"content") + entry("l", kind=b"2", link="d/f") + END
    for at in range(0, 3 * 512, 7):
        spoilt = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        with contextlib.suppress(ArchiveError):
            store.add(source(tmp_path / "layer.tar", spoilt), ("x",), LIMITS)
    assert store.verify() == []
    assert sorted(path.name for path in (store.root / "tmp").iterdir()) == []
