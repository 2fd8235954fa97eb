"""Take kernel files out of their compression.

A bzImage is a 16-bit setup program followed by a small decompressor and the compressed ELF kernel.  Run
under emulation, that decompressor costs about a second of every boot; done once here, on the real CPU, it
costs half a second per kernel *ever*.  The ELF file inside is bootable as it is: kernels built with
CONFIG_PVH carry a Xen note naming their 32-bit entry point, and QEMU's ``-kernel`` starts there.  There is
then no KASLR (the decompressor does that), which a test kernel does not miss.

Modules are compressed too (``.ko``, ``.ko.xz``, ``.ko.zst`` by Debian release); `decompress` looks at the
magic number and not at the name.  Zstandard is not in the standard library before Python 3.14, so it needs
``zstd``.

Layout of the setup header: Documentation/arch/x86/boot.rst, fields ``setup_sects``, ``payload_offset`` and
``payload_length`` (protocol 2.08 and later).
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
import zlib
from pathlib import Path

XZ_MAGIC = b"\xfd7zXZ\0"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
GZIP_MAGIC = b"\x1f\x8b"
ELF_MAGIC = b"\x7fELF"

SECTOR = 512
SETUP_SECTS = 0x1F1
HEADER_MAGIC = 0x202  # "HdrS"
PROTOCOL_VERSION = 0x206
PAYLOAD = 0x248  # payload_offset, payload_length: two u32

PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18


class NotExtractable(Exception):
    """The image holds no ELF kernel that can be started directly; boot the bzImage instead."""


def decompress(data: bytes) -> bytes:
    """The contents of `data`, which may be followed by the size field that the kernel build appends."""
    if data.startswith(XZ_MAGIC):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(GZIP_MAGIC):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(ZSTD_MAGIC):
        # Bytes after the frame make zstd fail, but not before it has written the frame: judge by output.
        result = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False)
        if result.returncode != 0 and not result.stdout:
            raise ValueError(f"zstd: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout
    return data


def compress(data: bytes) -> bytes:
    """Reproducible gzip, at the level that costs the guest least."""
    return gzip.compress(data, compresslevel=1, mtime=0)


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage, if it has a PVH entry point."""
    if bzimage[HEADER_MAGIC : HEADER_MAGIC + 4] != b"HdrS":
        raise NotExtractable("no setup header")
    (version,) = struct.unpack_from("<H", bzimage, PROTOCOL_VERSION)
    if version < 0x208:
        raise NotExtractable(f"boot protocol {version:#x} has no payload fields")
    offset, length = struct.unpack_from("<II", bzimage, PAYLOAD)
    start = (bzimage[SETUP_SECTS] + 1) * SECTOR + offset
    try:
        vmlinux = decompress(bzimage[start : start + length])
    except FileNotFoundError as error:
        raise NotExtractable(f"{error.filename} is not installed") from error
    if not vmlinux.startswith(ELF_MAGIC):
        raise NotExtractable(f"unknown compression {vmlinux[:6].hex()}")
    if not has_pvh_entry(vmlinux):
        raise NotExtractable("no PVH entry point (CONFIG_PVH)")
    return vmlinux


def has_pvh_entry(elf: bytes) -> bool:
    """Whether a note in the 64-bit ELF file `elf` tells a hypervisor where to start it in 32-bit mode."""
    (phoff,) = struct.unpack_from("<Q", elf, 0x20)
    phentsize, phnum = struct.unpack_from("<HH", elf, 0x36)
    for index in range(phnum):
        header = phoff + index * phentsize
        (kind,) = struct.unpack_from("<I", elf, header)
        if kind != PT_NOTE:
            continue
        (position,) = struct.unpack_from("<Q", elf, header + 0x08)
        (size,) = struct.unpack_from("<Q", elf, header + 0x20)
        end = position + size
        while position + 12 <= end:
            name_size, desc_size, note = struct.unpack_from("<III", elf, position)
            name = elf[position + 12 : position + 12 + name_size]
            if note == XEN_ELFNOTE_PHYS32_ENTRY and name.rstrip(b"\0") == b"Xen":
                return True
            position += 12 + _aligned(name_size) + _aligned(desc_size)
    return False


def write_vmlinux(bzimage: Path, target: Path) -> bool:
    """Extract `bzimage` to `target`; False if it has to be booted as it is."""
    try:
        target.write_bytes(extract_vmlinux(bzimage.read_bytes()))
    except NotExtractable:
        return False
    return True


def _aligned(size: int) -> int:
    return (size + 3) & ~3
