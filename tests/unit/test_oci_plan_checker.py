# SPDX-License-Identifier: Apache-2.0
"""The checker of container plans, compiled for this host with the address and undefined-behaviour sanitizers."""

import random
import struct
import subprocess
from pathlib import Path

from agentrun_shim import plan as plan_module
from agentrun_shim.container_plan import OPS, Plan, strings
from agentrun_shim.oci import launch

NATIVE = Path(__file__).parents[2] / "shim" / "native"

HARNESS = r"""
#include "oci_container.c"
#include <stdio.h>
#include <stdlib.h>

// Records of stdin: u32 length, bytes. Each in an allocation of exactly its length.
int main(void) {
    uint32_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        char *plan = malloc(length ? length : 1);
        if (length && fread(plan, length, 1, stdin) != 1) return 3;
        struct container c = {0};
        size_t seen = 0;
        bool good = plan_check(&c, plan, length);
        if (good) {  // read what whoever executes it would read
            const struct plan_op *op = c.first;
            for (uint32_t i = 0; i < c.nops; i++, op = op_next(op)) {
                const char *text = op_text(op), *blob = text;
                for (unsigned k = 0; k < sizeof container_strings / sizeof *container_strings; k++)
                    if (container_strings[k].type == op->type) {
                        for (unsigned s = container_strings[k].strings; s; s--) seen += str_len(text), text = text_next(text);
                        if (container_strings[k].strings) blob = op_blob(op, text);
                    }
                for (uint64_t b = 0; b < blob_need(op); b++) seen += (unsigned char)blob[b];
                if (op->type == COP_EXEC || op->type == COP_HOOK)
                    for (uint32_t s = op->a + op->b; s; s--) seen += str_len(blob), blob = text_next(blob);
            }
        }
        printf("%d\n", good);
        free(plan);
    }
    return 0;
}
"""


def model() -> bytes:
    """A plan with every operation."""
    plan = Plan()
    blobs = {
        "IDS": bytes(8),
        "PROGRAM": bytes(16),
        "SECCOMP": bytes(16),
        "USERNS": bytes(32),
        "BOUND": bytes(8),
        "CAPS": bytes(32),
    }
    blobs |= {"SCHED": bytes(56), "AFFINITY": bytes(8), "MEMPOLICY": bytes(8), "LIMIT": bytes(16)}
    numbers = {
        "IDS": {"c": 2},
        "PROGRAM": {"a": 2},
        "SECCOMP": {"a": 2},
        "USERNS": {"b": 2},
        "AFFINITY": {"a": 8},
        "MEMPOLICY": {"b": 8},
    }
    for name, (_, count) in OPS.items():
        if name not in ("EXEC", "HOOK"):
            plan.add(name, *["text"] * count, **numbers.get(name, {}), blob=blobs.get(name, b""))
    plan.add("HOOK", "/bin/x", a=2, b=1, blob=strings(["x", "y", "A=b"]))
    plan.add("EXEC", a=2, b=1, blob=strings(["sh", "-c", "A=b"]))
    return plan.pack()


def resized(data: bytes) -> bytes:
    return data[:8] + struct.pack("<I", len(data)) + data[12:] if len(data) >= 12 else data


def test_the_checker_reads_nothing_but_the_plan(tmp_path):
    rng = random.Random(6)
    plan = model()
    cut = [plan[:size] for size in range(0, len(plan), 3)] + [resized(plan[:size]) for size in range(24, len(plan), 3)]
    flipped = []
    for _ in range(6000):
        data = bytearray(plan)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        flipped.append(bytes(data))
    words = []
    for _ in range(4000):  # a number of an operation that is far off
        data = bytearray(plan)
        struct.pack_into(
            "<I", data, rng.randrange(24, len(data) - 4) & ~3, rng.choice((0, 1, 7, 8, 64, 2**16, 2**31, 2**32 - 8, 2**32 - 1))
        )
        words.append(bytes(data))
    cases = [plan, *cut, *flipped, *words, *[resized(plan[:24] + rng.randbytes(rng.randrange(400))) for _ in range(500)]]
    (tmp_path / "plan.h").write_text(plan_module.c_header())
    (tmp_path / "harness.c").write_text(HARNESS)
    program = tmp_path / "harness"
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-builtin"]
    others = [NATIVE / name for name in ("oci_tree.c", "oci_copy.c", "oci_process.c", "shared.c", "rights.c")]
    subprocess.run(
        ["cc", "-std=c11", *sanitize, f"-I{NATIVE}", f"-I{tmp_path}", "-o", program, tmp_path / "harness.c", *others], check=True
    )
    given = b"".join(struct.pack("<I", len(case)) + case for case in cases)
    env = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program], input=given, capture_output=True, timeout=60, env=env)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    answers = done.stdout.decode().split()
    assert len(answers) == len(cases)
    assert answers[0] == "1"
    assert set(answers[1 : 1 + len(cut)]) == {"0"}
    assert "1" in answers[1 + len(cut) :]  # a flipped bit in a name is still a plan


def test_a_spoilt_plan_is_an_answer_and_nothing_is_done(tmp_path):
    """Given to the program itself."""
    for spoilt in (b"", b"x" * 40, model()[:-8], resized(model()[:-8])):
        path = tmp_path / "plan"
        path.write_bytes(spoilt)
        with path.open("rb") as plan:
            argv = ["agentrun-oci: container", str(plan.fileno()), "1", "0", "0"]
            done = subprocess.run(
                argv, executable=launch.NATIVE, pass_fds=[plan.fileno()], stdin=subprocess.DEVNULL,
                capture_output=True, timeout=10,
            )  # fmt: skip
        kind, step, error, _, _ = struct.unpack("<IIiIQ", done.stdout)
        assert (done.returncode, kind, step, error) == (1, 19, plan_module.Step.PLAN, 22)
