"""Build the first root file system of the guest: just enough to mount the second one.

The guest's real root is the host's ``/``, shared by 9p; but stock kernels have 9p and overlayfs as modules,
so something has to load them first.  That something is an initramfs holding a static busybox, those modules
with everything they depend on, and ``init.sh`` as ``/init``.  An initramfs is a cpio archive in the "newc"
format (Documentation/driver-api/early-userspace/buffer-format.rst), which takes thirty lines to write; no
mkinitramfs, cpio or root is needed.

Modules are stored decompressed (the guest would be slow at it) in the order they have to be loaded, which the
modules tell themselves: each has a ``depends=`` entry in its ``.modinfo`` section.

The archive is kept beside the kernel under a name made from everything that goes into it, so a change of any
input (busybox, this file, init.sh, the module list) simply leads to another name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import compress, decompress
from tests.vm.kernels import Unpacked

HERE = Path(__file__).resolve().parent

# What init.sh needs before it has a root.  Some kernels have some of these built in, which is as good.
MODULES = ("virtio_pci", "virtio_console", "virtio_rng", "9pnet_virtio", "9p", "overlay")
# For the scratch disk, if asked for.  ext4 finds crc32c by an alias, not by a dependency.
EXT4_MODULES = ("virtio_blk", "crc32c_generic", "ext4")

DIRECTORIES = ("bin", "dev", "lower", "modules", "proc", "root", "sys", "upper")


@dataclass(frozen=True)
class Entry:
    """One member of a cpio archive."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def ensure(kernel: Unpacked, modules: Sequence[str] = MODULES) -> Path:
    """The initramfs of `kernel` with `modules`, built if it does not exist yet."""
    busybox = find_busybox()
    if busybox is None:
        raise FileNotFoundError("busybox is not installed")
    inputs = hashlib.sha256()
    for part in (busybox.read_bytes(), Path(__file__).read_bytes(), (HERE / "init.sh").read_bytes()):
        inputs.update(hashlib.sha256(part).digest())
    inputs.update(" ".join(modules).encode())
    target = kernel.directory / f"initramfs-{inputs.hexdigest()[:16]}.gz"
    if not target.exists():
        archive = compress(build(kernel, modules, busybox))
        with tempfile.NamedTemporaryFile(dir=kernel.directory, prefix=".initramfs-", delete=False) as file:
            file.write(archive)
        os.rename(file.name, target)
    return target


def build(kernel: Unpacked, modules: Sequence[str], busybox: Path) -> bytes:
    loaded = resolve(kernel, modules)
    entries = [Entry(name, stat.S_IFDIR | 0o755) for name in DIRECTORIES]
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(Entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries.append(Entry("init", stat.S_IFREG | 0o755, (HERE / "init.sh").read_bytes()))
    for name, data in loaded.items():
        entries.append(Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, data))
    order = "".join(f"{name}\n" for name in loaded)
    entries.append(Entry("modules/order", stat.S_IFREG | 0o644, order.encode()))
    return b"".join(cpio(entries))


def resolve(kernel: Unpacked, wanted: Sequence[str]) -> dict[str, bytes]:
    """The contents of the `wanted` modules and of all they depend on, in an order they can be loaded in."""
    tree = kernel.modules / kernel.release
    # Files say 9pnet-virtio or 9pnet_virtio as they please; to the kernel, the two are the same.
    files = {_module_name(path): path for path in tree.glob("kernel/**/*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:  # built in, one hopes; if not, the guest's init will complain
            return
        data = decompress(files[name].read_bytes())
        for dependency in depends(data):
            load(dependency)
        loaded[name] = data

    for name in wanted:
        load(_module_name(Path(name)))
    return loaded


def depends(module: bytes) -> list[str]:
    """The names in the ``depends=`` entry of a module's .modinfo section."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_module_name(Path(name)) for name in match[1].decode().split(",") if name] if match else []


def cpio(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The archive as a series of chunks."""
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        links, uid, gid, mtime, device_major, device_minor, checksum = 1, 0, 0, 0, 0, 0, 0
        fields = (
            *(inode, entry.mode, uid, gid, links, mtime, len(entry.data)),
            *(device_major, device_minor, *entry.device, len(name), checksum),
        )
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        yield _padded(header + name)
        yield _padded(entry.data)


def find_busybox() -> Path | None:
    """A statically linked busybox: there are no libraries yet where it runs."""
    found = shutil.which("busybox", path="/usr/bin:/bin:/usr/sbin:/sbin")
    return Path(found) if found and is_static(Path(found)) else None


def is_static(program: Path) -> bool:
    """Whether this 64-bit ELF file has no PT_INTERP, that is, names no dynamic loader."""
    data = program.read_bytes()
    if not data.startswith(b"\x7fELF"):
        return False
    phoff = int.from_bytes(data[0x20:0x28], "little")
    size, count = (int.from_bytes(data[at : at + 2], "little") for at in (0x36, 0x38))
    kinds = (int.from_bytes(data[phoff + i * size : phoff + i * size + 4], "little") for i in range(count))
    return 3 not in kinds  # PT_INTERP


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
