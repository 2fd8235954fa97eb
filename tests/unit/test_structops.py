# SPDX-License-Identifier: Apache-2.0
"""What is done to BCC's code before the kernel gets it as a table of functions; and where there is nothing to give it to."""

import struct

import pytest

from agentrun.probes.btf import VMLINUX, Btf
from agentrun.probes.loader import ProbesError
from agentrun.probes.sched import STATE, attach_sched
from agentrun.probes.structops import mark_kernel_calls

EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)


def call(number: int, registers: int = 0) -> bytes:
    return struct.pack("<BBhi", 0x85, registers, 0, number)


def test_only_kernel_functions_are_marked():
    code = call(5) + call(70000) + call(3, 0x10) + EXIT
    assert mark_kernel_calls(code, {70000: "scx_bpf_kick_cpu"}) == call(5) + call(70000, 0x20) + call(3, 0x10) + EXIT


def test_the_second_half_of_a_wide_load_is_no_call():
    wide = struct.pack("<BBhi", 0x18, 1, 0, 7) + struct.pack("<BBhi", 0, 0, 0, 0x85)
    assert mark_kernel_calls(wide + EXIT, {133: "x"}) == wide + EXIT


def test_a_call_of_something_unknown_is_refused():
    with pytest.raises(ProbesError, match="70001"):
        mark_kernel_calls(call(70001), {70000: "scx_bpf_kick_cpu"})


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")
def test_btf_knows_ids_positions_and_values():
    btf = Btf({"bpf_prog_type": ["BPF_PROG_TYPE_STRUCT_OPS"], "list_head": ["next", "prev"]}, ["wake_up_process"])
    assert btf.values == {"BPF_PROG_TYPE_STRUCT_OPS": 27}
    assert (btf.positions["list_head.next"], btf.positions["list_head.prev"]) == (0, 1)
    assert {"list_head", "wake_up_process"} == btf.ids.keys()


@pytest.mark.skipif(STATE.exists(), reason="this kernel has sched_ext")
def test_without_sched_ext_it_says_so():
    with pytest.raises(ProbesError, match="CONFIG_SCHED_CLASS_EXT"):
        attach_sched()
