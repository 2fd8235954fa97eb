# SPDX-License-Identifier: Apache-2.0
"""The plan format: what Python packs is what the C compiler reads, and nothing else is packed."""

import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun_shim import plan
from agentrun_shim.plan import (
    DONE_SIZE,
    EVENT_SIZE,
    HEADER_SIZE,
    MAGIC,
    MAX_MESSAGE,
    MAX_RUN,
    STRINGS,
    STRUCTS,
    VERSION,
    Done,
    Event,
    Kind,
    Op,
    PlanError,
    RunFlag,
    SlotFlag,
    Step,
    pack_op,
    pack_run,
    pack_shape,
    pack_slot,
    pack_userns,
    unpack_done,
    unpack_event,
)  # fmt: skip

HEAD, OP, SLOT, MAP, RUN = "<IHHII", "<6I", "<II", "<4I", "<6I"
CODES = {"uint16_t": "H", "uint32_t": "I", "int32_t": "i", "uint64_t": "Q"}
U32 = st.integers(0, 2**32 - 1)
TEXT = st.binary(max_size=40).filter(lambda text: b"\0" not in text)
MAPS = st.lists(st.tuples(st.booleans(), U32, U32, U32), max_size=64)


def test_the_generated_header_agrees_with_the_compiler(tmp_path):
    (tmp_path / "plan.h").write_text(plan.c_header())
    lines, expected = [], []
    for name, fields in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        expected.append(f"{name} {struct.calcsize('<' + ''.join(CODES[kind] for _, kind in fields))}")
        at = 0
        for field, kind in fields:
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field}));'
            )
            size = struct.calcsize(CODES[kind])
            expected.append(f"{name}.{field} {at} {size}")
            at += size
    for prefix, members in (("KIND", Kind), ("OP", Op), ("STEP", Step), ("SLOT", SlotFlag), ("RUN", RunFlag)):
        for member in members:
            lines.append(f'printf("{prefix}_{member.name} %d\\n", {prefix}_{member.name});')
            expected.append(f"{prefix}_{member.name} {member.value}")
    for constant in ("MAGIC", "VERSION", "MAX_MESSAGE", "MAX_RUN", "MAX_FILTER"):
        lines.append(f'printf("{constant} %u\\n", PLAN_{constant});')
        expected.append(f"{constant} {getattr(plan, constant)}")
    lines.append(
        "for (unsigned i = 0; i < sizeof op_strings / sizeof *op_strings; i++)"
        ' printf("%d=%d\\n", op_strings[i].type, op_strings[i].strings);'
    )
    expected += [f"{op.value}={STRINGS.get(op, 0)}" for op in Op]
    (tmp_path / "t.c").write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "plan.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "t", tmp_path / "t.c"], check=True)
    assert subprocess.check_output([tmp_path / "t"], text=True).splitlines() == expected


def test_the_sizes_on_the_wire_are_frozen():
    assert (HEADER_SIZE, DONE_SIZE, EVENT_SIZE) == (16, 40, 24)
    assert struct.pack("<I", MAGIC) == b"ARPL"


@st.composite
def operations(draw) -> tuple[Op, list[bytes], dict[str, int], bytes]:
    op = draw(st.sampled_from(Op))
    strings = draw(st.lists(TEXT, min_size=STRINGS.get(op, 0), max_size=STRINGS.get(op, 0)))
    return op, strings, draw(st.fixed_dictionaries(dict.fromkeys("abcd", U32))), draw(st.binary(max_size=64))


@given(operations())
def test_an_operation_is_its_numbers_strings_and_blob(operation):
    op, strings, numbers, blob = operation
    data = pack_op(op, *strings, **numbers, blob=blob)
    kind, size, *rest = struct.unpack_from(OP, data)
    assert (kind, size, rest) == (op, len(data), [numbers[name] for name in "abcd"])
    assert size % 8 == 0
    payload = b"".join(text + b"\0" for text in strings) + blob
    assert data[24:].startswith(payload)
    assert data[24 + len(payload) :] == bytes(-len(payload) % 8)


@given(st.lists(operations(), max_size=20), U32, st.integers(0, 64))
def test_a_shape_is_its_operations(operations, namespaces, nfds):
    ops = [pack_op(op, *strings, **numbers, blob=blob) for op, strings, numbers, blob in operations]
    data = pack_shape(namespaces, ops, nfds)
    assert struct.unpack_from(HEAD, data) == (MAGIC, VERSION, Kind.SHAPE, len(data), nfds)
    assert struct.unpack_from("<II", data, 16) == (namespaces, len(ops))
    at, seen = 24, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        seen.append(data[at : at + size])
        at += size
    assert seen == ops


@given(MAPS, st.sampled_from([SlotFlag(0), SlotFlag.LEAF, SlotFlag.NO_CLONE3, SlotFlag(3)]))
def test_slots_and_namespaces_carry_their_maps(maps, flags):
    for data, head, wanted in (
        (pack_slot(flags, maps, 2), (Kind.SLOT, 2), flags),
        (pack_userns(maps), (Kind.USERNS, 0), 0),
    ):
        assert struct.unpack_from(HEAD, data) == (MAGIC, VERSION, head[0], len(data), head[1])
        assert struct.unpack_from(SLOT, data, 16) == (wanted, len(maps))
        assert [*struct.iter_unpack(MAP, data[24:])] == [(int(gid), *rest) for gid, *rest in maps]


@given(st.lists(TEXT, min_size=1), st.lists(TEXT), TEXT, TEXT, st.integers(0, 0o777), U32)
def test_a_run_is_its_strings_in_order(argv, env, cwd, attach, umask, nproc):
    data = pack_run(argv, env, cwd=cwd, flags=RunFlag.ATTACH, umask=umask, nproc=nproc, attach=attach, nfds=4)
    assert struct.unpack_from(HEAD, data) == (MAGIC, VERSION, Kind.RUN, len(data), 4)
    assert struct.unpack_from(RUN, data, 16) == (RunFlag.ATTACH, len(argv), len(env), umask, nproc, 0)
    assert data[40:].split(b"\0") == [cwd, attach, *argv, *env, b""]


def run(argv=(b"x",), env=(), cwd=b"/", attach=b""):
    return pack_run(argv, env, cwd=cwd, flags=RunFlag(0), umask=0, nproc=0, attach=attach, nfds=3)


@pytest.mark.parametrize("pack", [
    lambda: run(argv=[b"a", b"b\0c"]), lambda: run(env=[b"A=\0"]), lambda: run(cwd=b"/\0"), lambda: run(attach=b"\0"),
    lambda: pack_op(Op.HOSTNAME, b"a\0b"), lambda: pack_op(Op.MOUNT, b"proc", b"/proc\0", b""),
])  # fmt: skip
def test_a_nul_would_make_two_strings_of_one(pack):
    with pytest.raises(PlanError, match="a NUL byte in"):
        pack()


@pytest.mark.parametrize(("op", "strings"), [(Op.ROOT, [b"x"]), (Op.MOUNT, [b"x", b"y"]), (Op.BIND, [b"x"]), (Op.HOSTNAME, [])])
def test_the_number_of_strings_is_the_operations(op, strings):
    with pytest.raises(PlanError, match=f"{op.name} takes {STRINGS.get(op, 0)} strings, not {len(strings)}"):
        pack_op(op, *strings)


def test_a_plan_as_long_as_may_be():
    blob = bytes(MAX_MESSAGE - HEADER_SIZE - 8 - 24)
    assert len(pack_shape(0, [pack_op(Op.FILTER, blob=blob)], 0)) == MAX_MESSAGE
    with pytest.raises(PlanError, match=f"a SHAPE plan of {MAX_MESSAGE + 8} bytes; the limit is {MAX_MESSAGE}"):
        pack_shape(0, [pack_op(Op.FILTER, blob=blob + b"x")], 0)


def test_a_command_line_as_long_as_may_be():
    room = MAX_RUN - 24 - len(b"/\0\0")
    assert len(run(argv=[b"x" * (room - 1)])) == HEADER_SIZE + MAX_RUN
    with pytest.raises(PlanError, match=f"take {room + 4} bytes; the limit is {MAX_RUN}"):
        run(argv=[b"x" * room])


def done(error=0, step=0, init=0, runner=0, flags=0, op=0, *, kind=Kind.DONE, version=VERSION, magic=MAGIC) -> bytes:
    return struct.pack(HEAD, magic, version, kind, DONE_SIZE, 0) + struct.pack("<iIiiII", error, step, init, runner, flags, op)


@given(
    st.integers(-(2**31), 2**31 - 1), st.sampled_from(Step), st.integers(0, 2**22), st.integers(0, 2**22), st.integers(0, 3), U32
)
def test_an_answer_is_what_was_answered(error, step, init, runner, flags, op):
    assert unpack_done(done(error, step, init, runner, flags, op)) == Done(error, step, init, runner, SlotFlag(flags), op)


@given(
    st.sampled_from([Kind.READY, Kind.STARTED, Kind.FAILED]),
    st.sampled_from(Step),
    st.integers(0, 133),
    U32,
    st.integers(0, 2**64 - 1),
    st.binary(),
)
def test_an_event_is_its_first_bytes(kind, step, error, op, ns, more):
    assert unpack_event(struct.pack("<IIiIQ", kind, step, error, op, ns) + more) == Event(kind, step, error, op, ns)


@pytest.mark.parametrize("data", [
    b"", done()[:-1], done() + b"\0", done(version=VERSION + 1), done(kind=Kind.READY), done(magic=MAGIC ^ 1), bytes(DONE_SIZE),
])  # fmt: skip
def test_what_is_no_answer_of_this_version(data):
    with pytest.raises(PlanError, match="zygote"):
        unpack_done(data)


def test_a_step_of_another_version():
    try:
        unpack_done(done(step=99))
    except PlanError:
        return
