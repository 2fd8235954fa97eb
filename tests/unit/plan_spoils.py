# SPDX-License-Identifier: Apache-2.0
"""Plans and messages to spoil, each in a way whose answer is known."""

import random
import struct
from collections.abc import Sequence

from agentrun_shim.plan import HEADER_SIZE

OP_ROOT, OP_MOVE, OP_IDS, OP_FILTER = 1, 2, 33, 34
OP_AT = HEADER_SIZE + 8


def header(message: bytes, *, nfds: int | None = None) -> bytes:
    """The message with a header that tells its length, so that only what is inside is wrong."""
    spoilt = bytearray(message)
    struct.pack_into("<I", spoilt, 8, len(spoilt))
    if nfds is not None:
        struct.pack_into("<I", spoilt, 12, nfds)
    return bytes(spoilt)


def split_ops(plan: bytes) -> list[bytes]:
    at, ops = OP_AT, []
    while at < len(plan):
        size = struct.unpack_from("<I", plan, at + 4)[0]
        ops.append(plan[at : at + size])
        at += size
    return ops


def join_ops(plan: bytes, ops: Sequence[bytes], count: int | None = None) -> bytes:
    body = plan[HEADER_SIZE : HEADER_SIZE + 4] + struct.pack("<I", len(ops) if count is None else count) + b"".join(ops)
    return header(plan[:HEADER_SIZE] + body)


def put(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + struct.pack("<I", value & 0xFFFFFFFF) + data[at + 4 :]


def kind(op: bytes) -> int:
    return struct.unpack_from("<I", op)[0]


def find(ops: list[bytes], *kinds: int) -> int:
    return next(number for number, op in enumerate(ops) if kind(op) in kinds)


def spoil_plan(rng: random.Random, plan: bytes, nfds: int) -> tuple[str, bytes]:
    """A plan that must be refused, and what is wrong with it."""
    ops = split_ops(plan)
    texts = [number for number, op in enumerate(ops) if kind(op) not in (OP_ROOT, OP_IDS, OP_FILTER, 20, 32, 35)]
    number = rng.randrange(len(ops))
    what = rng.choice(SPOILS)
    if what == "truncated":
        return what, header(plan[: rng.randrange(HEADER_SIZE, len(plan))])
    if what == "longer":
        return what, header(plan + rng.randbytes(rng.randrange(1, 64)))
    if what == "count":
        return what, join_ops(plan, ops, rng.choice([0, 1, len(ops) - 1, len(ops) + 1, 2**31, 2**32 - 1]))
    if what == "size":
        size = rng.choice([0, 1, 8, 16, 23, len(ops[number]) + 4, 2**31, 2**32 - 8, 2**32 - 1, rng.randrange(2**16, 2**32)])
        ops[number] = put(ops[number], 4, size)
    elif what == "type":
        ops[number] = put(ops[number], 0, rng.choice([0, 5, 15, 23, 31, 37, 255, 256, 2**16 + 1, 2**32 - 1]))
    elif what == "unterminated":
        number = rng.choice(texts)
        ops[number] = ops[number][:24] + bytes(b or 1 for b in ops[number][24:])
    elif what == "fd":
        number = rng.choice([n for n, op in enumerate(ops) if kind(op) in (OP_ROOT, OP_MOVE)])
        ops[number] = put(ops[number], 8, rng.choice([nfds, nfds + 1, 64, 2**31, 2**32 - 1]))
    elif what == "filter":
        number = find(ops, OP_FILTER)
        ops[number] = put(ops[number], 8, rng.choice([0, (len(ops[number]) - 24) // 8 + 1, 4097, 2**29 + 1, 2**31, 2**32 - 1]))
    elif what == "no ids":
        del ops[find(ops, OP_IDS)]
    elif what == "root's ids":
        number = find(ops, OP_IDS)
        ops[number] = put(ops[number], 8, 0)
    elif what == "groups":
        number = find(ops, OP_IDS)
        ops[number] = put(ops[number], 16, rng.choice([(len(ops[number]) - 24) // 4 + 1, 33, 2**30, 2**31, 2**32 - 1]))
    elif what == "no root":
        del ops[find(ops, OP_ROOT)]
    elif what == "two roots":
        ops.insert(rng.randrange(1, len(ops)), ops[0])
    elif what == "late root":
        other = rng.randrange(1, len(ops))
        ops[0], ops[other] = ops[other], ops[0]
    else:
        assert what == "namespaces"
        flags = struct.unpack_from("<I", plan, HEADER_SIZE)[0]
        bad = rng.choice(
            [0, 0x80, 0x100, 0x10000, 2**31, 2**32 - 1, *(flags & ~bit for bit in (0x20000, 0x10000000, 0x20000000))]
        )
        return what, put(plan, HEADER_SIZE, bad)
    return what, join_ops(plan, ops)


SPOILS = (
    "truncated", "longer", "count", "size", "type", "unterminated", "fd", "filter", "no ids", "root's ids", "groups", "no root",
    "two roots", "late root", "namespaces",
)  # fmt: skip


def flip(rng: random.Random, message: bytes, first: int = 0, last: int | None = None) -> bytes:
    spoilt = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        spoilt[rng.randrange(first, last or len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)
