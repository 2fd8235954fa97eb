# SPDX-License-Identifier: Apache-2.0
"""The OCI runtime's parts that need no container: options, JSON, resources, device rules, mount options, start-up."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrun_shim import container_plan, plan
from agentrun_shim.oci import devices, jsontext
from agentrun_shim.oci.errors import OciError
from agentrun_shim.oci.mounts import Parsed, pack_maps
from agentrun_shim.oci.options import parse
from agentrun_shim.oci.process import capability_mask, cpu_mask
from agentrun_shim.oci.resources import to_files

SHIM = Path(__file__).parents[2] / "shim"

# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("line", "verb", "operands", "flags"), [
    ("--log-format=json --log F create --bundle B --pid-file P ID", "create", ["ID"],
     {"log-format": "json", "log": "F", "bundle": "B", "pid-file": "P"}),
    ("--root /r --log L --log-format json create --bundle B --pid-file P ID", "create", ["ID"],
     {"root": "/r", "log": "L", "log-format": "json", "bundle": "B", "pid-file": "P"}),
    ("exec --pid-file P --process F --detach ID", "exec", ["ID"], {"pid-file": "P", "process": "F", "detach": "true"}),
    ("exec -u 1:2 ID ls -l --detach", "exec", ["ID", "ls", "-l", "--detach"], {"user": "1:2"}),
    ("exec ID -- ls -l", "exec", ["ID", "ls", "-l"], {}),
    ("update --resources=- ID", "update", ["ID"], {"resources": "-"}),
    ("update ID --memory -1", "update", ["ID"], {"memory": "-1"}),
    ("ps --format json ID", "ps", ["ID"], {"format": "json"}),
    ("ps -f json ID", "ps", ["ID"], {"format": "json"}),
    ("--systemd-cgroup --criu=/x kill -a ID 9", "kill", ["ID", "9"], {"systemd-cgroup": "true", "criu": "/x", "all": "true"}),
    ("create -f C -b B ID", "create", ["ID"], {"config": "C", "bundle": "B"}),
    ("delete -f ID", "delete", ["ID"], {"force": "true"}),
])  # fmt: skip
def test_command_lines_of_engines(line, verb, operands, flags):
    options = parse(line.split())
    assert (options.verb, options.operands, options.flags) == (verb, operands, flags)


@pytest.mark.parametrize(
    "line", ["--nope create x", "create --nope x", "nonsense", "create --bundle", "checkpoint x", "restore x"]
)
def test_command_lines_that_are_wrong(line):
    with pytest.raises(OciError):
        parse(line.split())


# --------------------------------------------------------------------------------------------------- JSON

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_is_json(value):
    assert json.loads(jsontext.dumps(value)) == value
    assert jsontext.loads(json.dumps(value, indent=1).encode(), "x") == value


@pytest.mark.parametrize("text", [b"", b"{", b'{"a": }', b"[1,]", b"1 2", b"NaN", b"\xff", b'{"a"', b"nul", b"[" * 100000])
def test_what_is_no_json(text):
    with pytest.raises(OciError, match=r"^x: "):
        jsontext.loads(text, "x")


# --------------------------------------------------------------------------------------------------- resources


@pytest.mark.parametrize(("given", "files"), [
    ({"memory": {"limit": 100, "swap": 150, "reservation": 50}}, [("memory.swap.max", "50"), ("memory.max", "100"),
    ("memory.low", "50")]),
    ({"memory": {"limit": -1}}, [("memory.max", "max"), ("memory.swap.max", "max")]),
    ({"memory": {"limit": 0}}, []), ({"memory": {"limit": 100}}, [("memory.max", "100")]),
    ({"memory": {"limit": 100, "swap": -1}}, [("memory.swap.max", "max"), ("memory.max", "100")]),
    ({"cpu": {"shares": 1024}}, [("cpu.weight", "39")]), ({"cpu": {"shares": 2}}, [("cpu.weight", "1")]),
    ({"cpu": {"shares": 262144}}, [("cpu.weight", "10000")]), ({"cpu": {"shares": 0}}, []),
    ({"cpu": {"quota": 50, "period": 100}}, [("cpu.max", "50 100")]), ({"cpu": {"quota": -1, "period": 100}}, [("cpu.max",
    "max 100")]),
    ({"cpu": {"quota": 5000}}, [("cpu.max", "5000 100000")]), ({"cpu": {"idle": 1, "burst": 0}}, [("cpu.max.burst", "0"),
    ("cpu.idle", "1")]),
    ({"pids": {"limit": 7}}, [("pids.max", "7")]), ({"pids": {"limit": -1}}, [("pids.max", "max")]), ({"pids": {"limit": 0}}, []),
    ({"blockIO": {"weight": 10, "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 5}]}}, [("io.weight", "default 1"),
    ("io.max", "8:0 wiops=5")]),
    ({"hugepageLimits": [{"pageSize": "2MB", "limit": 9}]}, [("hugetlb.2MB.max", "9")]),
    ({"rdma": {"mlx5_1": {"hcaHandles": 3}}}, [("rdma.max", "mlx5_1 hca_handle=3")]),
    ({"unified": {"memory.high": "5"}, "pids": {"limit": 1}}, [("pids.max", "1"), ("memory.high", "5")]),
])  # fmt: skip
def test_resources_as_files(given, files):
    assert to_files(given) == files


@pytest.mark.parametrize("given", [
    {"memory": {"swap": 5}}, {"memory": {"limit": 10, "swap": 5}}, {"cpu": {"realtimeRuntime": 5}}, {"network": {"classID": 1}},
    {"unified": {"../x": "1"}}, {"unified": {"memory.high": 5}},
])  # fmt: skip
def test_resources_that_cannot_be(given):
    with pytest.raises(OciError):
        to_files(given)


# --------------------------------------------------------------------------------------------------- device rules

ACCESS = {"m": 1, "r": 2, "w": 4}


def ask(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Run a device program: the few instructions it is made of, as the kernel does."""
    context = struct.pack("<III", sum(ACCESS[letter] for letter in access) << 16 | {"b": 1, "c": 2}[kind], major, minor)
    code = list(struct.iter_unpack("<BBhi", program))
    register, at = [0] * 11, 0
    while True:
        op, registers, offset, value = code[at]
        to, of = registers & 15, registers >> 4
        at += 1
        if op == 0x61:
            (register[to],) = struct.unpack_from("<I", context, offset)
        elif op == 0xB7:
            register[to] = value
        elif op == 0xBF:
            register[to] = register[of]
        elif op == 0x57:
            register[to] &= value
        elif op == 0x77:
            register[to] >>= value
        elif op == 0x55:
            at += offset if register[to] != value else 0
        elif op == 0x15:
            at += offset if register[to] == value else 0
        elif op == 0x95:
            return bool(register[0])
        else:
            raise AssertionError(f"instruction {op:#x}")


def rule(allow: bool, kind: str = "a", major: int | None = None, minor: int | None = None, access: str = "rwm") -> dict:
    return {"allow": allow, "type": kind, "major": major, "minor": minor, "access": access}


def test_rules_of_an_engine():
    program = devices.compile_rules([rule(False), rule(True, "c", 10, 200), rule(True, "b", 8, None, "r")])
    asked = {
        ("c", 1, 3, "rw"): True, ("c", 136, 7, "rw"): True, ("c", 10, 200, "rwm"): True, ("c", 10, 201, "r"): False, ("c", 10,
        201, "m"): True,
        ("b", 8, 5, "r"): True, ("b", 8, 5, "w"): False, ("b", 8, 5, "rw"): False, ("b", 9, 0, "m"): True, ("c", 1, 11,
        "r"): False,
    }  # fmt: skip
    assert {question: ask(program, *question) for question in asked} == asked


def test_later_rules_change_earlier_ones():
    program = devices.compile_rules(
        [rule(False), rule(True, "c", 20), rule(False, "c", 20, None, "w"), rule(True, "c", 21, 1), rule(False, "c", 21)]
    )
    assert [ask(program, *question) for question in (("c", 20, 1, "r"), ("c", 20, 1, "w"), ("c", 21, 1, "r"))] == [
        True,
        False,
        False,
    ]


def test_everything_but_something():
    program = devices.compile_rules([rule(True), rule(False, "c", 20, 1, "w")])
    assert [ask(program, *question) for question in (("c", 20, 1, "r"), ("c", 20, 1, "rw"), ("b", 1, 1, "rwm"))] == [
        True,
        False,
        True,
    ]
    assert devices.compile_rules([]) == b""
    assert devices.compile_rules([rule(True)]) == b""


def test_rules_that_are_none():
    for bad in ({"type": "x"}, {"type": "c", "access": "x"}):
        with pytest.raises(OciError):
            devices.play([bad])


# --------------------------------------------------------------------------------------------------- mounts, masks


def test_mount_options():
    parsed = Parsed(
        "/x", ["rbind", "ro", "nosuid", "rro", "noatime", "strictatime", "rslave", "size=5", "idmap", "tmpcopyup", "defaults"]
    )
    assert (parsed.bind, parsed.idmap, parsed.copy_up, parsed.data) == (True, False, True, ["size=5"])
    assert (parsed.set, parsed.rset, parsed.propagation) == (1 | 2 | 0x20, 1, 1 << 19 | 0x4000)
    assert Parsed("/x", ["ro", "rw"]).set == 0
    assert Parsed("/x", ["ro", "rw"]).clear == 1


def test_id_maps():
    maps = pack_maps([{"containerID": 0, "hostID": 5, "size": 7}], [{"containerID": 1, "hostID": 6, "size": 8}])
    assert list(struct.iter_unpack("<4I", maps)) == [(0, 0, 5, 7), (1, 1, 6, 8)]
    with pytest.raises(OciError, match="are needed"):
        pack_maps([{"containerID": 0}], [])


def test_capabilities_and_processors():
    assert capability_mask(["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE", "CAP_UNHEARD_OF"]) == 1 | 1 << 40
    assert int.from_bytes(cpu_mask("0-2,7"), "little") == 0x87
    with pytest.raises(OciError, match="no list"):
        cpu_mask("x")


# --------------------------------------------------------------------------------------------------- the plan, start-up


def test_both_plans_agree_where_they_share():
    assert (container_plan.KIND, container_plan.MAGIC, container_plan.VERSION) == (plan.Kind.CONTAINER, plan.MAGIC, plan.VERSION)
    shared = {name: number for name, (number, _) in container_plan.OPS.items() if number < 64}
    assert shared == {name: plan.Op[name].value for name in shared}
    assert {name: container_plan.OPS[name][1] for name in shared} == {name: plan.STRINGS.get(plan.Op[name], 0) for name in shared}
    numbers = [number for number, _ in container_plan.OPS.values()]
    assert len(numbers) == len(set(numbers))
    assert (container_plan.READY, container_plan.STARTED, container_plan.FAILED) == (
        plan.Kind.READY,
        plan.Kind.STARTED,
        plan.Kind.FAILED,
    )


HEAVY = {
    "re",
    "enum",
    "typing",
    "json",
    "subprocess",
    "socket",
    "ctypes",
    "argparse",
    "contextlib",
    "pathlib",
    "dataclasses",
    "msgspec",
    "trio",
}


@pytest.mark.parametrize("module", ["create", "execute", "verbs", "later"])
def test_start_up_imports_nothing_heavy(module):
    """As engines start it: isolated, without site. Each of these would cost a container milliseconds."""
    front = f"import sys; sys.path.append({str(SHIM)!r});"
    code = f"{front} import agentrun_shim.oci.main, agentrun_shim.oci.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(loaded) == set()
