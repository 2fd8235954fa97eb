# SPDX-License-Identifier: Apache-2.0
"""The plan checker alone, compiled for this host with the address and undefined-behaviour sanitizers."""

import errno
import random
import struct
import subprocess
from pathlib import Path

from agentrun_shim import plan as plan_module
from agentrun_shim.plan import HEADER_SIZE, Op, Step, pack_op
from tests.unit.plan_spoils import flip, spoil_plan

NATIVE = Path(__file__).parents[2] / "shim" / "native"

HARNESS = r"""
#include "slot.h"
#include <stdio.h>
#include <stdlib.h>

// Records of stdin: u32 length, u32 descriptors, bytes. Each in an allocation of exactly its length.
int main(void) {
    uint32_t head[2];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        char *plan = malloc(head[0] ? head[0] : 1);
        if (head[0] && fread(plan, head[0], 1, stdin) != 1) return 3;
        struct shape shape;
        struct failure why;
        bool good = plan_load(plan, head[0], head[1], &shape, &why);
        size_t seen = 0;
        if (good) {  // walk it as template.c, init.c and runner.c do
            const struct plan_op *op = shape.first;
            for (uint32_t i = 0; i < shape.nops; i++, op = op_next(op)) {
                const char *text = op_text(op);
                for (unsigned k = 0; k < sizeof op_strings / sizeof *op_strings; k++)
                    if (op_strings[k].type == op->type)
                        for (unsigned s = op_strings[k].strings; s; s--) seen += str_len(text), text = text_next(text);
                if (op->type == OP_IDS)
                    for (uint32_t b = 0; b < op->c * 4; b++) seen += (unsigned char)op_text(op)[b];
                if (op->type == OP_FILTER)
                    for (uint32_t b = 0; b < op->a * 8; b++) seen += (unsigned char)op_text(op)[b];
            }
        }
        printf("%d %u %d\n", good, good ? 0 : why.step, good ? 0 : why.error);
        free(plan);
    }
    return 0;
}
"""


def model_plan() -> bytes:
    """A plan with every operation, made without the host's mounts."""
    ops = [
        pack_op(Op.ROOT), pack_op(Op.MOVE, b"usr", a=1), pack_op(Op.BIND, b"a", b"b"), pack_op(Op.SETATTR, b".", a=3),
        pack_op(Op.MOUNT, b"proc", b"/proc", b"", a=14), pack_op(Op.MKDIR, b"/tmp", a=0o1777),
        pack_op(Op.SLOT_BIND, b"/s", b"/tmp"),
        pack_op(Op.HOSTNAME, b"sandbox"), pack_op(Op.LOOPBACK), pack_op(Op.RLIMIT, a=4),
        pack_op(Op.MASK, b"/proc/keys"), pack_op(Op.READ_ONLY, b"/proc/sys"), pack_op(Op.LANDLOCK, a=2),
        pack_op(Op.WRITABLE, b"/tmp"),
        pack_op(Op.IDS, a=1000, b=1000, c=3, blob=bytes(12)),
        pack_op(Op.FILTER, a=3, blob=bytes(range(24))),
    ]  # fmt: skip
    return plan_module.pack_shape(0x7E020000, ops, 2)


def test_the_plan_checker_reads_nothing_but_the_plan(tmp_path):
    rng = random.Random(8)
    plan = model_plan()
    cases = [(plan, 2), (plan, 1), (b"", 0)]
    cases += [(plan[:size], 2) for size in range(len(plan))]
    cases += [(flip(rng, plan), 2) for _ in range(4000)]
    cases += [(spoil_plan(rng, plan, 2)[1], 2) for _ in range(3000)]
    cases += [(plan[:HEADER_SIZE] + rng.randbytes(rng.randrange(8 * 40)), rng.randrange(3)) for _ in range(500)]
    (tmp_path / "plan.h").write_text(plan_module.c_header())
    (tmp_path / "harness.c").write_text(HARNESS)
    program = tmp_path / "harness"
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-builtin"]
    subprocess.run(
        ["cc", "-std=c11", *sanitize, f"-I{NATIVE}", f"-I{tmp_path}", "-o", program, tmp_path / "harness.c", NATIVE / "plan.c"],
        check=True,
    )
    data = b"".join(struct.pack("<II", len(message), nfds) + message for message, nfds in cases)
    env = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program], input=data, capture_output=True, timeout=60, env=env)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    answers = done.stdout.decode().splitlines()
    assert len(answers) == len(cases)
    assert answers[:3] == ["1 0 0", f"0 {Step.PLAN} {errno.EINVAL}", f"0 {Step.PLAN} {errno.EINVAL}"]
    assert set(answers[3 : 3 + len(plan)]) == {f"0 {Step.PLAN} {errno.EINVAL}"}
    spoilt = answers[-3500:-500]
    assert set(spoilt) == {f"0 {Step.PLAN} {errno.EINVAL}"}
    assert "1 0 0" in answers[3 + len(plan) : -3500]  # a flipped bit in a name is still a plan
