# SPDX-License-Identifier: Apache-2.0
"""The headers in bpf/ are read by Python and compiled by C: both have to see the same."""

import subprocess
from pathlib import Path

import pytest

from agentrun.burst.layout import _layout, constants, layouts
from agentrun.burst.table import ACTS, WHY
from agentrun_shim.data import data_path


def compiled(header: str, directory: Path) -> dict[str, int]:
    """What the C compiler makes of it: `name size` and `name.field offset` of every struct and field that Python sees."""
    lines = ["#include <stdio.h>", "#include <stddef.h>", f'#include "{data_path("bpf")}/{header}"', "int main(void) {"]
    for name, layout in layouts(header).items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field in layout.fields]
    (directory / "layout.c").write_text("\n".join([*lines, "}"]))
    include = directory / "linux"
    include.mkdir()
    kinds = {"u8": "char", "u16": "short", "u32": "int", "u64": "long"}
    types = [f"typedef unsigned {kind} {name};" for name, kind in kinds.items()]
    types += [f"typedef signed {kind} s{name[1:]};" for name, kind in kinds.items()]
    (include / "types.h").write_text("#pragma once\n" + "\n".join(types))
    subprocess.run(["cc", f"-I{directory}", "-o", directory / "layout", directory / "layout.c"], check=True)
    said = subprocess.run([directory / "layout"], check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in (line.split() for line in said.splitlines())}


@pytest.mark.parametrize(
    ("header", "structs"),
    [
        ("events.h", {"leaf", "event", "settings", "counters"}),
        ("phases.h", {"call", "histogram", "daemon", "counted"}),
        ("sched.h", {"turn", "notice", "terms", "tally", "parting"}),
    ],
)
def test_sizes_and_offsets_are_the_compilers(header, structs, tmp_path):
    known = layouts(header)
    found = {name: layout.size for name, layout in known.items()}
    found |= {f"{name}.{field}": at.offset for name, layout in known.items() for field, at in layout.fields.items()}
    assert found == compiled(header, tmp_path)
    assert structs <= known.keys()


def test_a_part_has_no_holes():
    leaf = layouts()["leaf"]
    assert leaf.part("steady", "capacity").size == 4 * 8
    with pytest.raises(ValueError, match="is not in list"):
        leaf.part("steady", "nothing")


def test_arrays_of_phases_have_as_many_elements_as_there_are_phases():
    phases, layout = constants("phases.h"), layouts("phases.h")
    assert sorted(value for name, value in phases.items() if name.startswith("PHASE_")) == list(range(phases["PHASES"]))
    assert sorted(value for name, value in phases.items() if name.startswith("KIND_")) == list(range(phases["KINDS"]))
    assert layout["call"].fields["ns"].code == f"{phases['PHASES']}Q"
    assert layout["histogram"].fields["slots"].code == f"{phases['SLOTS']}Q"
    assert phases["HISTOGRAMS"] == phases["SHAPES"] * phases["KINDS"] * phases["PHASES"]


def test_numbers_are_the_headers():
    numbers = constants()
    assert numbers["NO_LIMIT"] == 2**64 - 1
    assert set(ACTS) == {"notify", "stop", "throttle", "kill"}
    assert set(WHY.values()) == {"crossed", "below", "exhausted", "ceiling", "unstoppable"}


def test_what_it_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="struct x: 'float y' is no member"):
        _layout("x", "float y;")
