"""BPF maps by descriptor, without BCC: the daemon gets the maps of the probes process and reads and writes them itself.

bpf(2) through ctypes for hash maps; arrays made with ``BPF_F_MMAPABLE`` and the ring buffer are memory that both sides see, so
nothing on the way of a call is a system call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

_NR_BPF = 321  # x86-64
_LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _INFO_BY_FD = 1, 2, 3, 4, 15
_ENOENT = 2
_BUSY, _DISCARD, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1
PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(_NR_BPF, command, attr, len(attr))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def possible_cpus() -> int:
    """How many values a per-CPU map has for each key: processors that may ever be there, not those that run."""
    with open("/sys/devices/system/cpu/possible") as file:
        return int(file.read().strip().split(",")[-1].split("-")[-1]) + 1


class Map:
    """A map with keys. Keys and values are bytes; closes its descriptor with ``close``."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        """``value_size`` is one value's; of a per-CPU map, ``round_up(size, 8) * possible_cpus()``."""
        self.fd = fd
        self._key = ctypes.create_string_buffer(key_size)
        self._next = ctypes.create_string_buffer(key_size)
        self._value = ctypes.create_string_buffer(value_size)
        element = struct.pack("<I4xQQQ", fd, ctypes.addressof(self._key), ctypes.addressof(self._value), 0)
        self._element = ctypes.create_string_buffer(element, len(element))
        only_key = struct.pack("<I4xQQQ", fd, ctypes.addressof(self._key), 0, 0)
        self._only_key = ctypes.create_string_buffer(only_key, len(only_key))
        following = struct.pack("<I4xQQQ", fd, ctypes.addressof(self._key), ctypes.addressof(self._next), 0)
        self._following = ctypes.create_string_buffer(following, len(following))
        first = struct.pack("<I4xQQQ", fd, 0, ctypes.addressof(self._next), 0)
        self._first = ctypes.create_string_buffer(first, len(first))

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key."""
        self._key.raw = key
        try:
            _bpf(_LOOKUP, self._element)
        except OSError as error:
            if error.errno == _ENOENT:
                return None
            raise
        return self._value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Set a key's value.

        Raises:
            OSError: the map is full (E2BIG), or the value is none.
        """
        self._key.raw, self._value.raw = key, value
        _bpf(_UPDATE, self._element)

    def delete(self, key: bytes) -> None:
        """Remove a key, if it is there."""
        self._key.raw = key
        try:
            _bpf(_DELETE, self._only_key)
        except OSError as error:
            if error.errno != _ENOENT:
                raise

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value; those that come and go meanwhile may be missed, or seen twice."""
        attr = self._first
        while True:
            try:
                _bpf(_NEXT_KEY, attr)
            except OSError as error:
                if error.errno == _ENOENT:
                    return
                raise
            key = self._next.raw
            value = self.lookup(key)
            if value is not None:
                yield key, value
            self._key.raw = key
            attr = self._following

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Memory:
    """An array map made with BPF_F_MMAPABLE, as memory: ``view`` is it, ``words`` and ``quads`` are its u32 and u64.

    What the programs may read meanwhile is written through those two: one store each. ``struct.pack_into`` clears all the bytes
    it is given before it writes any.
    """

    def __init__(self, fd: int, value_size: int, count: int) -> None:
        """Elements lie ``round_up(value_size, 8)`` bytes apart. Takes over the descriptor.

        Raises:
            OSError: it cannot be mapped.
        """
        size = (value_size + 7) // 8 * 8 * count
        self._map = mmap.mmap(fd, (size + PAGE - 1) // PAGE * PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        self.view = memoryview(self._map)
        self.words, self.quads = self.view.cast("I"), self.view.cast("Q")

    def close(self) -> None:
        """Let go of it; the views must not be used any more."""
        for view in (self.words, self.quads, self.view):
            view.release()
        self._map.close()


class Ring:
    """The reading end of a BPF ring buffer: Documentation/bpf/ringbuf. ``fd`` becomes readable when there is something."""

    def __init__(self, fd: int, size: int) -> None:
        """``size`` bytes of data, a power of two. Takes over the descriptor."""
        self.fd = fd
        self._mask = size - 1
        # First page: the consumer's position, ours to write. Then the producer's, and the data twice, so that no record wraps.
        self._map = mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # Written in one store: a position that is 0 for a moment is a full buffer, and an event lost.
        self._consumed = memoryview(self._map).cast("Q")
        self._producer = mmap.mmap(fd, PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE)

    def read(self) -> Iterator[bytes]:
        """The records that are complete, each once."""
        position = self._consumed[0]
        while position < struct.unpack_from("@Q", self._producer)[0]:
            at = PAGE + (position & self._mask)
            (header,) = struct.unpack_from("@I", self._producer, at)
            if header & _BUSY:
                return  # reserved and not yet written; its writer wakes us
            length = header & _LENGTH
            record = None if header & _DISCARD else self._producer[at + 8 : at + 8 + length]
            position += (length + 15) // 8 * 8
            self._consumed[0] = position
            if record is not None:
                yield record

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            self._consumed.release()
            self._map.close()
            self._producer.close()
            os.close(self.fd)
            self.fd = -1
