# SPDX-License-Identifier: Apache-2.0
"""A big image, made in seconds, the same every time: at least 1 GB in at least 20,000 files, with programs that run.

::

    python -m tests.image.big image.tar            # or, from a test: write_tar(path), write_tree(directory)

Sizes are spread as in real images: most files have a few kB, some have many MB. No two have the same content, so nothing that
saves by comparing has it easier than with a real one. There are hard links, symbolic links, set-id bits, owners other than root,
names that are not ASCII; and busybox as /bin/sh and all its names, of this machine.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

FILES = 20_000
SIZE = 1 << 30
_POOL = 8 << 20
_LARGE = 24
"""Files that are libraries, models, packs: what the many small ones leave of the size is spread over them."""
_PER_DIRECTORY = 40
_MTIME = 1_700_000_000
_APPLETS = "cat du echo find id ls mkdir rm sh sha256sum sleep stat test touch true wc".split()  # noqa: SIM905
_PLACES = (
    *((name, 0o755) for name in ("bin", "dev", "etc", "home", "proc", "run", "sys", "usr", "usr/lib", "var")),
    ("root", 0o700), ("tmp", 0o1777), ("var/tmp", 0o1777),
)  # fmt: skip
_OWNERS = ((0, 0), (0, 0), (0, 0), (33, 33), (1000, 1000), (65534, 65534))


class Item(msgspec.Struct):
    """One entry."""

    name: str
    kind: str
    """``d``, ``f``, ``l`` (symbolic link) or ``h`` (hard link)."""
    mode: int = 0o755
    owner: tuple[int, int] = (0, 0)
    data: bytes | memoryview = b""
    target: str = ""


class Made(msgspec.Struct):
    """What was written."""

    files: int = 0
    size: int = 0


def items(files: int = FILES, size: int = SIZE) -> Iterator[Item]:
    """Every entry, directories before what is in them."""
    yield from _system()
    rng = random.Random(20_261_101)
    pool = memoryview(rng.randbytes(_POOL) * 2)
    small = [min(400_000, max(1, int(rng.lognormvariate(8.3, 1.6)))) for _ in range(files)]
    scale = min(1.0, 0.6 * size / sum(small))
    left = size - sum(int(length * scale) for length in small)
    known = {name for name, _ in _PLACES}
    for number, length in enumerate(small):
        directory = f"usr/lib/parts/{number // 4000:02}/{number // _PER_DIRECTORY:04}"
        yield from _directories(directory, known)
        head = b"%016d" % number
        start = rng.randrange(_POOL)
        body = bytes(pool[start : start + max(0, int(length * scale) - len(head))])
        name = f"{directory}/{'größe' if number % 500 == 0 else 'file'}-{number:06}.dat"
        mode = (0o644, 0o644, 0o755, 0o600, 0o4755)[rng.choices(range(5), (60, 20, 15, 4, 1))[0]]
        yield Item(name, "f", mode, rng.choice(_OWNERS), head + body)
        if number % 50 == 1:
            yield Item(f"{name}.link", "h", target=name)
        if number % 40 == 2:
            yield Item(f"{name}.symlink", "l", target=os.path.basename(name))
    yield from _directories("usr/lib/large", known)
    for number in range(_LARGE):
        length = left // _LARGE + (left % _LARGE if number == 0 else 0)
        times, rest = divmod(max(0, length - 16), _POOL)
        body = bytes(pool[:_POOL]) * times + bytes(pool[:rest])
        yield Item(f"usr/lib/large/lib{number:02}.so", "f", data=b"L%015d" % number + body)


def _system() -> Iterator[Item]:
    """What it takes to run something: busybox, users, the places that are mounted over."""
    for name, mode in _PLACES:
        yield Item(name, "d", mode)
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox is not installed"
    yield Item("bin/busybox", "f", data=Path(busybox).read_bytes())
    for applet in _APPLETS:
        yield Item(f"bin/{applet}", "l", target="busybox")
    yield Item("etc/passwd", "f", 0o644, data=b"root:x:0:0::/root:/bin/sh\nwww:x:33:33::/:/bin/sh\n")
    yield Item("etc/group", "f", 0o644, data=b"root:x:0:\nwww:x:33:\n")


def _directories(path: str, known: set[str]) -> Iterator[Item]:
    for end in range(1, path.count("/") + 2):
        name = "/".join(path.split("/")[:end])
        if name not in known:
            known.add(name)
            yield Item(name, "d")


def write_tar(path: Path, files: int = FILES, size: int = SIZE) -> Made:
    """Write it as a tar."""
    made = Made()
    types = {"d": tarfile.DIRTYPE, "f": tarfile.REGTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}
    with path.open("wb", buffering=1 << 20) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in items(files, size):
            info = tarfile.TarInfo(item.name)
            info.type, info.mode, info.mtime = types[item.kind], item.mode, _MTIME
            (info.uid, info.gid), info.size, info.linkname = item.owner, len(item.data), item.target
            archive.addfile(info, io.BytesIO(item.data))
            made.files += item.kind == "f"
            made.size += len(item.data)
    return made


def write_tree(root: Path, files: int = FILES, size: int = SIZE) -> Made:
    """Write it as a directory; as root, or all of it is the caller's."""
    made = Made()
    for item in items(files, size):
        path = root / item.name
        if item.kind == "d":
            path.mkdir()
            path.chmod(item.mode)
        elif item.kind == "l":
            path.symlink_to(item.target)
        elif item.kind == "h":
            path.hardlink_to(root / item.target)
        else:
            path.write_bytes(item.data)
            if os.geteuid() == 0:
                os.chown(path, *item.owner)
            path.chmod(item.mode)
        if item.kind != "d":
            os.utime(path, (_MTIME, _MTIME), follow_symlinks=False)
        made.files += item.kind == "f"
        made.size += len(item.data)
    return made


if __name__ == "__main__":
    written = write_tar(Path(sys.argv[1]))
    print(f"{written.files} files, {written.size} bytes")
    subprocess.run(["ls", "-l", sys.argv[1]], check=True)
